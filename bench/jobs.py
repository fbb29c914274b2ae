"""A job of a sweep: train one run and score it, with its state on record for whoever looks.

This module loads no torch, so that a job listens to signals before it imports it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bench.console import is_main_process, say
from bench.errors import UserError
from bench.files import atomic_write
from bench.sweep import PlannedRun, read_sweep

if TYPE_CHECKING:
    import submitit

    from bench.store import Result

GRACE_S = 600  # a job that SLURM preempts is killed within this time
LOOK_S = 5  # for which `is_held` of another process may hold a lock at most
POLL_S = 0.2


class RunJob:
    """What a job does: train one run of a stored sweep, then score it by every protocol the sweep has for it."""

    def __call__(self, directory: Path, run_id: str) -> None:
        """Raises: whatever went wrong, after it is on record."""
        record, on_slurm = JobRecord(directory, run_id), "SLURM_JOB_ID" in os.environ
        sweep = read_sweep(directory)
        lines = sweep.trainings()[run_id]
        if not on_slurm:
            _join_processes(lines[0])
        try:
            with working(record.lock, patience_s=LOOK_S) as alone:
                if not alone:
                    raise UserError(f"{run_id} is being trained by another process. Wait for it, or end it.")
                if is_main_process():
                    record.write(state="running", error="")
                run_and_score(sweep.name, lines)
        except (KeyboardInterrupt, SystemExit):
            record.preempt()
            if on_slurm:  # requeued only if SLURM ends it; a job that leaves by itself counts as completed
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
        self.run = directory.parent / run_id / "run.json"
        self.lock = self.run.with_name(".job.lock")  # beside the run: another sweep may have it, too

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def write(self, **values: Any) -> None:
        """Change some values. run.json follows where a training is not under way or finished by its own account."""
        with _alone(self.path.with_suffix(".lock")):  # the launcher notes the job's id while the job may begin
            record = self.read() | values | {"updated": datetime.now(UTC).isoformat(timespec="seconds")}
            with atomic_write(self.path) as file:
                json.dump(record, file)
        state = values.get("state")
        training = json.loads(self.run.read_text()) if self.run.exists() else {}
        if state in ("queued", "failed", "preempted") and training.get("state") != "finished":
            with atomic_write(self.run) as file:
                json.dump(training | {"state": state, "error": record.get("error", "")}, file, indent=2)

    def fail(self, error: BaseException) -> None:
        """By any process: the first one may be waiting for the one that failed."""
        last = traceback.format_exception_only(error)[-1].strip()
        self.write(state="failed", error=str(error) if isinstance(error, UserError) else last)

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
    from bench.train import train

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


@contextmanager
def working(path: Path, patience_s: float) -> Iterator[bool]:
    """Hold a lock file while the block lasts, on the first process -> False if it is still held elsewhere."""
    if not is_main_process():
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with path.open("a") as file:
        while not (held := _try_lock(file)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        yield held


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock file for a moment, on any process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Whether a process of this machine holds that lock file."""
    if not path.exists():
        return False
    with path.open("a") as file:
        return not _try_lock(file)


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
