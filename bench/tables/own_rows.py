"""Which stored results belong beside a printed row: by what was trained and how it was scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.metrics import METRICS, column
from bench.store import Result
from bench.tables.counted import counted
from bench.tables.specs import PaperRun, Place, TableSpec

PROTOCOL, SAMPLES, EXTRACTOR = "fid50k", 50_000, "inception"
COUNT_TOLERANCE = 1e-3  # of parameters and Gflops: settings of a model that change neither are not seen
IMAGES_TOLERANCE = 0.01  # of images seen
# Columns of a paper's table -> scores of ours, the first that is there: papers take precision and recall from ADM's
# evaluator, whose float16 arithmetic the _float16 scores repeat.
SCORES = {
    "fid": ("fid",),
    "sfid": ("sfid",),
    "inception_score": ("inception_score",),
    "precision": ("precision_float16", "precision"),
    "recall": ("recall_float16", "recall"),
}
MATCHED = (
    "Rows of ours: results of EMA weights under protocol fid50k (50,000 samples, ADM's Inception in float32) whose "
    "model, size, data, recipe with all its values, decoder, sampler, steps and guidance are those of the row, with "
    "its parameters and Gflops within 0.1 % and its images seen within 1 %."
)


@dataclass(frozen=True)
class OwnRow:
    """A result beside the row it stands in for."""

    place: Place
    result: Result
    origin: str  # ours | official weights, ...

    def score(self, key: str) -> tuple[float, float] | None:
        """(value, half width of its 95 % interval) of a column; None if it was not scored."""
        for name in SCORES[key]:
            title = column(name, EXTRACTOR, SAMPLES)
            if title in self.result.scores:
                return self.result.scores[title], self.result.ci95[title]
        return None


def decimals(key: str) -> int:
    return METRICS[key].decimals


def mismatches(result: Result, run: PaperRun, place: Place) -> list[str]:
    """Why a result does not belong to a place; nothing if it does."""
    cost, p = counted(run), result.protocol
    images = run.images(cost.gflops)
    same = {
        "recipe": (result.recipe, run.recipe_title),
        "weights": (result.weights, "ema"),
        "protocol": (p.get("name"), PROTOCOL),
        "samples": (p.get("num_samples"), SAMPLES),
        "extractor": (p.get("extractor"), EXTRACTOR),
        "precision": (p.get("precision"), "float32"),
        "cfg_scale": (p.get("cfg_scale"), place.cfg_scale),
        "sampler": (p.get("sampler"), run.sampler),
        "sampler steps": (p.get("sampler_steps"), run.sampler_steps),
        "decoder": (p.get("decoder"), run.decoder),
    }
    if place.cfg_scale != 1:
        same["cfg_channels"] = (p.get("cfg_channels"), run.cfg_channels)
    found = [f"{name} {given}, not {wanted}" for name, (given, wanted) in same.items() if given != wanted]
    if abs(result.images_seen / images - 1) > IMAGES_TOLERANCE:
        found.append(f"{result.images_seen / 1e6:.4g}M images seen, not {images / 1e6:.4g}M")
    for name, given, wanted in (
        ("parameters (M)", result.params_m, cost.params_m),
        ("Gflops", result.gflops, cost.gflops),
    ):
        if abs(given / wanted - 1) > COUNT_TOLERANCE:
            found.append(f"{name} {given:.4g}, not {wanted:.4g}")
    return found


def find_own(spec: TableSpec, results: Iterable[Result], runs: Path) -> tuple[list[OwnRow], list[str]]:
    """(rows of ours in the order of the table, sentences on results of its models that fit no row).

    A result that several comparisons share is one row.
    """
    rows, strangers = [], dict[str, str]()
    unique = {(row.run_id, row.steps, row.weights, json.dumps(row.protocol, sort_keys=True)): row for row in results}
    for result in unique.values():
        tried: list[tuple[bool, list[str]]] = []  # (another guidance, reasons)
        for place in spec.rows:
            run = spec.runs[place.run] if place.run else None
            if run is None or (run.model, run.size, run.data) != (result.model, result.size, result.data):
                continue
            reasons = mismatches(result, run, place)
            if not reasons:
                rows.append(OwnRow(place, result, origin(run_record(runs / result.run_id))))
            tried.append((place.cfg_scale != result.protocol["cfg_scale"], reasons))
        _, nearest = min(tried, key=lambda entry: (entry[0], len(entry[1])), default=(False, []))
        if nearest:
            strangers[result.run_id] = f"{result.run_id} at step {result.steps} fits no row: {'; '.join(nearest)}."
    order = {id(place): index for index, place in enumerate(spec.rows)}
    rows.sort(key=lambda row: (order[id(row.place)], row.result.created))
    return rows, [text for run_id, text in strangers.items() if run_id not in {row.result.run_id for row in rows}]


def origin(record: Mapping[str, Any]) -> str:
    """'official weights' and the like of an imported run, 'ours' of one that was trained here, by its run.json."""
    imported = record.get("imported")
    return str(imported["weights"]).partition(",")[0] if imported else "ours"


def run_record(directory: Path) -> dict[str, Any]:
    """A run's run.json; nothing where only its results are left."""
    path = directory / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}
