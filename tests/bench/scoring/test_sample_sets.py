"""Anybody's images through the evaluator: the digits of the definition, resumable, any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_recipe import images
from PIL import Image
from scipy import linalg

from bench.cli import main
from bench.config import load_scoring
from bench.errors import UserError
from bench.registry import ROOT
from bench.scoring import passes as scoring
from bench.scoring.features import build_extractor
from bench.scoring.sample_sets import score_sets

REAL = images(40, 24, 24, 5, 1)
DRAWN = np.clip(images(33, 24, 24, 5, 2).astype(int) + 6, 0, 255).astype(np.uint8)
EFFNET = "eval.extractor=effnet-lite0"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """real.npz, drawn.npz, the same images compressed, and as a folder."""
    path = tmp_path_factory.mktemp("files")
    np.savez(path / "real.npz", REAL)
    np.savez(path / "drawn.npz", DRAWN)
    np.savez_compressed(path / "packed.npz", DRAWN)
    (path / "folder").mkdir()
    for i, image in enumerate(DRAWN):
        Image.fromarray(image).save(path / "folder" / f"sample_{i}.png")
    return path


def settings(tmp_path: Path, reference: Path, *extra: str) -> list[str]:
    paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    return [*paths, f"eval.reference={reference}", "trainer.accelerator=cpu", "eval.batch_size=8", *extra]


def stored(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "runs" / "sample_sets.jsonl").read_text().splitlines()]


def rows(pixels: np.ndarray) -> np.ndarray:
    features = build_extractor("effnet-lite0")(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return features["pool"].double().numpy()


def test_scores_are_those_of_the_definition_whatever_the_images_come_in(files, tmp_path, capsys):
    config = load_scoring(settings(tmp_path, files / "real.npz", EFFNET, "eval.metrics=[fid,precision,recall,kid]"))
    score_sets([files / "drawn.npz", files / "packed.npz", files / "folder"], config)
    npz, packed, folder = stored(tmp_path)
    assert npz["scores"] == packed["scores"] == folder["scores"]
    a, b = rows(REAL), rows(DRAWN)
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    fid = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * root
    )
    assert npz["scores"]["fd33[effnet-lite0]"] == pytest.approx(fid, rel=1e-5)
    within = lambda x, y: np.square(x[:, None] - y).sum(2)  # noqa: E731 (squared distances)
    radii = np.sort(within(a, a), 1)[:, 3]
    assert npz["scores"]["precision[effnet-lite0]"] == (within(b, a) <= radii).any(1).mean()
    table = capsys.readouterr().out
    assert "drawn.npz" in table and "folder" in table and "33 samples are few" in table
    assert npz["protocol"]["resize"] and npz["protocol"]["reference_sha256"] and npz["git_commit"]
    assert not (tmp_path / "cache" / "passes").exists() or not list((tmp_path / "cache" / "passes").iterdir())


def test_what_is_stored_is_not_computed_again(files, tmp_path, monkeypatch):
    words = settings(tmp_path, files / "real.npz", EFFNET, "eval.metrics=[fid]")
    score_sets([files / "drawn.npz"], load_scoring(words))
    monkeypatch.setattr(scoring, "run_pass", None)
    monkeypatch.setattr("bench.scoring.sample_sets.run_pass", None)
    score_sets([files / "drawn.npz"], load_scoring(words))
    assert len(stored(tmp_path)) == 1


def test_the_first_images_can_be_scored_alone(files, tmp_path):
    words = settings(tmp_path, files / "real.npz", EFFNET, "eval.metrics=[fid]", "eval.num_samples=20")
    np.savez(tmp_path / "first.npz", DRAWN[:20])
    score_sets([files / "drawn.npz", tmp_path / "first.npz"], load_scoring(words))
    a, b = stored(tmp_path)
    assert a["scores"] == b["scores"] and list(a["scores"]) == ["fd20[effnet-lite0]"]


def run(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "bench", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


ALL = "eval.metrics=[fid,sfid,inception_score,precision,recall,kid,precision_float16,recall_float16]"


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """Images that take seconds to score, and their scores by one process that was left alone."""
    path = tmp_path_factory.mktemp("larger")
    np.savez(path / "real.npz", images(30, 72, 72, 6, 1))
    np.savez(path / "drawn.npz", images(70, 72, 72, 6, 2))
    score_sets([path / "drawn.npz"], load_scoring(settings(path, path / "real.npz", EFFNET, ALL)))
    return path, stored(path)[0]["scores"]


def test_killed_in_the_middle_of_a_pass_and_started_again_gives_the_same_digits(larger, tmp_path):
    path, whole = larger
    words = ["evaluate", "--samples", str(path / "drawn.npz"), *settings(tmp_path, path / "real.npz", EFFNET, ALL)]
    killed, deadline = run(*words), time.monotonic() + 120
    while len(list(tmp_path.glob("cache/passes/*/*/*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cache/passes/*/*/*.safetensors")}
    assert 3 <= len(left) < 9 and not (tmp_path / "runs").exists()
    again = run(*words)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert stored(tmp_path)[0]["scores"] == whole
    assert not any(file.exists() for file in left)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_digits(larger, tmp_path, processes):
    path, alone = larger
    words = settings(tmp_path, path / "real.npz", EFFNET, ALL, f"trainer.devices={processes}")
    together = run("evaluate", "--samples", str(path / "drawn.npz"), *words)
    _, err = together.communicate(timeout=300)
    assert together.returncode == 0, err
    (row,) = stored(tmp_path)
    assert row["world_size"] == processes
    assert row["scores"] == pytest.approx(alone, rel=1e-12, abs=1e-14)


def fails(words: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_one_sentence(files, tmp_path, monkeypatch, capsys):
    def evaluate(*words: str) -> str:
        return fails(["evaluate", *words, f"paths.cache={tmp_path}", f"paths.runs={tmp_path}"], monkeypatch, capsys)

    real, drawn = str(files / "real.npz"), str(files / "drawn.npz")
    assert "one of the two" in evaluate()
    assert "one of the two" in evaluate("runs/x", "--samples", drawn, "--reference", real)
    assert "give --reference" in evaluate("--samples", drawn, EFFNET)
    assert "eval.num_samples=33" in evaluate("--samples", drawn, real, "--reference", real, EFFNET)
    assert "holds 33 images, eval.num_samples asks for 50" in evaluate(
        "--samples", drawn, "--reference", real, EFFNET, "eval.num_samples=50"
    )
    assert "eval.cfg_scale changes nothing here" in evaluate(
        "--samples", drawn, "--reference", real, "eval.cfg_scale=2"
    )
    assert "eval.metrix is not a setting. Did you mean metrics?" in evaluate(
        "--samples", drawn, "--reference", real, "eval.metrix=[fid]"
    )
    assert "weights-inception-2015-12-05-6726825d.pth" in evaluate("--samples", drawn, "--reference", real)
    np.savez(tmp_path / "few.npz", DRAWN[:3])
    assert "at least 5 samples" in evaluate("--samples", str(tmp_path / "few.npz"), "--reference", real, EFFNET)
    assert list(tmp_path.glob("*.jsonl")) == []


def test_a_reference_made_by_the_command_serves_and_another_extractor_is_refused(files, tmp_path, monkeypatch, capsys):
    out, cache = tmp_path / "reference.npz", f"paths.cache={tmp_path / 'cache'}"
    monkeypatch.setattr(sys, "argv", ["bench", "reference", str(files / "real.npz"), "--out", str(out), EFFNET, cache])
    main()
    with np.load(out, allow_pickle=False) as made:
        np.testing.assert_array_equal(made["arr_0"], REAL)
        np.testing.assert_allclose(made["mu"], rows(REAL).mean(0), rtol=1e-5)
    score_sets([files / "drawn.npz"], load_scoring(settings(tmp_path, out, "eval.metrics=[fid]")))  # its extractor
    by_images = settings(tmp_path, files / "real.npz", EFFNET, "eval.metrics=[fid]")
    score_sets([files / "drawn.npz"], load_scoring(by_images))
    assert len(stored(tmp_path)) == 1  # the file and the images are the same reference
    words = ["evaluate", "--samples", str(files / "drawn.npz"), "--reference", str(out), "eval.extractor=random", cache]
    assert "was made with effnet-lite0" in fails(words, monkeypatch, capsys)
    refused = fails(["reference", "nothing", "--out", str(out)], monkeypatch, capsys)
    assert "neither a path nor a data set" in refused


def test_extractors_without_an_output_refuse_the_metrics_that_need_it(files, tmp_path, monkeypatch):
    class PoolOnly:
        name, sha256, resize, precision, dims = "pool-only", "0" * 64, "none", "float32", {"pool": 4}

        def __call__(self, given, indices=None):
            return {"pool": given[:, 0, :2, :2].flatten(1).float()}

    monkeypatch.setattr("bench.scoring.scorer.build_extractor", lambda *args, **options: PoolOnly())
    words = settings(tmp_path, files / "real.npz", EFFNET)
    with pytest.raises(UserError, match="sfid needs spatial features, extractor pool-only has pool only"):
        score_sets([files / "drawn.npz"], load_scoring(words))
    score_sets([files / "drawn.npz"], load_scoring([*words, "eval.metrics=[fid,precision]"]))
