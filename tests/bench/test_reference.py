"""References: statistics of real images, their file, and ADM's files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_recipe import images
from torch import Tensor

from bench import metrics, reference
from bench.errors import UserError
from bench.metrics.precision_recall import squared_radii
from bench.reference import Reference, adm_images, build_reference

PIXELS = torch.from_numpy(images(95, 8, 6, 3, 1)).permute(0, 3, 1, 2)  # (95, 3, 8, 6) uint8
LABELS = torch.arange(95) % 4


class Corners:
    """Features without a network: four pixels, a row of pixels, three means."""

    name, sha256, resize = "corners", "c0ffee" * 10, "none"
    dims = {"pool": 4, "spatial": 6, "logits": 3}

    def __call__(self, given: Tensor) -> dict[str, Tensor]:
        x = given.float()
        return {"pool": x[:, 0, :2, :2].flatten(1), "spatial": x[:, 1, 3], "logits": x.mean((2, 3))}


def batches(size: int, labels: Tensor | None = LABELS) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(PIXELS), size):
        part = slice(start, start + size)
        yield PIXELS[part], None if labels is None else labels[part]


def toy(size: int = 20, labels: Tensor | None = LABELS, rule: str = "as they are") -> Reference:
    return build_reference("toy", batches(size, labels), 95, Corners(), rule)


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
    toy().save(tmp_path / "toy.npz", PIXELS[:7])
    with np.load(tmp_path / "toy.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(file.files)
        np.testing.assert_array_equal(file["arr_0"], images(95, 8, 6, 3, 1)[:7])  # NHWC


def test_identity_depends_on_images_labels_and_rule_but_not_on_batches():
    assert toy(20).sha256 == toy(31).sha256
    others = {toy().sha256, toy(labels=None).sha256, toy(labels=LABELS.flip(0)).sha256, toy(rule="cropped").sha256}
    assert len(others) == 4


def test_rows_beyond_the_limit_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(reference, "MAX_ROWS", 10)
    made = build_reference(
        "toy", ((PIXELS[i : i + 7], torch.arange(i, min(i + 7, 95))) for i in range(0, 95, 7)), 95, Corners(), ""
    )
    positions = made.labels  # the labels given here are the positions
    assert len(positions) == 10 and set(positions.diff().tolist()) <= {9, 10}
    torch.testing.assert_close(made.pool_rows, Corners()(PIXELS)["pool"][positions])


def test_a_wrong_number_of_images_is_refused():
    with pytest.raises(UserError, match="should have 96 images, the data gave 95"):
        build_reference("toy", batches(20), 96, Corners(), "")


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
    full = read.with_rows(adm_images(path), extractor)
    torch.testing.assert_close(full.pool_rows, Corners()(PIXELS)["pool"])
    torch.testing.assert_close(full.radii, squared_radii(full.pool_rows))
    with pytest.raises(UserError, match="no labels"):
        metrics.spec("class_accuracy").build(full, 20)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_adm_images_come_in_batches_and_in_order(tmp_path, write):
    write(tmp_path / "samples.npz", images(95, 8, 6, 3, 1), np.arange(95))
    parts = list(adm_images(tmp_path / "samples.npz"))
    assert [len(part) for part in parts] == [64, 31]
    assert torch.equal(torch.cat(parts), PIXELS)


def test_files_that_are_no_reference_say_so(tmp_path):
    with pytest.raises(UserError, match="There is no reference file"):
        Reference.load(tmp_path / "nothing.npz")
    np.savez(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(UserError, match="no mu, sigma, mu_s, sigma_s"):
        Reference.load(tmp_path / "samples.npz")
    with pytest.raises(UserError, match="should be uint8 images"):
        list(adm_images(tmp_path / "samples.npz"))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3))
    with pytest.raises(UserError, match="holds no images"):
        list(adm_images(tmp_path / "statistics.npz"))


def test_a_saved_reference_without_rows_stays_without(tmp_path):
    replace(toy(), pool_rows=None, labels=None).save(tmp_path / "toy.npz")
    assert Reference.load(tmp_path / "toy.npz").pool_rows is None
