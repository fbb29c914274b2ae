"""Training on to a larger budget is training straight to it."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from small_runs import assert_same_training, directory, log, run, start, until, words

from bench.budget import checkpoint_steps
from bench.training.checkpoints import checkpoint_path
from bench.training.continuing import start_from_other


def test_a_larger_budget_goes_on_from_a_smaller_one(tmp_path):
    """Bit for bit what training straight to it gives; the line that ended the smaller run's log is gone."""
    every = [word.replace("log_every=1", "log_every=4") for word in words(tmp_path)]
    run(*every, "budget.steps=6", output=tmp_path / "out.txt")
    small = directory(tmp_path)
    paused = start(*every, "budget.steps=1000", output=tmp_path / "out.txt")
    logs = (tmp_path / "runs").glob
    until(paused, lambda: any(path.read_text().count("\n") > 5 for path in logs("*/metrics.jsonl")))
    os.kill(paused.pid, signal.SIGTERM)
    paused.join()
    (other,) = (path for path in (tmp_path / "runs").iterdir() if path != small and path.is_dir())
    reached = torch.load(other / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    for steps, source, start_step in ((reached + 9, other, reached), (11, small, 6)):
        said = run(*every, f"budget.steps={steps}", output=tmp_path / "out.txt")
        assert f"continuing from {source}, step {start_step}\n" in said
        straight, (continued,) = tmp_path / str(steps), tmp_path.glob(f"runs/*/checkpoints/step-{steps:08d}.ckpt")
        run(*(word.replace(f"{tmp_path}/runs", f"{straight}/runs") for word in every), f"budget.steps={steps}",
            output=tmp_path / "out.txt")  # fmt: skip
        assert_same_training(straight, continued.parent.parent, steps)
    assert torch.load(other / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == reached


@pytest.mark.parametrize("parts", [(1, 2), (2, 1), (4, 2)])
def test_micro_batches_may_change_where_a_run_goes_on(tmp_path, parts):
    """From an odd step, which is no whole number of the new micro-batches counted in the old ones."""
    before, after = (f"trainer.accumulate={part}" for part in parts)
    run(*words(tmp_path, "budget.steps=3", before), output=tmp_path / "out.txt")
    (saved,) = tmp_path.glob("runs/*/checkpoints/step-00000003.ckpt")
    said = run(*words(tmp_path, "budget.steps=6", "eval.checkpoints=2", after), output=tmp_path / "out.txt")
    assert f"continuing from {saved.parent.parent}, step 3" in said
    (continued,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir() and path != saved.parent.parent)
    assert (continued / "checkpoints" / saved.name).read_bytes() == saved.read_bytes()  # not saved again in mid-step
    straight = tmp_path / "straight"
    run(*words(straight, "budget.steps=6", before), output=tmp_path / "out.txt")
    losses = [[row["train/loss"] for row in log(root)] for root in (straight, continued)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[1]) == 6


@pytest.mark.parametrize(
    "there, steps, points, start",
    [
        ({6}, 5, 1, None),  # beyond its end
        ({6}, 6, 1, 6),
        ({4, 6, 9}, 8, 1, 6),
        ({6}, 8, 2, None),  # scores step 4, too
        ({3, 4, 6}, 8, 2, 6),
        ({3, 5, 6}, 8, 2, 3),
        ({2, 4, 8, 16}, 32, 4, 16),  # each scored step of the larger run is one of the smaller
    ],
)
def test_a_run_starts_where_it_has_all_that_it_scores(tmp_path, there, steps, points, start):
    settings, own = {"seed": 0}, tmp_path / "dit-t-2-digits-0000aaaa"
    for step in there:
        path = checkpoint_path(tmp_path / f"dit-t-2-digits-{step:08d}", step)
        path.parent.mkdir(parents=True)
        torch.save({"global_step": step, "isodiff": settings}, path)
    foreign = checkpoint_path(tmp_path / "dit-t-2-digits-0000bbbb", steps)
    foreign.parent.mkdir(parents=True)
    torch.save({"global_step": steps, "isodiff": {"seed": 1}}, foreign)
    scored = checkpoint_steps(steps, points)
    found = start_from_other(own, settings, steps, scored, log_every=1)
    kept = sorted(torch.load(path, weights_only=True)["global_step"] for path in own.glob("checkpoints/*"))
    if start is None:
        assert found is None and kept == []
    else:
        assert torch.load(found, weights_only=True)["global_step"] == start
        assert kept == sorted({step for step in scored if step < start} | {start})
