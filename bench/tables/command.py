"""The command `table`: a comparison or sweep that was run, or a table of a paper; printed, and to W&B if asked."""

from __future__ import annotations

from pathlib import Path

from bench.errors import UserError
from bench.registry import nearest
from bench.store import ResultStore
from bench.tables import comparison as tables
from bench.tables.formats import TableData, render
from bench.tables.paper import paper_table
from bench.tables.specs import is_paper_table, paper_tables
from bench.tables.stored import compared


def print_named(name: str, fmt: str, runs: Path, *, low_confidence: bool = False, wandb: str = "off") -> None:
    """Print the table of that name; `wandb` off | offline | online also logs it.

    Raises: UserError if neither a paper's table nor a stored comparison has that name.
    """
    table = named_table(name, runs, low_confidence)
    print(render(table, fmt).rstrip())
    if wandb != "off":
        log_table(Path(name).stem, table, wandb, runs)


def named_table(name: str, runs: Path, low_confidence: bool = False) -> TableData:
    """A file of configs/table/, or else the comparison of that name that was scored last. Raises: as `print_named`."""
    if is_paper_table(name):
        return paper_table(name, runs, low_confidence)
    stored = ResultStore(runs / "results.jsonl").load()
    results = compared(stored, name, runs)
    if not results:
        known = sorted({row.comparison for row in stored} - {""})
        hint = "" if known else " No comparison is stored; make one with: python -m bench compare <name>"
        raise UserError(
            f"'{name}' is neither a paper's table (configs/table/) nor a comparison in {runs}/results.jsonl. "
            f"{nearest(name, [*paper_tables(), *known])}{hint}"
        )
    if low_confidence:
        raise UserError(f"--low-confidence is for values that papers print; '{name}' is a comparison of runs.")
    return tables.build(results)


def log_table(name: str, table: TableData, mode: str, runs: Path) -> None:
    """The table's CSV rows as a W&B table, in a run of its own."""
    import pandas as pd

    from bench.config import WANDB_PROJECT
    from bench.console import say
    from bench.tracking import Tracker

    directory = runs / "tables" / name
    frame = pd.DataFrame([{key: str(value) for key, value in record.items()} for record in table.records])
    with Tracker(mode, WANDB_PROJECT, directory).run(
        f"table-{name}", group="tables", config={"title": table.title, "notes": list(table.notes)}, job_type="table"
    ) as mirror:
        mirror.log_table("table", frame)
    say(f"W&B: {directory}")
