"""A job of a sweep: train one run and score it, with its state on record for whoever looks.

This module loads no torch, so that a job listens to signals before it imports it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import signals
from bench.console import is_main_process, say
from bench.errors import UserError
from bench.files import atomic_write
from bench.locks import alone, working
from bench.sweeps.sweep import PlannedRun, read_sweep
from bench.training.run_record import RunRecord, sentence

if TYPE_CHECKING:
    import submitit

    from bench.store import Result

GRACE_S = 600  # a job that SLURM preempts is killed within this time


class RunJob:
    """What a job does: train one run of a stored sweep, then score it by every protocol the sweep has for it."""

    def __call__(self, directory: Path, run_id: str) -> None:
        """Raises: whatever went wrong, after it is on record."""
        before = signals.listen(patient=True)  # in place of submitit: training first finishes its step and saves
        record, on_slurm = JobRecord(directory, run_id), "SLURM_JOB_ID" in os.environ
        try:
            sweep = read_sweep(directory)
            lines = sweep.trainings()[run_id]
            if not on_slurm:
                if record.read()["state"] in ("cancelled", "preempted"):  # before it could listen
                    raise signals.Stopped
                _join_processes(lines[0])
            with working(record.lock) as free:
                if not free:
                    raise UserError(f"{run_id} is being trained by another process. Wait for it, or end it.")
                if is_main_process():
                    record.write(state="running", error="")
                run_and_score(sweep.name, lines)
        except (KeyboardInterrupt, SystemExit):
            record.preempt()
            if on_slurm:
                if (signum := signals.asked()) == signal.SIGUSR2:  # the time is nearly up
                    before[signum](signum, None)  # submitit requeues the job, on the first process
                # Requeued only if SLURM ends it; a job that leaves by itself counts as completed.
                time.sleep(GRACE_S)
            raise
        except BaseException as error:
            record.fail(error)
            raise
        if is_main_process():
            record.write(state="finished", error="")

    def checkpoint(self, directory: Path, run_id: str) -> submitit.helpers.DelayedSubmission:
        """submitit's hook at a time limit: the same job again, which goes on from the newest checkpoint."""
        import submitit

        JobRecord(directory, run_id).preempt()
        return submitit.helpers.DelayedSubmission(self, directory, run_id)


class JobRecord:
    """jobs/<run_id>.json: what the launcher and the job itself say of it."""

    def __init__(self, directory: Path, run_id: str) -> None:
        self.path = directory / "jobs" / f"{run_id}.json"
        self.run = RunRecord(directory.parent / run_id)
        self.lock = self.run.path.with_name(".job.lock")  # beside the run: another sweep may have it, too

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, **values: Any) -> None:
        """Change some values. run.json follows where its training is neither under way nor finished."""
        with alone(self.path.with_suffix(".lock")):  # the launcher notes the job's id while the job may begin
            record = self.read() | values | {"updated": datetime.now(UTC).isoformat(timespec="seconds")}
            with atomic_write(self.path) as file:
                json.dump(record, file)
        state = "preempted" if values.get("state") == "cancelled" else values.get("state")
        known = self.run.read()
        if state == "failed" and self.run.alive():
            return  # this job was refused as another process trains the run
        if state in ("queued", "failed", "preempted") and known.get("state") != "finished":
            if state == "preempted" and not known:
                return  # cancelled before anything was done
            self.run.write(state, error=record.get("error", ""))

    def fail(self, error: BaseException) -> None:
        """By any process: the first one may be waiting for the one that failed."""
        self.write(state="failed", error=sentence(error))

    def preempt(self) -> None:
        """Interrupted, to go on. A process that is ended because another one failed leaves that on record."""
        if self.read().get("state") == "running" and is_main_process():
            self.write(state="preempted")


def run_and_score(name: str, lines: Sequence[PlannedRun]) -> list[Result]:
    """Train the run of these lines, unless it is trained, and score it by each of their protocols."""
    from bench.config import WANDB_PROJECT, build_run
    from bench.evaluate import evaluate, score_line, scorer_of
    from bench.prepare import prepare_data
    from bench.tracking import Tracker
    from bench.training.train import train

    configs = [build_run([("sweep.json", line.config)]) for line in lines]
    first = configs[0]
    # Jobs of a sweep want the same latents and references at the same time: one makes them, the others wait.
    with working(Path(first.paths.cache) / f"{first.use.data}.lock", patience_s=math.inf):
        data = prepare_data(first)
        scorers = [scorer_of(config) for config in configs]
    tracker = Tracker(first.tracking, WANDB_PROJECT, first.directory)
    train(first, data, tracker, group=name)
    results = []
    for config, line, scorer in zip(configs, lines, scorers, strict=True):
        for step in line.scored_steps:
            results.append(evaluate(config, step, comparison=name, data=data, scorer=scorer))
            say(f"{config.run_id}, step {step}: {score_line(results[-1])}")
    with tracker.run(first.run_id, group=name, config={}, job_type="train") as mirror:
        for row in results:
            mirror.log({"train/step": row.steps, "train_gflops": row.train_gflops, **row.scores})
    return results


def _join_processes(run: PlannedRun) -> None:
    """Tell Lightning of the other processes of a local job, which submitit has started."""
    if run.processes[1] > 1:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["NODE_RANK"] = "0"
