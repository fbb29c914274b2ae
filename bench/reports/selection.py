"""Stored rows by name: those of a comparison, or of runs that were never in one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.errors import UserError
from bench.registry import nearest
from bench.store import Result, ResultStore
from bench.tables.comparison import require_one_protocol
from bench.tables.stored import compared


class Selection(NamedTuple):
    name: str  # of the comparison, or 'runs'
    results: list[Result]  # of one protocol
    runs: Path  # the directory that holds results.jsonl and the runs


def select(names: Sequence[str], runs: Path) -> Selection:
    """The comparison or sweep of that name, scored last, or several runs, each by its id or its directory.

    Raises: UserError if a name is neither, or the runs share no protocol.
    """
    roots = {Path(name).parent for name in names if "/" in name} or {runs}
    if len(roots) > 1:
        raise UserError(f"Runs lie in {' and '.join(sorted(map(str, roots)))}. Name runs of one directory.")
    (root,) = roots
    stored = ResultStore(root / "results.jsonl").load()
    if not stored:
        raise UserError(f"{root} holds no results.jsonl with scores. Make one with: python -m bench compare <name>")
    if len(names) == 1 and (rows := compared(stored, names[0], root)):
        return Selection(names[0], rows, root)
    run_ids = list(dict.fromkeys(Path(name).name for name in names))
    scored, comparisons = {row.run_id for row in stored}, {row.comparison for row in stored} - {""}
    for run_id in run_ids:
        if run_id in comparisons:
            raise UserError(f"'{run_id}' is a comparison. Name it alone, or name runs.")
        if run_id not in scored:
            known = sorted(scored | comparisons)
            raise UserError(
                f"{root}/results.jsonl has no scores of '{run_id}', as a run or a comparison. {nearest(run_id, known)}"
            )
    return Selection("runs", _one_protocol([row for row in stored if row.run_id in run_ids], run_ids), root)


def _one_protocol(rows: Sequence[Result], run_ids: Sequence[str]) -> list[Result]:
    """Rows of the protocol used last of those that all the runs were scored by, each checkpoint once."""
    protocols: dict[str, list[Result]] = {}
    for row in sorted(rows, key=lambda row: row.created):
        protocols.setdefault(json.dumps(row.protocol, sort_keys=True), []).append(row)
    shared = [alike for alike in protocols.values() if {row.run_id for row in alike} == set(run_ids)]
    if not shared:
        require_one_protocol(rows)
    newest = max(shared, key=lambda alike: alike[-1].created)
    once = {(row.run_id, row.steps, row.weights): row for row in newest}
    ordered = sorted(once.values(), key=lambda row: (run_ids.index(row.run_id), row.steps))
    require_one_protocol(ordered)
    return ordered
