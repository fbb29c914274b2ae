"""The command `plan`: what regenerating a paper's table takes, with the command of every step; or start it."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.errors import UserError
from bench.files import atomic_write
from bench.gpus import GPUS
from bench.plans.plan import Machine, RunPlan, caches, plan_table
from bench.plans.printed import assumptions, cache_lines, run_lines, summary
from bench.plans.runs import SCALE, device_settings
from bench.registry import ROOT, nearest
from bench.tables.counted import count_missing
from bench.tables.specs import RUN_FILE, load_table

# Where files of the user lie.
TO_GIVE = ("data.root", "data.autoencoder_path", "eval.extractor_weights", "eval.reference")
# Settings that make another row than the paper's, by how they begin.
SCORING = ("num_samples", "sampler", "cfg_", "extractor=", "precision", "labels")
NOT_FREE = ("budget.", "recipe.", "model.", "use.", *(f"eval.{key}" for key in SCORING))
# What may be given, less NOT_FREE. The sources of the groups' dataclasses are read: to import them would load torch.
SINGLE = ("seed", "tracking")
GROUPS = {
    "data": ("datamodules/base.py", "DataConfig"),
    "eval": ("bench/config.py", "EvalConfig"),
    "trainer": ("bench/config.py", "TrainerConfig"),
    "paths": ("bench/config.py", "PathsConfig"),
}


def print_plan(name: str, gpus: int, gpu: str, mfu: float, overrides: Sequence[str]) -> None:
    """Print runs, costs, commands and what is here already. Raises: UserError for what cannot be planned."""
    given = _given(overrides)
    if own := [key for key in given if key.startswith("sweep.")]:
        raise UserError(f"{own[0]} is a setting of the launch; give it with --launch slurm.")
    spec, machine = load_table(name), Machine(gpu, gpus, mfu)
    plans = plan_table(spec, machine)
    _require_free(plans, given)
    _require_known(given)
    runs, cache = Path(given.get("paths.runs", "runs")), Path(given.get("paths.cache", "cache"))
    kind, plural = GPUS[gpu], "s" * (len(plans) > 1)
    lines = [
        f"{spec.title} ({spec.paper})",
        f"{len(plans)} run{plural} on {gpus} x {gpu} each ({kind.bfloat16:g} Tflops bfloat16, {kind.memory_gb} GB), "
        f"MFU {mfu:.0%}",
        "",
        *summary(plans, runs, given),
        "",
        "Latents, made once by the first run or by these commands:",
        "",
    ]
    for latents in caches(plans):
        lines += cache_lines(latents, cache, plans, given)
    for plan in plans:
        lines += ["", *run_lines(plan, runs, given)]
    missing = [key for key in TO_GIVE if key not in given and len(_kinds(plans).get(key, ())) < 2]
    notes = [f"Give {', '.join(f'{key}=...' for key in missing)} to `plan` as well, and the commands have them."]
    notes = [*(notes if missing else []), *assumptions(machine)]
    print("\n".join([*lines, "", *(textwrap.fill(note, 118, break_on_hyphens=False) for note in notes)]))


def count(name: str) -> None:
    """Count Gflops and memory of the table's runs that configs/counted.csv lacks."""
    for row in count_missing(load_table(name).runs.values()):
        print(f"{row.model} {row.size} {row.settings} {row.data} {row.recipe}: {row.gflops} Gflops")


def launch_plan(name: str, launcher: str, gpus: int, gpu: str, overrides: Sequence[str]) -> None:
    """Start the runs as a sweep, or print its commands: that of the table, or one written to runs/plans/."""
    from bench.sweeps.launch import launch
    from bench.sweeps.sweep import load_sweep

    spec, given = load_table(name), _given(overrides)
    plans = plan_table(spec, Machine(gpu, gpus, mfu=1.0))
    _require_free(plans, given)
    _require_known(key for key in given if not key.startswith("sweep."))
    if spec.sweep:
        parts = max(plan.accumulate or 1 for plan in plans)
        accumulate = [f"trainer.accumulate={parts}"] if parts > 1 and "trainer.accumulate" not in given else []
        sweep = load_sweep(spec.sweep, [*overrides, *device_settings(gpus, given), *accumulate])
    else:
        path = Path(given.get("paths.runs", "runs")) / "plans" / f"plan-{spec.name}.yaml"
        with atomic_write(path) as file:
            file.write(f"# The runs of configs/table/{spec.name}.yaml, as `plan --launch` writes them.\n")
            yaml.safe_dump(sweep_file(plans, given), file, sort_keys=False)
        sweep = load_sweep(str(path), overrides)
    launch(sweep, launcher)


def sweep_file(plans: Sequence[RunPlan], given: dict[str, str]) -> dict[str, Any]:
    """The plans as a file of configs/sweep/: one line a run and row."""
    first, lines = plans[0].run, []
    for plan in plans:
        several = plan.accumulate not in (None, 1) and "trainer.accumulate" not in given
        machine = {"trainer.accumulate": plan.accumulate} if several else {}
        lines += [plan.run.point | machine | {SCALE: place.cfg_scale} for place in plan.places]
    words = [word.removeprefix("trainer.").partition("=") for word in device_settings(plans[0].machine.gpus, given)]
    return {
        "use": {"model": first.model, "data": first.data, "recipe": first.recipe, "eval": "fid50k"},
        "trainer": {key: yaml.safe_load(value) for key, _, value in words},
        "equal": "none",
        "sweep": {"list": lines},
    }


def _given(overrides: Sequence[str]) -> dict[str, str]:
    if word := next((word for word in overrides if "=" not in word), None):
        raise UserError(f"'{word}' is not a setting. Write key=value, such as seed=1.")
    given = {key: value for key, _, value in (word.partition("=") for word in overrides)}
    if not given.get("seed", "0").isdecimal():
        raise UserError(f"seed is '{given['seed']}'; give a whole number from 0 on, such as seed=1.")
    return given


def known_settings() -> list[str]:
    """The settings of a run that a plan may be given, by the sources of their dataclasses."""
    known = list(SINGLE)
    for group, (path, name) in GROUPS.items():
        tree = ast.parse((ROOT / path).read_text())
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        targets = (node.target for node in body if isinstance(node, ast.AnnAssign))
        known += [f"{group}.{target.id}" for target in targets if isinstance(target, ast.Name)]
    return known


def _require_known(keys: Iterable[str]) -> None:
    """Of keys that are free. Raises: UserError for one that no run has."""
    known = [key for key in known_settings() if not f"{key}=".startswith(NOT_FREE)]
    for key in keys:
        if key not in known:
            raise UserError(f"{key} is not a setting. {nearest(key, known)}")


def _kinds(plans: Sequence[RunPlan]) -> dict[str, list[str]]:
    """Files of the user -> what each run needs one for."""
    return {
        "eval.reference": list(dict.fromkeys(plan.run.data for plan in plans)),
        "data.autoencoder_path": list(dict.fromkeys(plan.run.decoder for plan in plans)),
    }


def _require_free(plans: Sequence[RunPlan], given: dict[str, str]) -> None:
    """Raises: UserError for a setting that the table's file fixes, or a file that only some of the runs can use."""
    fixed = {key for plan in plans for key in plan.run.point} | {SCALE}
    if taken := [key for key in given if key in fixed or f"{key}=".startswith(NOT_FREE)]:
        raise UserError(
            f"{taken[0]} is what the table is about. Train another run with: python -m bench train {RUN_FILE}"
        )
    for key, kinds in _kinds(plans).items():
        if key in given and len(kinds) > 1:
            raise UserError(
                f"{key} is one file, but these runs need one each for {', '.join(kinds)}. Leave it out here and add it "
                "to each command."
            )
