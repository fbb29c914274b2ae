"""Where the runs of a sweep are: from small files alone, without torch."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import registry
from bench.errors import UserError
from bench.locks import is_held
from bench.store import Result, ResultStore
from bench.sweeps.jobs import JobRecord
from bench.sweeps.sweep import PlannedRun, Sweep, stored_sweeps
from bench.training.run_record import RunRecord

TAIL_BYTES = 4096  # of metrics.jsonl; more than one line


@dataclass(frozen=True)
class RunState:
    """One training of a sweep and its scores."""

    run_id: str
    state: str  # waiting | queued | running | finished | failed | preempted | cancelled
    alive: bool  # a job waits for it or works on it
    error: str
    steps: int  # done
    images_per_s: float | None
    seconds_left: float | None  # of training
    score: str  # the latest, such as "fid 12.3 at step 500"


def find(name: str, root: str = "runs") -> Sweep:
    """The sweep of that name, or in that directory, looked at last. Raises: UserError if there is none."""
    if (Path(name) / "sweep.json").exists():
        from bench.sweeps.sweep import read_sweep

        return read_sweep(Path(name))
    stored = stored_sweeps(Path(name).stem, root)
    if not stored:
        known = sorted({path.parent.name[6:-9] for path in Path(root).glob("sweep-*/sweep.json")})
        hint = (
            registry.nearest(Path(name).stem, known)
            if known and "/" not in name
            else f"Start one with: python -m bench sweep {name}"
        )
        raise UserError(f"{root} has no sweep {name}. {hint}")
    return stored[0]


def states(sweep: Sweep) -> dict[str, RunState]:
    """The state of each training, by run_id."""
    rows: dict[str, list[Result]] = {}
    for row in ResultStore(Path(sweep.root) / "results.jsonl").load():
        rows.setdefault(row.run_id, []).append(row)
    records = {run_id: JobRecord(sweep.directory, run_id) for run_id in sweep.trainings()}
    read = {run_id: record.read() for run_id, record in records.items()}
    queue = _queue() if any(record.get("launcher") == "slurm" for record in read.values()) else {}
    launching = is_held(sweep.directory / "launcher.lock")
    found = {}
    for run_id, lines in sweep.trainings().items():
        record = read[run_id]
        if record.get("launcher") == "slurm":
            job = queue.get(record["job"], "")
        else:
            waits = launching and record.get("state") == "queued"
            works = is_held(records[run_id].lock) or (not record and records[run_id].run.alive())
            job = "RUNNING" if works else "PENDING" if waits else ""
        found[run_id] = _state(sweep, lines, record, job, rows.get(run_id, []))
    return found


def _state(sweep: Sweep, lines: list[PlannedRun], record: dict[str, Any], job: str, rows: list[Result]) -> RunState:
    directory = Path(sweep.root) / lines[0].run_id
    training = RunRecord(directory).read()
    known = record or training
    state, error = known.get("state", "waiting"), known.get("error", "")
    scored = all(is_scored(line, rows) for line in lines)
    if training.get("state") == "finished" and scored:
        state, error = "finished", ""
    elif not record and state == "finished":  # trained by hand
        state = "waiting"
    elif state in ("finished", "queued", "running") and not job:
        # Its job is gone: killed, or its results were deleted.
        state = "waiting" if state == "finished" else "preempted"
    elif state == "preempted" and job == "PENDING" and record.get("launcher") == "slurm":
        state = "queued"
    last = _last_line(directory / "metrics.jsonl")
    steps = lines[0].steps if training.get("state") == "finished" else last.get("train/step", 0)
    rate = last.get("train/images_per_s") if state == "running" else None
    left = (lines[0].images - last.get("images_seen", 0)) / rate if rate else None
    return RunState(lines[0].run_id, state, bool(job), error, steps, rate, left, _score(rows))


def is_scored(line: PlannedRun, rows: Sequence[Result]) -> bool:
    """Whether every step that a line scores has a row of its protocol."""
    done = {row.steps for row in rows if line.protocol.items() <= row.protocol.items()}
    return done >= set(line.scored_steps)


def adopt(sweep: Sweep) -> None:
    """Rows of a sweep's runs that were scored by hand, or for another sweep, join its table."""
    store = ResultStore(Path(sweep.root) / "results.jsonl")
    rows: dict[str, list[Result]] = {}
    for row in store.load():
        rows.setdefault(row.run_id, []).append(row)
    for line in sweep.runs:
        mine = [row for row in rows.get(line.run_id, []) if line.protocol.items() <= row.protocol.items()]
        own = {row.steps for row in mine if row.comparison == sweep.name}
        for row in {row.steps: row for row in mine}.values():
            if row.steps in line.scored_steps and row.steps not in own:
                store.append(replace(row, comparison=sweep.name))


def table(sweep: Sweep) -> str:
    """State, steps, rate, time left, score and settings of each training."""
    found = states(sweep)
    line = "{:<9} {:>15} {:>9} {:>8}  {:<26} {:<38} {}".format
    lines = [line("state", "steps", "images/s", "left", "score", "run", "settings, error")]
    for run_id, runs in sweep.trainings().items():
        entry = found[run_id]
        rate = f"{entry.images_per_s:.4g}" if entry.images_per_s else "-"
        what = " | ".join(run.label for run in runs) + (f": {entry.error}" if entry.error else "")
        steps = f"{entry.steps}/{runs[0].steps}"
        lines.append(line(entry.state, steps, rate, _clock(entry.seconds_left), entry.score or "-", run_id, what))
    counts = Counter(entry.state for entry in found.values())
    lines.append(f"{len(found)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.most_common()))
    return "\n".join(lines)


def _queue() -> dict[str, str]:
    """SLURM's state, PENDING or RUNNING, of each job of this user that waits or works, by '<array>_<index>'."""
    command = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%F_%K %i %T"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"squeue does not answer ({error}), so the state of the jobs is not known.") from None
    queue = {}
    for text in out.splitlines():
        array, job, state = text.split()
        if state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            queue[array] = queue[job] = state
    return queue


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a JSONL file; empty if there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    return json.loads(lines[-1]) if lines else {}


def _score(rows: Sequence[Result]) -> str:
    if not rows:
        return ""
    name, value = next(iter(rows[-1].scores.items()))
    return f"{name} {value:.4g}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
