"""A sweep on a real SLURM: one run preempted and resumed, one that fails, one short of time, one that just ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from bench.registry import ROOT
from bench.store import ResultStore
from bench.sweeps.jobs import JobRecord
from bench.sweeps.launch import cancel, launch
from bench.sweeps.status import RunState, states
from bench.sweeps.sweep import Sweep, load_sweep

STEPS = 400  # of the run that is preempted: some seconds
SWEEP = """\
# Two DDP jobs of two tasks, two of one.
use: {{model: dit, data: synthetic, recipe: digits, eval: digits}}
model: {{size: T/2, depth: 1}}
recipe: {{batch_size: 8, sampler: {{steps: 2}}}}
eval: {{num_samples: 16, batch_size: 8, extractor: random, metrics: [fid]}}
trainer: {{accelerator: cpu, checkpoint_minutes: 0.01, log_every: 1}}
tracking: "off"
paths: {{runs: {folder}/runs, cache: {folder}/cache}}
equal: none
sweep:
  list:
    - {{seed: 1, trainer.devices: 2, budget.steps: 4, eval.reference: {folder}/missing.npz}}
    - {{seed: 0, trainer.devices: 2, budget.steps: {steps}}}
    - {{seed: 2, budget.steps: 4}}
    - {{seed: 3, budget.steps: 1000000}}
  slurm:
    {{partition: main, timeout_min: 30, cpus_per_task: 1, setup: [export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo]}}
"""


def wait_until(ready: Callable[[], bool], sweep: Sweep, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted((sweep.directory / "logs").glob("*.err")))
            pytest.fail(f"{states(sweep)}\n{logs}")
        time.sleep(0.3)


def train(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "bench", "train", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )


@pytest.mark.slurm
def test_a_sweep_is_preempted_fails_and_is_cancelled(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    file = tmp_path / "four.yaml"
    file.write_text(SWEEP.format(folder=tmp_path, steps=STEPS))
    sweep = load_sweep(str(file))
    failing, preempted, alone, long = sweep.trainings()
    directory = tmp_path / "runs"

    def state(run_id: str) -> RunState:
        return states(sweep)[run_id]

    def job(run_id: str) -> str:
        return JobRecord(sweep.directory, run_id).read()["job"]

    def said(job: str, stream: str) -> str:
        """By the first process of a job, over all its starts."""
        return (sweep.directory / "logs" / f"{job}_0_log.{stream}").read_text()

    launch(sweep, "slurm", at_once=1)  # of each array: one of two tasks, one of one
    wait_until(lambda: state(failing).state == "failed" and state(alone).state == "finished", sweep)
    assert "missing.npz" in state(failing).error
    wait_until(lambda: (directory / preempted / "checkpoints" / "last.ckpt").exists(), sweep)
    assert 0 < state(preempted).steps < STEPS, "it ended before it could be preempted"
    subprocess.run(["sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"], check=True)
    wait_until(lambda: state(preempted).state in ("preempted", "queued"), sweep)
    wait_until(lambda: state(preempted).state == "finished", sweep)
    assert "SIGTERM: finishing this step" in said(job(preempted), "err")
    assert "resuming from" in said(job(preempted), "out")

    # The high job has preempted this one as well.
    wait_until(lambda: state(long).state == "running" and state(long).images_per_s is not None, sweep)
    begin = state(long).steps
    wait_until(lambda: state(long).steps > begin, sweep)
    subprocess.run(["scancel", "--signal=USR2", job(long)], check=True)  # what SLURM sends before a job's time is up
    wait_until(lambda: "SIGUSR2: finishing this step" in said(job(long), "err"), sweep)
    wait_until(lambda: state(long).state in ("preempted", "queued"), sweep)
    reached = torch.load(directory / long / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert reached == state(long).steps
    wait_until(lambda: state(long).state == "running" and state(long).steps > reached, sweep)
    assert "resuming from" in said(job(long), "out")
    assert cancel(sweep, only=[long]) == 1
    wait_until(lambda: not state(long).alive, sweep)
    assert state(long).state == "cancelled"

    (row,) = ResultStore(directory / "results.jsonl").load(run_id=preempted)
    assert (row.comparison, row.world_size, row.steps) == ("four", 2, STEPS)
    train(f"{directory / preempted / 'config.yaml'}", f"paths.runs={tmp_path / 'whole'}")
    a, b = (
        torch.load(root / preempted / "checkpoints" / f"step-{STEPS:08d}.ckpt", weights_only=True)
        for root in (directory, tmp_path / "whole")
    )
    for key in ("state_dict", "current_model_state"):
        for name, value in a[key].items():
            assert torch.equal(value, b[key][name]), f"{key} {name}"
