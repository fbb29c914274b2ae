"""A paper's table again: its printed values with their sources, what IsoDiff counts, and rows of ours beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.metrics import METRICS
from bench.store import Result, ResultStore
from bench.tables.comparison import describe_protocol
from bench.tables.counted import counted
from bench.tables.formats import Cell, TableData, number, score_text
from bench.tables.own_rows import MATCHED, SCORES, OwnRow, decimals, find_own
from bench.tables.printed_cells import (
    UNCONFIRMED,
    Marks,
    Value,
    main_source,
    printed_rows,
    printed_text,
    printed_values,
)
from bench.tables.published import TOTAL_TOLERANCE, VALUES, Published, deviating_totals, total_deviation
from bench.tables.specs import COLUMNS, Place, TableSpec, load_table

GFLOPS_NOTE = (
    "Gflops: 1e9 multiply-adds of one unguided forward of one image, backbone only; counted: by IsoDiff, in brackets "
    "without S4D kernels and FFTs, which the papers' counters do not see. Gflops × images: the papers' total over "
    "training, without a factor for the backward pass; of ours, by what is counted."
)
DIFFERENCE_NOTE = (
    "Less printed: ± is the half width of the 95 % interval over the drawing of our samples (delete-a-group jackknife; "
    "shares of samples: binomial); papers state none, and neither training seeds nor references are in it."
)


def build(spec: TableSpec, results: Sequence[Result], runs: Path, low_confidence: bool = False) -> TableData:
    """The table: printed rows (†) in their order, each followed by those of ours and what they are off by."""
    own, strangers = find_own(spec, results, runs)
    marks, grid, records, used = Marks(), [], [], list[Published]()
    for place in spec.rows:
        rows = printed_rows(spec, place, low_confidence)
        values = printed_values(rows)
        used += rows
        if spec.sources:
            grid.append(_printed_line(spec, place, values, marks, low_confidence))
            records.append(_printed_record(spec, place, values))
        else:
            grid.append(_planned_line(spec, place))
            records.append(_record(spec, place, "planned"))
        for row in (row for row in own if row.place is place):
            grid.append(_own_line(spec, row))
            records.append(_own_record(spec, row, values))
            if any(key in values for key in SCORES):
                grid.append(_difference_line(spec, row, values))
    header = ("model", *(_title(key) for key in spec.columns))
    notes = _notes(spec, marks, used, own, strangers)
    return TableData(header, tuple(grid), notes, tuple(records), f"{spec.title} ({spec.paper})")


def paper_table(name: str, runs: Path, low_confidence: bool = False) -> TableData:
    """The table of configs/table/<name>.yaml with the results stored in `runs`."""
    results = ResultStore(runs / "results.jsonl").load()
    return build(load_table(name), results, runs, low_confidence)


def _title(key: str) -> str:
    direction = "" if key not in SCORES else " ↑" if METRICS[key].higher_is_better else " ↓"
    return COLUMNS[key] + direction


def _printed_line(
    spec: TableSpec, place: Place, values: Mapping[str, Value], marks: Marks, low: bool
) -> tuple[Cell, ...]:
    shown = {key: value for key, value in values.items() if key in spec.columns}
    main = main_source(spec, shown)
    label = f"{place.model} †" + (marks.source(main) if main not in (None, spec.sources[0]) else "")
    cells = [Cell(label)]
    for key in spec.columns:
        if key in VALUES:
            cells.append(Cell(printed_text(spec, place, key, values.get(key), main, marks, low)))
        else:
            cells.append(Cell(_plain(spec, place, key)))
    return tuple(cells)


def _plain(spec: TableSpec, place: Place, key: str) -> str:
    """A cell of a column that is not a printed value."""
    if key == "guidance":
        return "–" if place.guidance == "none" else f"{place.guidance} {place.scale}".strip()
    if key == "counted":
        return _counted_text(spec, place)
    return str(getattr(place, key) or "–")


def _counted_text(spec: TableSpec, place: Place) -> str:
    if place.run is None:
        return "–"
    cost = counted(spec.runs[place.run])
    return _with_weights(cost.gflops, cost.gflops_weights)


def _with_weights(gflops: float, weights: float) -> str:
    """'285.1 (276)': all, and without S4D kernels and FFTs where that is less."""
    return number(gflops) if abs(weights / gflops - 1) < 1e-6 else f"{number(gflops)} ({number(weights)})"


def _planned_line(spec: TableSpec, place: Place) -> tuple[Cell, ...]:
    """A row of a sweep: what it will cost; its scores stand in the rows of ours."""
    run = spec.runs[place.model]
    cost = counted(run)
    images = run.images(cost.gflops)
    known = {
        "params_m": number(cost.params_m),
        "images_m": number(images / 1e6),
        "counted": _with_weights(cost.gflops, cost.gflops_weights),
        "train_gflops_papers": number(cost.gflops * images),
    }
    return (Cell(place.model), *(Cell(known.get(key, "–")) for key in spec.columns))


def _own_line(spec: TableSpec, row: OwnRow) -> tuple[Cell, ...]:
    result = row.result
    weights = result.gflops - result.gflops_parts["ssm_kernel"] - result.gflops_parts["fft"]
    known = {
        "data": row.place.data,
        "resolution": str(row.place.resolution),
        "variant": row.place.variant or "–",
        "guidance": "–" if row.place.cfg_scale == 1 else f"cfg {row.place.cfg_scale:g}",
        "sampler": f"{result.protocol['sampler_steps']} {result.protocol['sampler']}",
        "params_m": number(result.params_m),
        "images_m": number(result.images_seen / 1e6),
        "gflops": "–",
        "counted": _with_weights(result.gflops, weights),
        "train_gflops_papers": number(result.train_gflops_papers),
    }
    for key in SCORES:
        value, ci95 = row.score(key) or (None, None)
        known[key] = score_text(value, ci95, decimals(key))
    return (Cell(f"{row.place.model}, {row.origin} (seed {result.seed})"), *(Cell(known[key]) for key in spec.columns))


def _difference_line(spec: TableSpec, row: OwnRow, values: Mapping[str, Value]) -> tuple[Cell, ...]:
    cells = [Cell(f"{row.place.model}, {row.origin} less printed")]
    for key in spec.columns:
        difference = _difference(row, key, values)
        cells.append(Cell("" if difference is None else "{:+.{d}f} ± {:.{d}f}".format(*difference, d=decimals(key))))
    return tuple(cells)


def _difference(row: OwnRow, key: str, values: Mapping[str, Value]) -> tuple[float, float] | None:
    """(ours less printed, half width of the 95 % interval of ours)."""
    score = row.score(key) if key in SCORES and key in values else None
    return None if score is None else (score[0] - float(values[key].text), score[1])


def _record(spec: TableSpec, place: Place, kind: str) -> dict[str, Any]:
    """A line of the CSV, with every column that some line has."""
    identity = {"row": kind, "model": place.model, "data": place.data, "resolution": place.resolution}
    identity |= {
        "variant": place.variant or "",
        "guidance": place.guidance,
        "scale": place.scale,
        "run_id": "",
        "seed": "",
    }
    costs = {key: "" for key in VALUES if key not in SCORES}
    scores = {f"{key}{end}": "" for key in SCORES for end in ("", "_ci95", "_less_printed")}
    cost = counted(spec.runs[place.run]) if place.run else None
    counts = {
        "gflops_counted": cost.gflops if cost else "",
        "gflops_counted_weights": cost.gflops_weights if cost else "",
    }
    return identity | costs | counts | scores | {"sources": "", "unconfirmed": "", "derived": ""}


def _printed_record(spec: TableSpec, place: Place, values: Mapping[str, Value]) -> dict[str, Any]:
    sources: dict[str, list[str]] = {}
    for key, value in values.items():
        sources.setdefault(value.source, []).append(key)
    return (
        _record(spec, place, "printed")
        | {key: value.text for key, value in values.items()}
        | {
            "sources": "; ".join(f"{' '.join(keys)}: {source}" for source, keys in sources.items()),
            "unconfirmed": " ".join(key for key, value in values.items() if value.low),
            "derived": " ".join(key for key, value in values.items() if value.derived),
        }
    )


def _own_record(spec: TableSpec, row: OwnRow, values: Mapping[str, Value]) -> dict[str, Any]:
    result = row.result
    record = _record(spec, row.place, row.origin) | {
        "scale": f"{row.place.cfg_scale:g}",
        "run_id": result.run_id,
        "seed": result.seed,
        "params_m": result.params_m,
        "images_m": result.images_seen / 1e6,
        "gflops_counted": result.gflops,
        "train_gflops_papers": result.train_gflops_papers,
    }
    for key in SCORES:
        if (score := row.score(key)) is not None:
            difference = _difference(row, key, values)
            record |= {key: score[0], f"{key}_ci95": score[1]}
            record[f"{key}_less_printed"] = "" if difference is None else difference[0]
    return record


def _notes(
    spec: TableSpec, marks: Marks, used: list[Published], own: list[OwnRow], strangers: list[str]
) -> tuple[str, ...]:
    notes = (
        [f"† As printed in {spec.sources[0]}" + (" unless a letter says where else." if marks.sources else ".")]
        if (spec.sources)
        else []
    )
    notes += marks.notes()
    if any(row.confidence == "low" for row in used):
        notes.append(f"{UNCONFIRMED} Not confirmed against the print.")
    notes += [*spec.notes, *_totals(used)]
    if {"gflops", "counted", "train_gflops_papers"} & set(spec.columns):
        notes.append(GFLOPS_NOTE)
    if own:
        protocols = [{key: value for key, value in row.result.protocol.items() if key != "cfg_scale"} for row in own]
        described = dict.fromkeys(map(describe_protocol, protocols))
        notes += [MATCHED, *([DIFFERENCE_NOTE] if spec.sources else []), *described]
    elif spec.runs:
        notes.append(f"No row of ours is stored yet; what they cost: python -m bench plan {spec.name}")
    notes += strangers
    return tuple(notes)


def _totals(used: list[Published]) -> list[str]:
    """Whether printed totals are images x Gflops, row by row."""
    checked = [row for row in used if total_deviation(row) is not None]
    off = deviating_totals(checked)
    if not checked:
        return []
    if not off:
        return [f"Every printed total is images × Gflops within {100 * TOTAL_TOLERANCE:g} %."]
    named = "; ".join(f"{row.model} at {row.resolution} by {100 * (total_deviation(row) or 0):+.1f} %" for row in off)
    return [f"Printed totals are images × Gflops within {100 * TOTAL_TOLERANCE:g} %, but for {named}."]
