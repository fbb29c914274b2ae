"""What the report shows, ready for its template: tables whose cells know their values, curves as JSON, pictures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from bench.metrics import MetricSpec
from bench.reports.curves import AXES, LossCurve, running_mean
from bench.store import Result
from bench.tables.comparison import COSTS
from bench.tables.formats import TableData, number, score_text

LARGE = 400_000  # bytes of a PNG above which a page shows a smaller JPEG in its place
SIDE = 1200  # pixels of that JPEG's longer side


class Column(NamedTuple):
    title: str
    first: str = "ascending"  # order at the first click: the best first


class Value(NamedTuple):
    text: str
    value: float | str | None = None  # what is sorted by: a number, "" where there is none, None: the text
    bold: bool = False


class Sheet(NamedTuple):
    """A table that can be sorted; the first cell of a row names it."""

    columns: list[Column]
    rows: list[list[Value]]


class Picture(NamedTuple):
    uri: str  # data:image/...
    width: int  # of the image as stored, pixels
    height: int
    smaller: bool  # than stored


def score_sheet(table: TableData, specs: Mapping[str, MetricSpec]) -> Sheet:
    """The comparison's table as it is printed, with the full values of its records to sort by."""
    keys = {title: key for key, title in COSTS.items()}
    first = {}
    for name, spec in specs.items():
        for prefix, key in (("", name), ("untrained ", f"untrained_{name}")):
            title = f"{prefix}{name} {'↑' if spec.higher_is_better else '↓'}"
            keys[title], first[title] = key, _best_first(spec)
    rows = [
        [
            Value(cell.text, _sorted_by(record[keys[title]]) if title in keys else None, cell.bold)
            for title, cell in zip(table.header, row, strict=True)
        ]
        for row, record in zip(table.rows, table.records, strict=True)
    ]
    return Sheet([Column(title, first.get(title, "ascending")) for title in table.header], rows)


def checkpoint_sheet(results: Sequence[Result], names: Mapping[str, str], specs: Mapping[str, MetricSpec]) -> Sheet:
    """Every scored checkpoint with every score."""
    spent = {"steps": "steps", **AXES, "train_gflops_papers": "Gflops × images"}
    columns = [Column("model"), Column("weights"), *map(Column, spent.values())]
    columns += [Column(name, _best_first(spec)) for name, spec in specs.items()]
    rows = []
    for row in results:
        cells = [Value(names[row.run_id]), Value(row.weights)]
        cells += [_number(getattr(row, field)) for field in spent]
        for name, spec in specs.items():
            text = score_text(row.scores[name], row.ci95[name], spec.decimals)
            cells.append(Value(text, _sorted_by(row.scores[name])))
        rows.append(cells)
    return Sheet(columns, rows)


def cost_sheet(rows: Sequence[Result], names: Mapping[str, str]) -> Sheet:
    """What the runs cost, and on what; rows: the last checkpoint of each run."""
    parts = list(rows[0].gflops_parts)
    titles = ["model", "run", "Gflops", *(part.replace("_", " ") for part in parts), "sample Gflops"]
    titles += ["training seconds", "device", "processes"]
    cells = [
        [
            Value(names[row.run_id]),
            Value(row.run_id),
            *map(_number, (row.gflops, *(row.gflops_parts[part] for part in parts), row.sample_gflops)),
            _number(row.train_seconds),
            Value(row.device),
            _number(row.world_size),
        ]
        for row in rows
    ]
    return Sheet([Column(title) for title in titles], cells)


def _best_first(spec: MetricSpec) -> str:
    return "descending" if spec.higher_is_better else "ascending"


def _number(value: float) -> Value:
    return Value(number(value), _sorted_by(value))


def _sorted_by(value: float | None) -> float | str:
    return value if value is not None and math.isfinite(value) else ""


def page_data(
    results: Sequence[Result],
    names: Mapping[str, str],
    specs: Mapping[str, MetricSpec],
    losses: Mapping[str, LossCurve],
    styles: Sequence[tuple[str, str, str]],
) -> dict[str, Any]:
    """What the page's curves are drawn from: the stored rows whole, and the losses. styles: (colour, marker, line)."""
    dashes = {"-": "", "--": "7 4", "-.": "8 3 2 3", ":": "2 3"}
    runs = []
    for k, (run_id, label) in enumerate(names.items()):
        colour, marker, line = styles[k % len(styles)]
        shown = "currentColor" if colour == "#000000" else colour  # black would not be seen in dark mode
        runs.append({"run_id": run_id, "label": label, "colour": shown, "marker": marker, "dash": dashes[line]})
    scores = [
        {
            "name": name,
            "title": f"{name} ({'higher' if spec.higher_is_better else 'lower'} is better)",
            "decimals": spec.decimals,
        }
        for name, spec in specs.items()
    ]
    loss_names = dict.fromkeys(name for curve in losses.values() for name in curve.losses)
    shared = [name for name in loss_names if all(name in curve.losses for curve in losses.values())]
    return {
        "runs": runs,
        "axes": AXES,
        "scores": scores,
        "results": [row.to_dict() for row in results],
        "loss_names": [{"name": name, "title": name.removeprefix("train/")} for name in shared],
        "losses": {
            run_id: asdict(curve) | {"smooth": {name: running_mean(values) for name, values in curve.losses.items()}}
            for run_id, curve in losses.items()
        },
    }


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no sign in it can end the element, and what is no finite number
    is null. Floats keep every digit."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture(path: Path) -> Picture | None:
    """The PNG at `path` for embedding, as it is or as a smaller JPEG where it is large; None if it is gone."""
    if not path.is_file():
        return None
    stored = path.read_bytes()
    with Image.open(path) as image:
        width, height = image.size
        if len(stored) <= LARGE:
            return Picture(data_uri(stored, "png"), width, height, smaller=False)
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, format="JPEG", quality=85)
    return Picture(data_uri(out.getvalue(), "jpeg"), width, height, smaller=True)


def data_uri(content: bytes, kind: str) -> str:
    """An image in the page itself; kind: png | jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def distinct(values: Iterable[Any]) -> str:
    """The different values in order, as text."""
    return ", ".join(dict.fromkeys(map(str, values)))
