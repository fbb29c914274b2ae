"""A step that is not finite is not taken: one process or two stop at the same step and say what they saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import checkpoint, directory, log, merged, words

from bench.config import load_run
from bench.errors import SharedError
from bench.registry import ROOT
from bench.training.train import train
from datamodules.base import LatentStream
from models.base import DiffusionModule


def start(root: Path, *more: str) -> None:
    _, name, *overrides = merged(words(root, *more))
    train(load_run(name, overrides))


def dump(root: Path) -> dict:
    (path,) = directory(root).glob("nan-step-*.json")
    return json.loads(path.read_text()) | {"file": path.name}


@pytest.fixture
def planted(monkeypatch):
    """NaN in the latents at position 53, which is step 7 of batches of 8."""
    whole = LatentStream.batch

    def batch(self, positions):
        found = whole(self, positions)
        found.latents[found.positions == 53] = torch.nan
        return found

    monkeypatch.setattr(LatentStream, "batch", batch)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_its_step(tmp_path, planted, accumulate):
    # Scored checkpoints of 12 steps at 6 and 12: the one of step 6 is the last good one.
    with pytest.raises(SharedError, match=r"before step 7: the loss is not finite, at position 53 of the data"):
        start(tmp_path, "budget.steps=12", "eval.checkpoints=2", f"trainer.accumulate={accumulate}")
    found = dump(tmp_path)
    assert found["file"] == "nan-step-7.json" and found["step"] == 7
    assert [sample["position"] for sample in found["samples"]] == list(range(48, 56))
    assert [sample["position"] for sample in found["samples"] if sample["loss"] == "nan"] == [53]
    assert all(0 <= sample["t"] < 1000 and 0 <= sample["row"] < 64 for sample in found["samples"])
    state = checkpoint(tmp_path, 6)["current_model_state"]
    for name, norms in found["layers"].items():
        assert norms["parameter"] == pytest.approx([state[name].norm().item()], rel=1e-5)
    run = json.loads((directory(tmp_path) / "run.json").read_text())
    assert run["state"] == "failed" and "position 53" in run["error"]
    assert [row["train/step"] for row in log(tmp_path)] == list(range(1, 7))


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is(tmp_path, monkeypatch):
    def broken(self):
        if self.trainer.global_step == 2:
            self.backbone.x_embedder.proj.bias.grad[3] = torch.inf

    monkeypatch.setattr(DiffusionModule, "on_after_backward", broken)
    with pytest.raises(SharedError, match=r"before step 3: the gradient norm is not finite, though every loss is"):
        start(tmp_path, "budget.steps=4")
    broken_layers = [name for name, norms in dump(tmp_path)["layers"].items() if norms["gradient"] == ["inf"]]
    assert broken_layers == ["backbone.x_embedder.proj.bias"]


def test_a_gradient_norm_above_the_limit_stops(tmp_path):
    with pytest.raises(SharedError, match=r"before step 1: the gradient norm .* is above .*stop_above_grad_norm 1e-06"):
        start(tmp_path, "budget.steps=2", "trainer.stop_above_grad_norm=1e-6")


def test_gradients_are_clipped_to_the_norm_of_the_recipe(tmp_path, monkeypatch):
    taken = []

    def norm(self, optimizer):
        taken.append(sum(p.grad.square().sum() for p in self.parameters() if p.grad is not None).sqrt().item())

    monkeypatch.setattr(DiffusionModule, "on_before_optimizer_step", norm)
    start(tmp_path, "budget.steps=3", "recipe.optimizer.grad_clip=0.25")
    logged = [row["train/grad_norm"] for row in log(tmp_path)]
    assert min(logged) > 0.25
    assert taken == pytest.approx([0.25] * 3, rel=1e-4)


@pytest.mark.distributed
def test_two_processes_train_as_one_and_stop_at_the_same_step(tmp_path, planted):
    """Per step the losses of one process; NaN on the second process alone; grids and quick scores on the way."""
    watch = ["trainer.grid_every=3", "trainer.score_every=5", "trainer.score_samples=24", "budget.steps=12",
             "eval.extractor=effnet-lite0", "eval.metrics=[inception_score]"]  # fmt: skip
    with pytest.raises(SharedError):
        start(tmp_path / "one", *watch)
    again = subprocess.run(
        [sys.executable, "tests/planted.py", *merged(words(tmp_path / "two", *watch, "trainer.devices=2"))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NAN_AT": "53"},
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2, again.stderr
    assert again.stderr.count("isodiff train: Training stopped before step 7") == 1 and "Traceback" not in again.stderr

    one, two = (dump(tmp_path / name) for name in ("one", "two"))
    assert one["reason"] == two["reason"] and one["file"] == two["file"]
    for a, b in zip(one["samples"], two["samples"], strict=True):
        assert (a["position"], a["t"], a["row"]) == (b["position"], b["t"], b["row"])
        assert b["process"] == b["position"] % 2
        assert a["loss"] == b["loss"] == "nan" or a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert all(len(norms["gradient"]) == 2 for norms in two["layers"].values())

    rows = [log(tmp_path / name) for name in ("one", "two")]
    assert [row["train/step"] for row in rows[0]] == [1, 2, 3, 4, 5, 5, 6]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-3 if key.startswith("quick/") else 0, abs=1e-6), key
    for step in (3, 6):
        grids = [directory(tmp_path / n) / "grids" / f"step-{step:08d}.png" for n in ("one", "two")]
        assert all(grid.read_bytes()[:4] == b"\x89PNG" for grid in grids)
    assert not (directory(tmp_path / "two") / "quick").exists()
