"""References: statistics of real images, their file, and ADM's files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metric_recipe import images
from torch import Tensor

from bench import metrics
from bench.errors import UserError
from bench.metrics.precision_recall import squared_radii
from bench.scoring import reference
from bench.scoring.images import not_an_npz, open_images
from bench.scoring.reference import Reference, build_reference, kept_images

PIXELS = torch.from_numpy(images(95, 8, 6, 3, 1)).permute(0, 3, 1, 2)  # (95, 3, 8, 6) uint8
LABELS = torch.arange(95) % 4


class Corners:
    """Features without a network: four pixels, a row of pixels, three means."""

    name, sha256, resize = "corners", "c0ffee" * 10, "none"
    dims = {"pool": 4, "spatial": 6, "logits": 3}

    def __call__(self, given: Tensor, indices: Any = None) -> dict[str, Tensor]:
        x = given.float()
        return {"pool": x[:, 0, :2, :2].flatten(1), "spatial": x[:, 1, 3], "logits": x.mean((2, 3))}


def reading(labels: Tensor | None = LABELS) -> Callable[[range], tuple[Tensor, Tensor | None]]:
    def read(block: range) -> tuple[Tensor, Tensor | None]:
        part = slice(block.start, block.stop)
        return PIXELS[part], None if labels is None else labels[part]

    return read


def toy(labels: Tensor | None = LABELS, rule: str = "as they are", **options: Any) -> Reference:
    return build_reference("toy", reading(labels), 95, Corners(), rule, **options)


def adm_file(path: Path, **extra: np.ndarray) -> Path:
    made = toy()
    statistics = {"mu": made.pool.mu, "sigma": made.pool.sigma, "mu_s": made.spatial.mu, "sigma_s": made.spatial.sigma}
    np.savez(path, **{key: value.numpy() for key, value in statistics.items()}, **extra)
    return path


def test_moments_are_mean_and_unbiased_covariance():
    made, features = toy(), Corners()(PIXELS)
    for kind, found in (("pool", made.pool), ("spatial", made.spatial)):
        rows = features[kind].double().numpy()
        np.testing.assert_allclose(found.mu.numpy(), rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.sigma.numpy(), np.cov(rows, rowvar=False), rtol=1e-9)
    assert made.n == 95 and torch.equal(made.labels, LABELS)


def test_file_gives_back_the_reference(tmp_path):
    made = toy()
    made.save(tmp_path / "toy.npz")
    read = Reference.load(tmp_path / "toy.npz")
    for field in ("name", "n", "extractor", "extractor_sha256", "image_rule", "num_logits", "sha256"):
        assert getattr(read, field) == getattr(made, field)
    for field in ("pool_rows", "labels", "radii"):
        torch.testing.assert_close(getattr(read, field), getattr(made, field), rtol=0, atol=0)
    torch.testing.assert_close(read.pool.sigma, made.pool.sigma, rtol=0, atol=0)
    torch.testing.assert_close(read.spatial.mu, made.spatial.mu, rtol=0, atol=0)
    assert "radii" in vars(read)  # read, not computed again


def test_file_has_the_keys_and_layout_of_adm(tmp_path):
    toy().save(tmp_path / "toy.npz", PIXELS.split(40))
    with np.load(tmp_path / "toy.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(file.files)
        np.testing.assert_array_equal(file["arr_0"], images(95, 8, 6, 3, 1))  # NHWC


def test_identity_depends_on_images_labels_and_rule_but_not_on_batches(monkeypatch):
    whole = toy().sha256
    others = {whole, toy(labels=None).sha256, toy(labels=LABELS.flip(0)).sha256, toy(rule="cropped").sha256}
    assert len(others) == 4
    monkeypatch.setattr(reference, "BATCH", 31)
    assert toy().sha256 == whole


def test_rows_beyond_the_limit_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(reference, "MAX_ROWS", 10)
    made = toy(labels=torch.arange(95))  # the labels given here are the positions
    positions = made.labels
    assert len(positions) == 10 and set(positions.diff().tolist()) <= {9, 10}
    torch.testing.assert_close(made.pool_rows, Corners()(PIXELS)["pool"][positions])
    kept = torch.cat(list(kept_images(reading(), 95)))
    assert torch.equal(kept, PIXELS[positions])


def test_a_reference_that_was_interrupted_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "BATCH", 10)
    monkeypatch.setattr(reference, "SAVE_SECONDS", 0)
    whole, seen = toy(), []

    def killed(block: range) -> tuple[Tensor, Tensor | None]:
        seen.append(block.start)
        if block.start == 40 and len(seen) == 5:
            raise KeyboardInterrupt
        return reading()(block)

    with pytest.raises(KeyboardInterrupt):
        build_reference("toy", killed, 95, Corners(), "as they are", tmp_path / "toy.partial")
    resumed = build_reference("toy", killed, 95, Corners(), "as they are", tmp_path / "toy.partial")
    assert seen == [0, 10, 20, 30, 40, 40, 50, 60, 70, 80, 90]
    assert resumed.sha256 == whole.sha256
    for kind in ("pool", "spatial"):
        assert torch.equal(getattr(resumed, kind).mu, getattr(whole, kind).mu)
        assert torch.equal(getattr(resumed, kind).sigma, getattr(whole, kind).sigma)
    assert torch.equal(resumed.pool_rows, whole.pool_rows) and torch.equal(resumed.labels, whole.labels)
    assert not list(tmp_path.iterdir())


def test_another_extractor_is_refused():
    other = Corners()
    other.sha256 = "abad1dea" * 8
    with pytest.raises(UserError, match="Use the same extractor"):
        toy().check(other)
    toy().check(Corners())


def test_adm_file_serves_distances_at_once_and_rows_when_its_images_are_read(tmp_path):
    path = adm_file(tmp_path / "VIRTUAL_toy.npz", arr_0=images(95, 8, 6, 3, 1))
    read = Reference.load(path)
    assert (read.name, read.extractor, read.num_logits) == ("VIRTUAL_toy", "inception", 1008)
    torch.testing.assert_close(read.pool.sigma, toy().pool.sigma, rtol=0, atol=0)
    with pytest.raises(UserError, match="holds no feature rows"):
        metrics.spec("precision").build(read, 20)
    extractor = Corners()
    extractor.name, extractor.sha256 = "inception", reference.INCEPTION_SHA256 + "0" * 56
    full = read.with_rows(open_images(path), extractor)
    torch.testing.assert_close(full.pool_rows, Corners()(PIXELS)["pool"])
    torch.testing.assert_close(full.radii, squared_radii(full.pool_rows))
    with pytest.raises(UserError, match="no labels"):
        metrics.spec("class_accuracy").build(full, 20)


def test_files_that_are_no_reference_say_so(tmp_path):
    with pytest.raises(UserError, match="There is no reference file"):
        Reference.load(tmp_path / "nothing.npz")
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(UserError, match=r"it has no mu, sigma\. It holds arr_0"):
        Reference.load(tmp_path / "samples.npz")
    path = adm_file(tmp_path / "torn.npz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cut off, or another kind of file"):
        Reference.load(path)
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(2))
    with pytest.raises(UserError, match="holds pickled objects, which are never loaded"):
        Reference.load(tmp_path / "pickled.npz")
    (tmp_path / "text.npz").write_text("mu, sigma\n")
    with pytest.raises(UserError, match=r"text\.npz cannot be read as an npz: it is cut off"):
        Reference.load(tmp_path / "text.npz")
    assert "permission denied" in str(not_an_npz(path, PermissionError(13, "Permission denied")))
    made = toy()
    np.savez(tmp_path / "pool.npz", mu=made.pool.mu.numpy(), sigma=made.pool.sigma.numpy())
    with pytest.raises(UserError, match="holds no spatial moments"):
        metrics.spec("sfid").build(Reference.load(tmp_path / "pool.npz"), 20)


def test_a_saved_reference_without_rows_stays_without(tmp_path):
    replace(toy(), pool_rows=None, labels=None).save(tmp_path / "toy.npz")
    assert Reference.load(tmp_path / "toy.npz").pool_rows is None
