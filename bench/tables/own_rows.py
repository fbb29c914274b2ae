"""Which stored results belong beside a printed row: by what was trained and how it was scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.dotted import flatten
from bench.metrics import METRICS, column
from bench.store import Result
from bench.tables.counted import counted
from bench.tables.specs import PaperRun, Place, TableSpec

PROTOCOL, SAMPLES, EXTRACTOR = "fid50k", 50_000, "inception"
REFERENCE = 1_000_000  # real images at least: the whole of ImageNet or LSUN-Bedrooms; 0 = not known, ADM's file
COUNT_TOLERANCE = 1e-3  # of parameters and Gflops
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
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEFAULTS = {"labels": "iid", "sampler_eta": 0.0, "sampler_spacing": "even", "sampler_clip_denoised": False}
MATCHED = (
    "Rows of ours: results of EMA weights under protocol fid50k (50,000 samples, ADM's Inception in float32) whose "
    "model, size, data and recipe, with all their settings, decoder, sampler, steps and guidance are those of the row, "
    "with its parameters and Gflops within 0.1 % and its images seen within 1 %; the reference is ADM's file or the "
    "whole training split."
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


def mismatches(result: Result, directory: Path, run: PaperRun, place: Place) -> list[str]:
    """Why a result of the run in `directory` does not belong to a place; nothing if it does."""
    cost, p = counted(run), result.protocol
    images = run.images(cost.gflops)
    same = {
        "recipe": (result.recipe, run.recipe),
        "weights": (result.weights, "ema"),
        "protocol": (p.get("name"), PROTOCOL),
        "samples": (p.get("num_samples"), SAMPLES),
        "extractor": (p.get("extractor"), EXTRACTOR),
        "precision": (p.get("precision"), "float32"),
        "cfg_scale": (p.get("cfg_scale"), place.cfg_scale),
        "sampler": (p.get("sampler"), run.sampler),
        "sampler steps": (p.get("sampler_steps"), run.sampler_steps),
        "decoder": (p.get("decoder"), run.decoder),
        **{name: (p.get(name, wanted), wanted) for name, wanted in DEFAULTS.items()},
    }
    if place.cfg_scale != 1:
        same["cfg_channels"] = (p.get("cfg_channels"), run.cfg_channels)
    found = [f"{name} {given}, not {wanted}" for name, (given, wanted) in same.items() if given != wanted]
    found += differing(run, directory)
    if 0 < p.get("reference_n", 0) < REFERENCE:
        found.append(f"a reference of {p['reference_n']:,} images, not of all")
    if abs(result.images_seen / images - 1) > IMAGES_TOLERANCE:
        found.append(f"{result.images_seen / 1e6:.4g}M images seen, not {images / 1e6:.4g}M")
    for name, given, wanted in (
        ("parameters (M)", result.params_m, cost.params_m),
        ("Gflops", result.gflops, cost.gflops),
    ):
        if abs(given / wanted - 1) > COUNT_TOLERANCE:
            found.append(f"{name} {given:.4g}, not {wanted:.4g}")
    return found


def differing(run: PaperRun, directory: Path) -> list[str]:
    """How the settings of a trained run differ from those asked for, by its run.json and config.yaml.

    The autoencoder is not looked at: those of a family share their latents, and scores name their decoder.
    """
    changed, file = run_record(directory).get("changed"), directory / "config.yaml"
    if changed is None or not file.exists():
        return [f"settings not on record (python -m bench train {file} adds them)"]
    used = flatten(yaml.load(file.read_text(), LOADER))
    asked = {key: value for key, value in run.settings.items() if key.startswith(("model.", "data.", "recipe."))}
    return [
        f"{key} {used.get(key)}, not {asked.get(key, 'the usual')}"
        for key in sorted((asked.keys() | changed.keys()) - {"data.autoencoder"})
        if key not in asked or not _same(asked[key], used.get(key))
    ]


def _same(asked: Any, used: Any) -> bool:
    """YAML reads 3e-4 as a word."""
    try:
        return float(asked) == float(used)
    except (TypeError, ValueError):
        return asked == used


def find_own(spec: TableSpec, results: Iterable[Result], runs: Path) -> tuple[list[OwnRow], list[str]]:
    """(rows of ours in the order of the table, sentences on results of its models that fit no row).

    A result that several comparisons share is one row.
    """
    rows, strangers = [], dict[str, str]()
    unique = {(row.run_id, row.steps, row.weights, json.dumps(row.protocol, sort_keys=True)): row for row in results}
    for result in unique.values():
        directory = runs / result.run_id
        tried: list[tuple[bool, list[str]]] = []  # (another guidance, reasons)
        for place in spec.rows:
            run = spec.runs[place.run] if place.run else None
            if run is None or (run.model, run.size, run.data) != (result.model, result.size, result.data):
                continue
            reasons = mismatches(result, directory, run, place)
            if not reasons:
                rows.append(OwnRow(place, result, origin(run_record(directory))))
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
