"""The commands of a plan's runs, and which of them are here already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench import budget as budgets
from bench.dotted import flatten
from bench.plans.plan import GPUS_A_NODE, RunPlan
from bench.tables.counted import counted
from bench.tables.own_rows import COUNT_TOLERANCE, LOADER, differing, origin, run_record
from bench.tables.specs import RUN_FILE, PaperRun

SCALE = "eval.cfg_scale"


def train_command(plan: RunPlan, given: dict[str, str]) -> list[str]:
    """The words of the command that trains a run; `given` are the user's settings."""
    parts = plan.accumulate
    words = [*plan.run.overrides, *device_settings(plan.machine.gpus, given)]
    words += [f"trainer.accumulate={parts}"] if parts not in (None, 1) and "trainer.accumulate" not in given else []
    return ["train", RUN_FILE, *words, *(f"{key}={value}" for key, value in given.items())]


def evaluate_commands(plan: RunPlan, directory: str, given: dict[str, str]) -> list[list[str]]:
    """The words of the commands that score a run, one a row."""
    scored = [f"{key}={value}" for key, value in given.items() if key.startswith(("eval.", "data.", "trainer."))]
    return [["evaluate", directory, f"{SCALE}={place.cfg_scale:g}", *scored] for place in plan.places]


def find_run(run: PaperRun, runs: Path, given: dict[str, str]) -> tuple[Path, str] | None:
    """(directory, state) of a run of these settings, by its config.yaml, and what its record says was changed."""
    wanted = {key: value for key, value in run.point.items() if value is not None}
    wanted |= {"seed": int(given.get("seed", 0)), "data.autoencoder": run.decoder}
    for path in sorted(runs.glob(f"{run_stem(run)}-*/config.yaml")):
        flat, record = flatten(yaml.load(path.read_text(), LOADER)), run_record(path.parent)
        # Settings of the model that the table does not name must be the size's own: they would cost otherwise.
        gflops = _gflops(path.parent, record)
        same = gflops is not None and abs(gflops / counted(run).gflops - 1) < COUNT_TOLERANCE
        same = same and not (record and differing(run, path.parent))
        if same and all(flat.get(key) == value for key, value in wanted.items()):
            return path.parent, _state(path.parent, record)
    return None


def run_stem(run: PaperRun) -> str:
    """A run's id without its digest."""
    return f"{run.model}-{run.size.replace('/', '-')}-{run.data}".lower()


def _gflops(directory: Path, record: Mapping[str, Any]) -> float | None:
    """Of one forward, from what run.json, or the first line of metrics.jsonl, says was spent; None before both."""
    log = directory / "metrics.jsonl"
    first = log.read_text().partition("\n")[0] if log.exists() else ""
    for values in (record, json.loads(first or "{}")):
        if values.get("images_seen") and values.get("train_gflops"):
            return values["train_gflops"] / budgets.FORWARDS_PER_STEP / values["images_seen"]
    return None


def _state(directory: Path, record: Mapping[str, Any]) -> str:
    if record.get("imported"):
        return origin(record)
    checkpoints = list((directory / "checkpoints").glob("*.ckpt"))
    return "no checkpoint" if not checkpoints else "trained" if record.get("state") == "finished" else "begun"


def device_settings(gpus: int, given: dict[str, str]) -> list[str]:
    """The settings of `trainer` for so many GPUs, but for those that the user gives."""
    nodes, devices = max(1, gpus // GPUS_A_NODE), min(gpus, GPUS_A_NODE)
    words = [f"trainer.devices={devices}", *([f"trainer.num_nodes={nodes}"] if nodes > 1 else [])]
    words += ["trainer.precision=bf16-mixed", "trainer.checkpoint_minutes=15"]
    return [word for word in words if word.partition("=")[0] not in given]
