"""The main job end to end on small real backbones: outputs, and several processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.compare import compare, describe
from bench.config import load_comparison
from bench.errors import UserError
from bench.registry import ROOT

# Each backbone two layers deep, a few steps, a few samples: seconds, not minutes.
SMALL = [
    "use.data=synthetic",
    "use.eval=digits",
    "models.diffussm.depth=1",
    "models.dit.depth=1",
    "models.uvit.depth=2",
    "recipe.batch_size=8",
    "recipe.sampler.steps=2",
    "budget.train_gflops=15",
    "eval.num_samples=24",
    "eval.batch_size=8",
    "eval.checkpoints=2",
    "tracking=off",
    "trainer.accelerator=cpu",
]


def small(tmp_path: Path, *extra: str) -> list[str]:
    return [*SMALL, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", *extra]


def bench(*words: str, threads: int = 1) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished small comparison -> (its comparison, the path of its report, the directory)."""
    tmp_path = tmp_path_factory.mktemp("compare")
    comparison = load_comparison("digits", small(tmp_path))
    return comparison, compare(comparison), tmp_path


def rows(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "runs" / "results.jsonl").read_text().splitlines()]


def test_everything_lies_there_at_the_end(finished):
    comparison, report, _ = finished
    assert {path.name for path in report.parent.iterdir()} >= {
        "report.html", "table.md", "table.csv", "table.tex", "score-against-compute.png",
    }  # fmt: skip
    for run in comparison.runs:
        state = json.loads((run.directory / "run.json").read_text())
        assert state["state"] == "finished"
        assert (run.directory / "config.yaml").exists() and (run.directory / "metrics.jsonl").exists()
        for samples in run.directory.glob("samples/*/samples.npz"):
            arrays = np.load(samples, allow_pickle=False)
            assert arrays["arr_0"].shape == (24, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8
            assert arrays["labels"].tolist() == [i % 4 for i in range(24)]
            assert (samples.parent / "grid.png").exists() and not (samples.parent / "blocks").exists()


def test_one_row_for_each_scored_checkpoint_and_equal_compute(finished):
    _, _, tmp_path = finished
    stored = rows(tmp_path)
    assert len(stored) == 9  # three architectures: untrained, half, whole
    for row in stored:
        assert row["train_gflops"] == pytest.approx(3 * row["gflops"] * row["images_seen"])
        assert row["train_gflops_papers"] == pytest.approx(row["gflops"] * row["images_seen"])
        assert set(row["scores"]) == set(row["ci95"])
    final = [max((r for r in stored if r["model"] == m), key=lambda r: r["steps"]) for m in ("dit", "uvit", "diffussm")]
    spent = [row["train_gflops"] for row in final]
    assert max(spent) / min(spent) - 1 < 0.02
    assert sum(row["weights"] == "untrained" for row in stored) == 3


def test_running_it_again_computes_nothing(finished, capsys):
    comparison, report, tmp_path = finished
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.ckpt")}
    written |= {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("samples.npz")}
    before = (tmp_path / "runs" / "results.jsonl").read_text()
    assert compare(comparison) == report
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (tmp_path / "runs" / "results.jsonl").read_text() == before


def test_unequal_budgets_are_refused(tmp_path):
    words = [word for word in small(tmp_path) if not word.startswith("budget.")]
    comparison = load_comparison("digits", [*words, "budget.train_gflops=null", "budget.steps=2"])
    with pytest.raises(UserError, match="train_gflops"):
        compare(comparison)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "data, cfg_scale, forwards", [("synthetic", 1.0, 1), ("synthetic", 1.5, 2), ("lsun_bedrooms256", 1.5, 1)]
)
def test_a_dry_run_takes_one_forward_a_step_and_two_if_guided(tmp_path, monkeypatch, data, cfg_scale, forwards):
    """Training is three forwards an image; at a minute a forward, 24 samples of 2 steps are scored three times.

    Without labels there is no guidance.
    """
    monkeypatch.setattr("bench.compare.estimate_seconds", lambda config, plan: 3 * 60.0 * plan.budget.images)
    words = [word for word in small(tmp_path) if not word.startswith(("use.data=", "budget."))]
    words += [f"use.data={data}", f"eval.cfg_scale={cfg_scale}", "budget.train_gflops=1500"]
    text = describe(load_comparison("digits", words))
    assert re.findall(r"sampling ([\d.]+) min", text) == 3 * [f"{24 * 2 * forwards * 3:.1f}"]


def test_rows_of_one_size_are_told_apart_before_anything_is_trained(tmp_path):
    path = tmp_path / "downscaling.yaml"
    path.write_text("models: {fine: {architecture: diffussm, size: T, M: 1}, coarse: {architecture: diffussm, M: 4}}\n")
    shared = [word for word in small(tmp_path, "model.size=T", "use.recipe=digits") if not word.startswith("models.")]
    words = [word for word in shared if not word.startswith("budget.")]
    with pytest.raises(UserError, match=r"diffussm T M=1 \d\S+, diffussm T M=4 \d"):
        describe(load_comparison(str(path), [*words, "budget.steps=2"]))


TRAINING = [
    "use.data=synthetic",
    "model.depth=1",
    "recipe.batch_size=8",
    "budget.train_gflops=null",
    "tracking=off",
    "trainer.accelerator=cpu",
    "trainer.log_every=1",
]


def final_checkpoint(runs: Path, step: int) -> dict:
    return torch.load(next(runs.glob(f"*/checkpoints/step-{step:08d}.ckpt")), weights_only=True)


@pytest.mark.distributed
def test_two_processes_give_the_digits_of_one(finished):
    """Samples and scores are removed and a run is scored again by two processes: same images, same scores."""
    comparison, _, tmp_path = finished
    run = comparison.runs[1]
    old = max((row for row in rows(tmp_path) if row["run_id"] == run.run_id), key=lambda row: row["steps"])
    samples = tmp_path / "runs" / old["samples"]
    before = np.load(samples, allow_pickle=False)["arr_0"]
    samples.unlink()
    (tmp_path / "runs" / "results.jsonl").unlink()
    two = bench("evaluate", str(run.directory), "trainer.devices=2")
    _, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    (new,) = rows(tmp_path)
    assert new["world_size"] == 2
    assert np.array_equal(np.load(samples, allow_pickle=False)["arr_0"], before)
    for name, value in old["scores"].items():
        assert new["scores"][name] == pytest.approx(value, rel=1e-12, abs=1e-12)


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path):
    """DDP on the CPU sees the global batches, noise and label drops of one process."""
    finals = []
    for devices in (1, 2):
        words = [*TRAINING, "budget.steps=5", f"paths.cache={tmp_path / 'cache'}", f"trainer.devices={devices}"]
        process = bench("train", "digits", *words, f"paths.runs={tmp_path / str(devices)}")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        finals.append(final_checkpoint(tmp_path / str(devices), 5)["current_model_state"])
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, atol=1e-5, rtol=1e-4)
