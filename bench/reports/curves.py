"""What runs share on an axis: checkpoints of equal compute, and the loss along training, from stored files alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.budget import TOLERANCE
from bench.errors import UserError
from bench.store import Result
from bench.tables.formats import number

AXES = {"train_gflops": "training Gflops", "images_seen": "images seen"}  # field of a result and of the log -> title
POINTS = 200  # of a loss curve at most; longer logs are averaged
SMOOTH = 20  # a running mean covers this part of a curve: one 20th
# Of metrics.jsonl, what is no loss: position, rate, gradients and speed.
NOT_LOSSES = ("train/step", "train/lr", "train/grad_norm", "train/images_per_s", "train/gflops_per_s", "train/mfu")


class Level(NamedTuple):
    """Checkpoints that spent alike."""

    title: str  # such as '499.4 to 499.9 training Gflops', or 'untrained'
    rows: dict[str, Result]  # by run_id; a run without a scored checkpoint here is left out


def levels(results: Iterable[Result]) -> list[Level]:
    """Scored checkpoints side by side at equal training Gflops, or at equal images where more of them meet there.

    Equal is what a table may call equal: at most 2 % apart.
    """
    rows = list(results)
    found = [_group(rows, field) for field in AXES]
    return min(found, key=len)


def _group(rows: Sequence[Result], field: str) -> list[Level]:
    groups: list[dict[str, Result]] = []
    for row in sorted(rows, key=lambda row: getattr(row, field)):
        least = getattr(next(iter(groups[-1].values())), field) if groups else None
        if least is None or row.run_id in groups[-1] or getattr(row, field) > least * (1 + TOLERANCE):
            groups.append({})
        groups[-1][row.run_id] = row
    return [Level(_title([getattr(row, field) for row in group.values()], AXES[field]), group) for group in groups]


def _title(spent: Sequence[float], unit: str) -> str:
    if not max(spent):
        return "untrained"
    ends = list(dict.fromkeys((number(min(spent)), number(max(spent)))))
    return f"{' to '.join(ends)} {unit}"


@dataclass(frozen=True)
class LossCurve:
    """Losses along training; a point is the mean of the logged steps first..steps, and lies at the last of them."""

    first: list[int]
    steps: list[int]
    train_gflops: list[float]
    images_seen: list[int]
    losses: dict[str, list[float]]  # by name, such as train/loss: what is minimised


def loss_curves(results: Iterable[Result], runs: Path) -> dict[str, LossCurve]:
    """run_id -> its losses, for the runs whose metrics.jsonl is still there."""
    found = {run_id: read_log(runs / run_id / "metrics.jsonl") for run_id in dict.fromkeys(r.run_id for r in results)}
    return {run_id: thin(log) for run_id, log in found.items() if log}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that hold a loss, [] where there is none; half a line, left by a crash, is skipped.

    Raises: UserError naming the line that cannot be read.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    rows = []
    for k, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {k}: {error}") from None
    return [row for row in rows if "train/loss" in row]


def thin(log: Sequence[dict[str, Any]], points: int = POINTS) -> LossCurve:
    """Means of equally many consecutive lines, at most `points` of them; a log that short stays as it is."""
    size = -(-len(log) // points)
    bins = [log[start : start + size] for start in range(0, len(log), size)]
    logged = set.intersection(*(set(row) for row in log))
    names = [name for name in log[0] if name.startswith("train/") and name in logged - set(NOT_LOSSES)]
    return LossCurve(
        first=[rows[0]["train/step"] for rows in bins],
        steps=[rows[-1]["train/step"] for rows in bins],
        train_gflops=[rows[-1]["train_gflops"] for rows in bins],
        images_seen=[rows[-1]["images_seen"] for rows in bins],
        losses={name: [sum(row[name] for row in rows) / len(rows) for rows in bins] for name in names},
    )


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours on both sides, over one 20th of the curve; fewer towards its ends."""
    n = len(values)
    half = n // SMOOTH // 2
    reaches = [min(half, k, n - 1 - k) for k in range(n)]
    return [sum(values[k - reach : k + reach + 1]) / (2 * reach + 1) for k, reach in enumerate(reaches)]
