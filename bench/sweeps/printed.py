"""What a sweep looks like outside: a table of its runs, the commands of each, a sweep config for Weights & Biases."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bench import registry
from bench.dotted import flatten
from bench.errors import UserError
from bench.files import atomic_write
from bench.sweeps.points import read_settings
from bench.sweeps.sweep import ONE_RUN, PlannedRun, Sweep, load_sweep

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # a thousand files: 1 s in C, 6 s in Python


def commands(run: PlannedRun, first: PlannedRun) -> list[str]:
    """The commands of a line; `first` is the line whose protocol the run directory's config.yaml has."""
    directory = Path(run.config["paths"]["runs"]) / run.run_id
    scored, other = flatten(first.config["eval"]), flatten(run.config["eval"])
    changed = [f"eval.{key}={json.dumps(value)}" for key, value in other.items() if scored.get(key, run) != value]
    train = [["train", f"{directory}/config.yaml"]] if run is first else []
    steps = [[]] if len(run.scored_steps) == 1 else [["--step", str(step)] for step in run.scored_steps]
    evaluate = [["evaluate", str(directory), *step, *changed] for step in steps]
    return [shlex.join(["python", "-m", "bench", *words]) for words in (*train, *evaluate)]


def write_config(run: PlannedRun) -> None:
    """runs/<run_id>/config.yaml, from which `train` starts."""
    path = Path(run.config["paths"]["runs"]) / run.run_id / "config.yaml"
    text = yaml.dump(run.config, Dumper=DUMPER, sort_keys=False)
    if not path.exists() or path.read_text() != text:
        with atomic_write(path) as file:
            file.write(text)


def describe(sweep: Sweep) -> str:
    """The text of `sweep --dry-run`: every run, what it costs, and how far apart they are."""
    lines = [f"{'run':<40} {'Gflops':>9} {'steps':>9} {'train Gflops':>13}   settings"]
    for run in sweep.runs:
        gap = "" if run.gap is None else f" (size {run.config['model']['size']}, {run.gap:+.1%} of the target)"
        numbers = f"{run.gflops:>9.4g} {run.steps:>9} {run.train_gflops:>13.5g}"
        lines.append(f"{run.run_id:<40} {numbers}   {run.label}{gap}")
    total = sum(runs[0].train_gflops for runs in sweep.trainings().values())
    lines.append(f"{len(sweep.runs)} runs, {total:.4g} train Gflops in all; equal: {sweep.equal}; {sweep.directory}")
    return "\n".join(lines)


def wandb_config(name: str, overrides: Sequence[str] = ()) -> str:
    """A sweep config of Weights & Biases (YAML) whose command is `sweep run` of this file.

    A grid stays a grid, and random draws W&B's own; whatever else a sweep is made of becomes a grid over its run ids.

    Raises: UserError for overrides of the sweep itself, which W&B would not see.
    """
    if own := [word for word in overrides if word.startswith("sweep.")]:
        raise UserError(f"{own[0]} does not reach W&B. Write it into the file of the sweep.")
    sweep, settings = load_sweep(name, overrides), read_settings(registry.config_file("sweep", name))
    kinds = {key.partition(".")[0] for key in settings} - {"slurm"}
    parameters: dict[str, Any] = {ONE_RUN: {"values": list(sweep.trainings())}}
    if kinds <= {"grid"}:
        parameters = {
            key.removeprefix("grid."): {"values": values} for key, values in settings.items() if "grid." in key
        }
    elif kinds <= {"random"}:
        parameters = dict(
            _distribution(key.removeprefix("random."), values)
            for key, values in settings.items()
            if isinstance(values, list)
        )
    words = ["-m", "bench", "sweep", "run", name, *overrides]
    config: dict[str, Any] = {
        "name": name,
        "method": "random" if kinds <= {"random"} else "grid",
        "metric": {"name": "train/loss", "goal": "minimize"},
        "parameters": parameters,
        "command": ["${env}", "${interpreter}", *words, "${args_no_hyphens}"],
    }
    if kinds <= {"random"}:
        config["run_cap"] = len(sweep.runs)
    return yaml.safe_dump(config, sort_keys=False)


def _distribution(path: str, values: list[Any]) -> tuple[str, dict[str, Any]]:
    key, _, kind = path.rpartition(".")
    if kind == "choice":
        return key, {"values": values}
    low, high = values
    return key, {"distribution": "log_uniform_values" if kind == "loguniform" else kind, "min": low, "max": high}
