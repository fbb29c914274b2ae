"""Training on to a larger budget: a run starts from another that differs in its budget alone.

No schedule knows the end of training, so a run's checkpoint at step n is, bit for bit, that of any longer run there.
Which steps are scored does depend on the budget (fractions of it): a run starts from the longest one whose checkpoints
include all that it must score on the way, and takes those with it. A checkpoint beyond its own end is of no use to it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bench.console import is_main_process, say
from bench.errors import UserError
from bench.files import atomic_write
from bench.training.checkpoints import LAST, SETTINGS, Damaged, checkpoint_path, checkpoints, opened, require_whole

Found = dict[int, Path]  # checkpoints by step


def start_from_other(
    directory: Path, settings: Mapping[str, Any], steps: int, scored: Collection[int], log_every: int
) -> Path | None:
    """Fill a run directory that has no checkpoint from runs of the same settings -> where to start; None: at step 0.

    The first process copies; the others find the same checkpoint, by the same rule, where it was.
    """
    found = _found(directory, settings, steps)
    start = _start(found, scored)
    if start is None:
        return None
    if not is_main_process():
        return found[start]
    taken = sorted({step for step in scored if step < start} | {start})
    folder = directory / "checkpoints"
    filling = folder.with_name(".checkpoints.tmp")
    shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir(parents=True)
    for aside in folder.glob("*"):  # a folder can only take the place of an empty one
        aside.rename(filling / aside.name)
    for step in taken:
        name = checkpoint_path(directory, step).name if step in scored else LAST
        _copy(found[step], filling / name)
    _copy_log(found[start].parent.parent, directory, start, log_every)
    filling.replace(folder)  # in one piece: another process sees nothing or all of it
    say(f"  continuing from {found[start].parent.parent}, step {start}")
    return folder / (checkpoint_path(directory, start).name if start in scored else LAST)


def _found(directory: Path, settings: Mapping[str, Any], steps: int) -> Found:
    """Whole checkpoints of up to `steps` steps of all runs of these settings beside `directory`."""
    found: Found = {}
    for other in sorted(directory.parent.glob(f"{directory.name.rpartition('-')[0]}-????????")):
        for path in checkpoints(other) if other != directory else []:
            try:
                checkpoint = opened(path)
            except (Damaged, UserError):  # for whoever resumes that run
                continue
            if checkpoint.get(SETTINGS) != settings:
                break  # as are all of that run
            if checkpoint["global_step"] <= steps:
                found.setdefault(checkpoint["global_step"], path)
    return found


def _start(found: Found, scored: Collection[int]) -> int | None:
    """The last step for which everything before it that is scored is there; what is not whole is not there."""
    whole: dict[int, bool] = {}

    def usable(step: int) -> bool:
        if step not in whole:
            try:
                require_whole(found[step])
                whole[step] = True
            except (KeyError, Damaged):
                whole[step] = False
        return whole[step]

    for start in sorted(found, reverse=True):
        if usable(start) and all(usable(step) for step in scored if step < start):
            return start
    return None


def _copy(source: Path, target: Path) -> None:
    """A second name for the same file where the disk can: a checkpoint is never changed, only replaced."""
    try:
        os.link(source, target)
    except OSError:
        with atomic_write(target, "wb") as file, source.open("rb") as original:
            shutil.copyfileobj(original, file, 1 << 24)


def _copy_log(source: Path, directory: Path, start: int, log_every: int) -> None:
    """The lines that this run would have written itself; the last one of a run may stand between them."""
    log = source / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    with atomic_write(directory / "metrics.jsonl") as file:
        for line in lines:
            row = json.loads(line) if line.endswith("\n") else {"train/step": start + 1}
            regular = "train/loss" not in row or row["train/step"] % log_every == 0  # or a quick score
            if row["train/step"] <= start and regular:
                file.write(line)
