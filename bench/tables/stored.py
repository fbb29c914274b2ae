"""Stored rows by the name they were scored under: of a comparison or a sweep, those of the last one of that name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import budget as budgets
from bench.store import Result
from bench.sweeps.sweep import stored_sweeps
from bench.tables.comparison import SPENT, finals


def compared(stored: Sequence[Result], name: str, runs: Path) -> list[Result]:
    """The rows of the comparison or sweep `name` scored last, of those in the directory `runs`; [] if there is none."""
    rows = [row for row in stored if row.comparison == name]
    if not rows:
        return []
    newest = max(rows, key=lambda row: row.created)
    for sweep in stored_sweeps(name, runs):
        trainings = sweep.trainings()
        if newest.run_id in trainings:
            return [row for row in rows if row.run_id in trainings and row.protocol == newest.protocol]
    return latest(rows)


def latest(results: Sequence[Result]) -> list[Result]:
    """Of rows that share a comparison's name, those of the one scored last: its protocol, recipe, seed and budget.

    Rows with other settings on top of that recipe stay: their names tell them apart.
    """
    newest = max(results, key=lambda row: row.created)

    def shared(row: Result) -> tuple[Any, ...]:
        return row.protocol, row.data, row.recipe, row.batch_size, row.seed

    alike = [row for row in results if shared(row) == shared(newest)]
    last = {row.run_id: row for row in finals(alike)}
    groups = []
    for field in SPENT.values():
        spent = getattr(last[newest.run_id], field)
        near = budgets.TOLERANCE * spent
        groups.append({run_id for run_id, row in last.items() if abs(getattr(row, field) - spent) <= near})
    runs = max(groups, key=len)
    return [row for row in alike if row.run_id in runs]
