"""The table of a comparison: one row per model at its last checkpoint, every score with its interval and protocol.

`build` refuses rows of different protocols. The formats differ in markup, never in what they say.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import budget as budgets
from bench.errors import UserError
from bench.metrics import FEW, METRICS, MetricSpec, column
from bench.store import Result, SampleSetScore
from bench.tables.formats import Cell, TableData, number, score_text
from bench.tables.formats import render as render  # part of this module's interface, as is terminal
from bench.tables.formats import terminal as terminal

SPENT = {"train_gflops": "train_gflops", "images": "images_seen"}  # what rows can spend alike -> field of a result
COSTS = {  # CSV column -> title; the fields of a result, and the SSM's share of gflops
    "params_m": "params (M)",
    "gflops": "Gflops",
    "gflops_ssm": "of which SSM",
    "images_seen": "images seen",
    "train_gflops": "training Gflops",
    "train_gflops_papers": "Gflops × images",
    "sample_gflops": "sample Gflops",
}
INTERVALS = (
    "±: half width of the 95 % interval over the drawing of the generated samples (delete-a-group jackknife; shares of "
    "samples: binomial); it covers neither the training seed nor the reference. "
    "Bold: the best, where its interval overlaps no other's."
)
CONVENTIONS = (
    "Gflops: 1e9 multiply-adds of one unguided forward of one image, backbone only (SSM: S4D kernel and FFTs). "
    "Training Gflops: 3 × Gflops × images seen; Gflops × images is the total that papers print. "
    "Sample Gflops: per generated image.",
    INTERVALS,
)


def build(results: Sequence[Result]) -> TableData:
    """The table of one comparison, rows in the order in which runs first appear in `results`.

    Raises: UserError if there is no result, or the results were scored by different protocols.
    """
    require_one_protocol(results)
    rows, names, specs = finals(results), labels(results), score_specs(results[0])
    untrained = {row.run_id: row for row in results if row.weights == "untrained"}
    frechet = next((name for name, spec in specs.items() if spec.name == "fid"), None) if untrained else None
    records = [_record(row, frechet, untrained.get(row.run_id)) for row in rows]
    grid = {"model": [Cell(names[row.run_id]) for row in rows]}
    for key, title in COSTS.items():
        if key != "gflops_ssm" or any(record[key] for record in records):
            grid[title] = [Cell(number(record[key])) for record in records]
    grid |= _score_columns(records, specs)
    if frechet:
        grid[f"untrained {frechet} ↓"] = [_cell(r, f"untrained_{frechet}", specs[frechet]) for r in records]
    verdict = [_verdict(records, names, *next(iter(specs.items())))] if specs and len(rows) > 1 else []
    notes = (*verdict, *_few(rows[0], specs), describe_protocol(rows[0].protocol), _training(rows), *CONVENTIONS)
    return TableData(tuple(grid), tuple(zip(*grid.values(), strict=True)), notes, tuple(records))


def build_sets(results: Sequence[SampleSetScore]) -> TableData:
    """The table of finished images that were scored against one reference, a row a set.

    Raises: UserError if there is no result, or the results were scored by different protocols.
    """
    require_one_protocol(results)
    specs = score_specs(results[0])
    records = []
    for row in results:
        record = {"samples": row.samples, "size": row.protocol["size"], "num_samples": row.protocol["num_samples"]}
        for name, value in row.scores.items():
            record |= {name: value, f"{name}_ci95": row.ci95[name]}
        records.append(record | {"sha256": row.sha256})
    grid = {"samples": [Cell(name) for name in _short([row.samples for row in results])]}
    grid |= _score_columns(records, specs)
    p = results[0].protocol
    notes = (
        *_few(results[0], specs),
        f"{p['num_samples']} images of {p['size']} each, uint8 as given, in their own order. {_scored_by(p)}.",
        INTERVALS,
    )
    return TableData(tuple(grid), tuple(zip(*grid.values(), strict=True)), notes, tuple(records))


def _short(paths: Sequence[str]) -> list[str]:
    """Paths without the folders they all share."""
    if len(set(paths)) == 1:
        return [Path(path).name for path in paths]
    shared = Path(os.path.commonpath([Path(path).absolute() for path in paths]))
    return [str(Path(path).absolute().relative_to(shared)) for path in paths]


def require_one_protocol(results: Sequence[Result] | Sequence[SampleSetScore]) -> None:
    """Raises: UserError if there is no result, or naming the settings in which the protocols differ."""
    if not results:
        raise UserError("No results, so no table. Score a run first: python -m bench evaluate runs/<run_id>")
    protocols = [row.conditions | {"scores": ", ".join(row.scores)} for row in results]
    given = {key: list(dict.fromkeys(str(p.get(key)) for p in protocols)) for p in protocols for key in p}
    differing = [f"{key} {' or '.join(values)}" for key, values in given.items() if len(values) > 1]
    if differing:
        raise UserError(
            f"The rows were scored by different protocols: {'; '.join(differing)}. Score them alike, with the same "
            "eval.* settings (eval.sampler and eval.cfg_channels replace those of a recipe)."
        )


def finals(results: Iterable[Result]) -> list[Result]:
    """The last checkpoint of each run."""
    last: dict[str, Result] = {}
    for row in results:
        if row.run_id not in last or row.steps > last[row.run_id].steps:
            last[row.run_id] = row
    return list(last.values())


def labels(results: Iterable[Result]) -> dict[str, str]:
    """run_id -> 'DiT-XL/2', with what else was set of model and data, and what tells runs of one size apart."""
    runs = {row.run_id: row for row in results}
    varied = [key for key in ("recipe", "batch_size", "seed") if len({_trained(row, key) for row in runs.values()}) > 1]
    names = {}
    for run_id, row in runs.items():
        changed = [_setting(key, value) for key, value in row.changed.items() if not key.startswith("recipe.")]
        told = ", ".join([*changed, *(f"{key} {_trained(row, key)}" for key in varied)])
        names[run_id] = f"{row.title}-{row.size}" + (f" ({told})" if told else "")
    uses = Counter(names.values())
    return {
        run_id: name if uses[name] == 1 else f"{name} {run_id.rpartition('-')[2]}" for run_id, name in names.items()
    }


def _trained(row: Result, key: str) -> str:
    """A field of the row as text; of the recipe also what was set otherwise, but for the batch size, a field itself."""
    return row.recipe_besides(("batch_size",)) if key == "recipe" else str(getattr(row, key))


def _setting(key: str, value: Any) -> str:
    """'gating false', '10 classes'."""
    name = key.rpartition(".")[2]
    if isinstance(value, list):
        return f"{len(value)} {name}"
    return f"{name} {value if isinstance(value, str) else json.dumps(value)}"


def equalised(results: Sequence[Result], quantity: str = "train_gflops") -> float:
    """How far apart the final rows are in `quantity` (train_gflops | images): largest over smallest, less 1.

    Raises: UserError naming rows and values if they are further apart than a table may call equal.
    """
    names = labels(results)
    spent = {names[row.run_id]: getattr(row, SPENT[quantity]) for row in finals(results)}
    budgets.require_equal(quantity, spent)
    return budgets.spread(spent.values())


def score_specs(row: Result | SampleSetScore) -> dict[str, MetricSpec]:
    """Column -> direction and decimals, for the scores of a row."""
    p = row.protocol
    known = {column(name, p["extractor"], p["num_samples"], p["precision"]): spec for name, spec in METRICS.items()}
    return {name: known[name] for name in row.scores}


def _record(row: Result, frechet: str | None, untrained: Result | None) -> dict[str, Any]:
    identity = ("run_id", "model", "size", "data", "recipe", "changed", "batch_size", "seed", "weights", "steps")
    ssm = row.gflops_parts["ssm_kernel"] + row.gflops_parts["fft"]
    made = {"changed": json.dumps(row.changed), "gflops_ssm": ssm}
    record = {key: made[key] if key in made else getattr(row, key) for key in (*identity, *COSTS)}
    for name, value in row.scores.items():
        record |= {name: value, f"{name}_ci95": row.ci95[name]}
    if frechet:
        record[f"untrained_{frechet}"] = untrained.scores[frechet] if untrained else None
        record[f"untrained_{frechet}_ci95"] = untrained.ci95[frechet] if untrained else None
    return record | {f"protocol_{key}": row.protocol[key] for key in ("name", "version", "num_samples")}


def _score_columns(records: list[dict[str, Any]], specs: dict[str, MetricSpec]) -> dict[str, list[Cell]]:
    """Title with its direction -> cells, the best bold where no other's interval overlaps its own."""
    columns = {}
    for name, spec in specs.items():
        best, rivals = _best(records, name, spec)
        clear = len(records) > 1 and not rivals
        title = f"{name} {'↑' if spec.higher_is_better else '↓'}"
        columns[title] = [_cell(record, name, spec, bold=clear and record is best) for record in records]
    return columns


def _cell(record: dict[str, Any], name: str, spec: MetricSpec, bold: bool = False) -> Cell:
    return Cell(score_text(record[name], record[f"{name}_ci95"], spec.decimals), bold)


def _best(records: list[dict[str, Any]], name: str, spec: MetricSpec) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the best row, the other rows whose interval overlaps its own)."""
    best = (max if spec.higher_is_better else min)(records, key=lambda record: record[name])
    reach = f"{name}_ci95"
    rivals = [r for r in records if r is not best and abs(r[name] - best[name]) <= r[reach] + best[reach]]
    return best, rivals


def _verdict(records: list[dict[str, Any]], names: dict[str, str], name: str, spec: MetricSpec) -> str:
    """The table in one sentence: which model has the best `name`, if the intervals can tell."""
    best, rivals = _best(records, name, spec)
    leader = f"{names[best['run_id']]} has the best {name} ({_cell(best, name, spec).text})"
    if rivals:
        others = ", ".join(names[record["run_id"]] for record in rivals)
        return f"{leader}, but its interval overlaps that of {others}: no verdict."
    return f"{leader}; its interval overlaps no other's."


def describe_protocol(p: dict[str, Any]) -> str:
    """Everything that must be alike before two scores are compared, in one sentence.

    Without `cfg_scale` in a table whose rows differ in it and say so themselves.
    """
    guidance = ""
    if "cfg_scale" in p:
        guidance = f"cfg_scale {p['cfg_scale']:g}{' (unguided)' if p['cfg_scale'] == 1 else ''}, "
    return (
        f"Protocol {p['name']} (version {p['version']}): {p['num_samples']} samples, labels {p['labels']}, "
        f"seed {p['seed']}; sampler {p['sampler']}, {p['sampler_steps']} steps; {guidance}"
        f"cfg_channels {p['cfg_channels']}; decoder {p['decoder']}; uint8 by {p['quantisation']}. {_scored_by(p)}."
    )


def _scored_by(p: dict[str, Any]) -> str:
    n = f"{p['reference_n']} images" if p["reference_n"] else "number of images not stated in the file"
    return (
        f"Extractor {p['extractor']} ({p['extractor_sha256'][:8]}), {p['precision']}; resize {p['resize']}. "
        f"Reference {p['reference']} ({n}: {p['reference_images']}; {p['reference_sha256'][:8]})"
    )


def _few(row: Result | SampleSetScore, specs: dict[str, MetricSpec]) -> list[str]:
    """What a small sample does to a Frechet distance, where there is one."""
    n = row.protocol["num_samples"]
    names = [name for name, spec in specs.items() if spec.name in ("fid", "sfid")]
    if n >= FEW or not names:
        return []
    return [
        f"Warning: {n} samples are few. Below {FEW:,} a Frechet distance is largely bias: compare "
        f"{' and '.join(names)} only with distances of as many samples, and never with published ones."
    ]


def _training(rows: Sequence[Result]) -> str:
    keys = ("data", "recipe", "batch_size", "seed", "weights")
    told = [f"{key} {' or '.join(dict.fromkeys(_trained(row, key) for row in rows))}" for key in keys]
    spent = [row.train_gflops for row in rows]
    gap = f" Training Gflops differ by {100 * budgets.spread(spent):.2f} %." if len(rows) > 1 and min(spent) else ""
    return f"Training: {', '.join(told)}.{gap}"
