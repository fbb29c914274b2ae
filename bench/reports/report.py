"""report.html: all of a comparison on one page that needs nothing beside itself, made from stored results alone.

Without scripts it shows every table, picture and fact; with them tables sort, curves answer and samples slide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench import budget as budgets
from bench.dotted import flatten
from bench.errors import UserError
from bench.files import atomic_write
from bench.reports.curves import levels, loss_curves
from bench.reports.data import (
    checkpoint_sheet,
    cost_sheet,
    data_uri,
    page_data,
    picture,
    score_sheet,
    script_json,
)
from bench.reports.facts import NOTES, commands, made_by, protocol_facts
from bench.reports.selection import select
from bench.store import Result
from bench.tables import comparison as tables

HERE = Path(__file__).parent


class Setting(NamedTuple):
    """A setting of the recipe or budget, side by side."""

    key: str
    values: list[str]  # one a run

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def write_report(path: Path, *, name: str, results: Sequence[Result], runs: Path, command: str = "") -> None:
    """Write the page of a comparison, or of any runs of one protocol.

    name: of the comparison; runs: the directory that the results lie in, where the configurations, logs and sample
    grids of the runs are found, too; what is no longer there is said to be missing. command: how to repeat it all.
    Raises: UserError if the protocols differ.
    """
    from bench.reports.figures import grid_of, loss_against_compute, score_against_compute  # matplotlib loads here
    from bench.reports.plotting import STYLES, png

    table, names, finals = tables.build(results), tables.labels(results), tables.finals(results)
    specs, losses = tables.score_specs(results[0]), loss_curves(results, runs)
    configs = {run_id: text for run_id in names if (text := _text(runs / run_id / "config.yaml"))}
    figures = {"score": png(score_against_compute(results, next(iter(specs))))}
    if losses:
        figures["loss"] = png(loss_against_compute(losses, names))
    equal = _equal(finals)
    compared = len(finals) > 1
    template = _environment().get_template("template.html")
    page = template.render(
        title=f"{name}: {', '.join(names.values())}{f' at equal {equal}' if equal and compared else ''}",
        verdict=table.notes[0] if compared else "",
        unequal=compared and not equal,
        notes=table.notes[1:] if compared else table.notes,
        score_sheet=score_sheet(table, specs),
        checkpoint_sheet=checkpoint_sheet(results, names, specs),
        cost_sheet=cost_sheet(finals, names),
        figures={kind: data_uri(content, "png") for kind, content in figures.items()},
        column=next(iter(specs)),
        levels=[
            (level.title, {run_id: picture(grid_of(row, runs)) for run_id, row in level.rows.items()})
            for level in levels(results)
        ],
        names=names,
        protocol=protocol_facts(results[0].protocol),
        balanced=results[0].protocol["labels"] == "balanced",
        settings=list(_side_by_side([yaml.safe_load(text) for text in configs.values()])),
        configs=configs,
        limits=NOTES,
        made_by=made_by(results, runs),
        commands=commands(name, results, configs, command),
        data=script_json(page_data(results, names, specs, losses, STYLES)),
    )
    with atomic_write(path) as file:
        file.write(page)


def write_stored(names: Sequence[str], path: Path, runs: Path) -> None:
    """The command `report`: the page of stored results. Raises: UserError, as `select`, or if `path` is no .html."""
    if path.suffix.lower() != ".html":
        raise UserError(f"--out {path}: the report is a page; end the name in .html.")
    selection = select(names, runs)
    write_report(path, name=selection.name, results=selection.results, runs=selection.runs)
    print(path)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["inline"] = lambda file: (HERE / file).read_text()
    return environment


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _equal(rows: Sequence[Result]) -> str:
    """What final rows spent alike, as a table may call it: 'training Gflops', 'images seen' or ''."""
    for field, title in (("train_gflops", "training Gflops"), ("images_seen", "images seen")):
        spent = [getattr(row, field) for row in rows]
        if min(spent) > 0 and budgets.spread(spent) <= budgets.TOLERANCE:
            return title
    return ""


def _side_by_side(configs: Sequence[Mapping[str, Any]]) -> Iterator[Setting]:
    """Recipe, budget and seed of every run, key by key."""
    flat = [flatten({key: config[key] for key in ("recipe", "budget", "seed")}) for config in configs]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        yield Setting(key, [str(settings.get(key, "–")) for settings in flat])
