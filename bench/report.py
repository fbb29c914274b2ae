"""report.html: all of a comparison on one page that needs nothing beside itself."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.files import atomic_write
from bench.formats import TableData, number, score_text
from bench.store import Result
from bench.tables import finals, labels, score_specs


class Setting(NamedTuple):
    """A setting of the recipe or budget, side by side."""

    key: str
    values: list[str]  # one a run

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def write_report(
    path: Path,
    *,
    title: str,
    results: Sequence[Result],
    table: TableData,
    figures: Mapping[str, Path],
    grids: Mapping[str, Path],
    configs: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Write the page. figures: caption -> PNG; grids: model -> PNG of its samples; configs: run_id -> YAML text;
    notes: what is not comparable. A grid that is no longer on disk is said to be missing."""
    names = labels(results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report_template.html").render(
        title=title,
        results=results,
        finals=finals(results),
        names=names,
        table=table,
        figures={caption: _embedded(png) for caption, png in figures.items()},
        grids={model: _embedded(png) if png.exists() else None for model, png in grids.items()},
        specs=score_specs(results[0]),
        protocol=results[0].protocol,
        settings=list(_side_by_side([yaml.safe_load(text) for text in configs.values()])),
        configs=configs,
        notes=notes,
        made_by={
            "git commit": _distinct(row.git_commit for row in results),
            "device": _distinct(row.device for row in results),
            "processes": _distinct(row.world_size for row in results),
            **{name: _distinct(row.versions[name] for row in results) for name in results[0].versions},
            "scored": _distinct((min(row.created for row in results), max(row.created for row in results))),
        },
        number=number,
        score_text=score_text,
    )
    with atomic_write(path) as file:
        file.write(page)


def _embedded(png: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


def _distinct(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _side_by_side(configs: Sequence[Mapping[str, Any]]) -> Iterator[Setting]:
    """Recipe, budget and seed of every run, key by key."""
    flat = [dict(_flatten({key: config[key] for key in ("recipe", "budget", "seed")})) for config in configs]
    for key in dict.fromkeys(key for settings in flat for key in settings):
        yield Setting(key, [settings.get(key, "–") for settings in flat])


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, str(value)
