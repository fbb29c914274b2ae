"""Starts the runs of a sweep: as processes of this machine, as SLURM jobs (submitit, the same way), or not at all.

runs/sweep-<name>-<digest>/
  sweep.json             the runs and what they cost
  jobs/<run_id>.json     state of a run's job, the launcher's id for it, the last line of its error
  logs/                  what jobs print, and submitit's files

What a job does stands in bench/sweeps/jobs.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

from bench import registry
from bench.console import progress, say
from bench.errors import UserError
from bench.locks import POLL_S, working
from bench.sweeps.jobs import JobRecord, RunJob
from bench.sweeps.printed import commands, write_config
from bench.sweeps.sweep import PlannedRun, Sweep

UNDER_WAY = ("queued", "running", "preempted")
END_S = 120  # for a job that is asked to stop
FOREVER_MIN = 365 * 24 * 60  # submitit stops local jobs after 2 minutes by default


def launch(sweep: Sweep, launcher: str, *, at_once: int | None = None, retry_failed: bool = False) -> None:
    """Start what is not finished, failed or under way; `local` returns when all of it has ended.

    `at_once` bounds the jobs that run at a time; None: one here, as many as SLURM gives there.

    Raises: UserError if it is below 1; at the end if runs failed, with the last line of each error.
    """
    from bench.sweeps.status import adopt, states

    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once is {at_once}; give at least 1 job that runs at a time.")
    adopt(sweep)
    open_states = ("waiting", "preempted", "cancelled", *(["failed"] if retry_failed else []))
    found = states(sweep)
    todo = {run_id: lines for run_id, lines in sweep.trainings().items() if found[run_id].state in open_states}
    if launcher == "print":
        for lines in todo.values():
            write_config(lines[0])
            print("\n".join(command for line in lines for command in commands(line, lines[0])))
        return
    counts = {state: sum(entry.state == state for entry in found.values()) for state in ("finished", "failed")}
    say(f"{sweep.name}: {len(todo)} of {len(found)} runs to do, {counts['finished']} finished; {sweep.directory}")
    if launcher == "local":
        _run_here(sweep, todo, at_once or 1)
    else:
        _submit(sweep, todo, at_once)
    failed = [entry for entry in states(sweep).values() if entry.state == "failed"]
    if failed:
        errors = "\n".join(f"  {entry.run_id}: {entry.error}" for entry in failed)
        raise UserError(f"{len(failed)} of {len(found)} runs failed; --retry-failed starts them again.\n{errors}")


def cancel(sweep: Sweep, only: Collection[str] = ()) -> int:
    """End the jobs of a sweep that wait or work, all or `only` these run_ids -> how many. What is trained is kept.

    Raises: UserError for a run_id that the sweep does not have.
    """
    from bench.sweeps.status import states

    found, ended = states(sweep), 0
    if unknown := [run_id for run_id in only if run_id not in found]:
        raise UserError(f"{sweep.name} has no run {unknown[0]}. {registry.nearest(unknown[0], list(found))}")
    for run_id, entry in found.items():
        record = JobRecord(sweep.directory, run_id)
        if not entry.alive or entry.state not in UNDER_WAY or (only and run_id not in only):
            continue
        job = _job(sweep, record.read())
        record.write(state="cancelled")
        if job is not None:
            job.cancel(check=False)
        ended += 1
    return ended


def _job(sweep: Sweep, record: dict[str, Any]) -> Any:
    """submitit's handle of a recorded job; None for one that is not started yet."""
    import submitit

    if record.get("launcher") == "slurm":
        return submitit.SlurmJob(sweep.directory / "logs", record["job"])
    return _LocalProcess(int(record["job"])) if record.get("job") else None


class _LocalProcess:
    """The controller process of a local job, which another process started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def cancel(self, check: bool = True) -> None:
        """The controller passes SIGTERM on, and a training finishes its step and saves."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


def _run_here(sweep: Sweep, todo: dict[str, list[PlannedRun]], at_once: int) -> None:
    """At most `at_once` jobs at a time; an interrupt ends them, and the same command goes on."""
    import submitit

    for lines in todo.values():
        if lines[0].processes[0] > 1:
            raise UserError(f"{lines[0].run_id} asks for {lines[0].processes[0]} nodes; this machine is one.")
    (sweep.directory / "logs").mkdir(parents=True, exist_ok=True)
    waiting, working_on = list(todo), dict[str, tuple[Any, int]]()
    slots = list(range(at_once))
    with working(sweep.directory / "launcher.lock") as alone:
        if not alone:
            raise UserError(f"{sweep.directory} is being worked on by another launcher.")
        for run_id in waiting:
            JobRecord(sweep.directory, run_id).write(state="queued", launcher="local", job="", error="")
        bar = progress(total=len(todo), unit="run", desc=sweep.name)
        try:
            while waiting or working_on:
                while waiting and slots:
                    run_id = waiting.pop(0)
                    record = JobRecord(sweep.directory, run_id)
                    if record.read()["state"] == "cancelled":  # by `sweep cancel`
                        bar.update()
                        continue
                    slot = slots.pop(0)
                    executor = submitit.LocalExecutor(sweep.directory / "logs")
                    executor.update_parameters(**_local_parameters(todo[run_id][0], slot))
                    with _outside_job(), _deaf_to_interrupts(), _threads(at_once * todo[run_id][0].processes[1]):
                        job: Any = executor.submit(RunJob(), sweep.directory, run_id)
                    record.write(job=job.job_id)
                    working_on[run_id] = (job, slot)
                time.sleep(POLL_S)
                for run_id, (job, slot) in list(working_on.items()):
                    record = JobRecord(sweep.directory, run_id)
                    if not job.done():
                        if todo[run_id][0].processes[1] > 1 and record.read()["state"] == "failed":
                            job.cancel()  # its other processes wait for the one that failed
                        continue
                    del working_on[run_id]
                    slots.append(slot)
                    bar.update()
                    _conclude(record, run_id, job)
        finally:
            for run_id in (*waiting, *working_on):
                record = JobRecord(sweep.directory, run_id)
                if record.read()["state"] in ("queued", "running"):
                    record.write(state="preempted")
            _end([job for job, _ in working_on.values()])
            bar.close()


def _end(jobs: list[Any]) -> None:
    """Let jobs finish their step and save; kill those that take too long."""
    for job in jobs:
        _LocalProcess(job._process.pid).cancel()
    for job in jobs:
        try:
            job._process.wait(END_S)
        except subprocess.TimeoutExpired:
            job.cancel()
            job._process.wait()


def _conclude(record: JobRecord, run_id: str, job: Any) -> None:
    """Say how a local job ended; one that died without a word is put on record."""
    entry = record.read()
    if entry["state"] in ("queued", "running"):
        record.write(state="failed", error=f"ended without a word; see {job.paths.stderr}")
        entry = record.read()
    say(f"{run_id}: {entry['state']}{': ' + entry['error'] if entry['error'] else ''}")


def _local_parameters(run: PlannedRun, slot: int) -> dict[str, Any]:
    """submitit's settings of a local job; of the jobs that run at a time, number `slot` gets its share of the GPUs."""
    devices = run.processes[1]
    gpus: list[int] = []
    if run.config["trainer"]["accelerator"] != "cpu":
        import torch

        count = torch.cuda.device_count()
        gpus = [(slot * devices + i) % count for i in range(devices)] if count else []
    return {
        "timeout_min": FOREVER_MIN,
        "tasks_per_node": devices,
        "gpus_per_node": len(gpus),
        "visible_gpus": tuple(sorted(set(gpus))),
    }


def _submit(sweep: Sweep, todo: dict[str, list[PlannedRun]], at_once: int | None) -> None:
    """One SLURM array for the runs that ask for the same machines."""
    import submitit

    arrays: dict[tuple[int, int, int], list[str]] = {}
    for run_id, lines in todo.items():
        trainer = lines[0].config["trainer"]
        gpus = 0 if trainer["accelerator"] == "cpu" else trainer["devices"]
        if sweep.slurm.gpus_per_node is not None:
            gpus = sweep.slurm.gpus_per_node
        arrays.setdefault((*lines[0].processes, gpus), []).append(run_id)
    for (nodes, devices, gpus), run_ids in arrays.items():
        try:
            executor = submitit.AutoExecutor(
                sweep.directory / "logs", cluster="slurm", slurm_max_num_timeout=sweep.slurm.max_timeouts
            )
        except RuntimeError as error:
            raise UserError(f"SLURM is not at hand: {error} Use --launcher local or print.") from None
        executor.update_parameters(**_slurm_parameters(sweep, nodes, devices, gpus, at_once))
        records = [JobRecord(sweep.directory, run_id) for run_id in run_ids]
        with _outside_job():
            for record in records:
                record.write(state="queued", launcher="slurm", job="", error="")
            try:
                jobs = executor.map_array(RunJob(), [sweep.directory] * len(run_ids), run_ids)
            except submitit.core.utils.FailedJobError as error:
                for record in records:
                    record.write(state="cancelled")
                raise UserError(f"sbatch refused the jobs: {' '.join(str(error).split())}") from None
        for record, job in zip(records, jobs, strict=True):
            record.write(job=job.job_id)
        say(f"  {len(jobs)} jobs of {nodes} x {devices} processes: array {jobs[0].job_id.partition('_')[0]}")
    say(f"see them with: python -m bench sweep status {sweep.name}")


def _slurm_parameters(sweep: Sweep, nodes: int, devices: int, gpus: int, at_once: int | None) -> dict[str, Any]:
    asked = sweep.slurm
    parameters = {
        "name": f"isodiff-{sweep.name}",
        "timeout_min": asked.timeout_min,
        "nodes": nodes,
        "tasks_per_node": devices,
        "cpus_per_task": asked.cpus_per_task,
        "gpus_per_node": gpus or None,
        "mem_gb": asked.mem_gb,
        "slurm_partition": asked.partition,
        "slurm_account": asked.account,
        "slurm_qos": asked.qos,
        "slurm_constraint": asked.constraint,
        "slurm_setup": asked.setup or None,
        "slurm_array_parallelism": at_once,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # else the other processes wait for one that failed
        "slurm_additional_parameters": {"requeue": True},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def _outside_job() -> AbstractContextManager:
    """Hide the variables of a SLURM job that this process may run in: its own jobs would take them for theirs."""
    import submitit

    return submitit.helpers.clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started in the block do not hear Ctrl-C, which reaches the whole group: `_end` ends them in order."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """Share this machine's cores out while the block lasts, unless OMP_NUM_THREADS says how many each has."""
    if "OMP_NUM_THREADS" in os.environ or processes == 1:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
