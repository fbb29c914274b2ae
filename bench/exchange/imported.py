"""Weights trained elsewhere become a run: checked against an architecture, then kept as runs/<run_id>/.

Such a run is sampled and scored like any other, but cannot be trained: it has no optimizer. Its run.json says where the
weights came from.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import registry
from bench.config import PAPER, RunConfig, build_run, changed_settings
from bench.console import say
from bench.errors import UserError
from bench.exchange.fit import require_architecture, require_fit
from bench.files import atomic_write
from bench.merging import parse_overrides, read_yaml
from bench.tables.published import Published, load_published
from bench.training.checkpoints import checkpoint_path
from bench.training.plan import plan_training
from bench.training.run_record import read_state, write_state
from datamodules.cache import file_sha256
from models.diffusers_dit import from_diffusers, is_diffusers
from models.dit import DiTConfig
from models.pretrained import EXPORT, STATE_DICT, UVIT_EMA, Weights, read_weights

CONFIG = "config.yaml"  # of a run, and of an export
RESOLUTION = 256
PREFIX = "backbone."  # of every name in the state_dict of a checkpoint
OURS, OFFICIAL, OTHERS = "export of IsoDiff", "official weights, by the name of the file", "weights trained elsewhere"


@dataclass(frozen=True)
class Claim:
    """What the user says the weights are; None: not said."""

    model: str | None = None
    size: str | None = None
    resolution: int | None = None  # image side in pixels; 256 if not said
    data: str | None = None  # imagenet<resolution> if not said
    steps: int | None = None  # optimizer steps they were trained for


def import_run(path: Path, claim: Claim, overrides: list[str]) -> Path:
    """Make a run of the weights at `path` -> its directory.

    Raises: UserError if they are no weights or do not fit the claim, or if the directory holds another run.
    """
    try:
        weights = read_weights(path)
        own = path.is_dir() and weights.file == path / EXPORT and (path / CONFIG).is_file()
        config, about = (_own if own else _foreign)(path, weights, claim, overrides)
        plan = plan_training(config)
        tensors = require_fit(_renamed(weights, config), weights.file, config, plan.spec)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    source = {"file": weights.file.name, "sha256": file_sha256(weights.file), "form": weights.form}
    source |= {"taken": weights.taken, **about}
    directory, final = config.directory, checkpoint_path(config.directory, plan.budget.steps)
    state = read_state(directory)
    same = state.get("imported", {}).get("sha256") == source["sha256"]
    if state and not same:
        raise UserError(
            f"{directory} is there already, with other weights than {path}. Give another paths.runs=FOLDER."
        )
    if same and final.exists():
        say(f"{directory}: imported before")
        return directory
    _write(config, tensors, plan.budget.steps)
    write_state(
        directory,
        "finished",
        steps=plan.budget.steps,
        changed=changed_settings(config),
        images_seen=plan.budget.images,
        train_gflops=plan.budget.train_gflops,
        imported=source,
    )
    say(f"{weights.file}: {about['weights']}; {weights.form}, taken: {weights.taken}")
    say(f"{directory}: {plan.budget.steps:,} steps ({about['steps']}), {plan.budget.images:,} images seen")
    if "published" in about:
        say(f"  published: {about['published']}")
    return directory


def released() -> dict[tuple[str, str, int], dict[str, str]]:
    """(architecture name, size, resolution) -> its row of configs/released_weights.csv."""
    with (registry.CONFIGS / "released_weights.csv").open(newline="") as file:
        return {(row["model"], row["size"], int(row["resolution"])): row for row in csv.DictReader(file)}


def printed_row(row: Mapping[str, str]) -> Published:
    """The guided scores that a paper prints for released weights, a row of configs/released_weights.csv."""
    title = registry.architecture(row["model"]).title
    wanted = (title, row["table"], "ImageNet", row["resolution"], f"{title}-{row['size']}", row["cfg_scale"])
    return next(p for p in load_published() if (p.paper, p.table, p.data, str(p.resolution), p.name, p.scale) == wanted)


def _own(path: Path, weights: Weights, claim: Claim, overrides: list[str]) -> tuple[RunConfig, dict[str, str]]:
    """Configuration and provenance of an export of ours."""
    if claim != Claim():
        raise UserError(
            f"{path} is an export of IsoDiff, whose {CONFIG} says what it is. Leave out --model and the like."
        )
    config = build_run([(str(path / CONFIG), read_yaml(path / CONFIG)), ("command line", parse_overrides(overrides))])
    return config, {"weights": OURS, "steps": f"as {CONFIG} says"}


def _foreign(path: Path, weights: Weights, claim: Claim, overrides: list[str]) -> tuple[RunConfig, dict[str, str]]:
    """Configuration, the paper's, and provenance of anybody's weights."""
    if claim.model is None or claim.size is None:
        raise UserError(f"Say what {path} is, such as --model dit --size XL/2; weights do not name themselves.")
    registry.architecture(claim.model)  # must exist
    if not is_diffusers(weights.tensors):
        require_architecture(weights.tensors, weights.file, claim.model)
    resolution = claim.resolution or RESOLUTION
    data = claim.data or f"imagenet{resolution}"
    if data not in registry.names("datamodules"):
        raise UserError(
            f"There is no data set {data}. Give one by --data, such as --data folder with data.classes or data.root."
        )
    row = released().get((claim.model, claim.size, resolution)) if claim.data is None else None
    steps, said_by = _steps(weights, claim, row)
    values: dict[str, Any] = {
        "use": {"model": claim.model, "data": data, "recipe": PAPER, "eval": "fid50k"},
        "model": {"size": claim.size},
        "budget": {"steps": steps},
    }
    if claim.data is not None and claim.resolution is not None:
        values["data"] = {"resolution": claim.resolution}
    about = {"weights": OTHERS, "steps": said_by}
    if row is not None:
        values["data"] = {"autoencoder": row["autoencoder"]}
        if weights.form == STATE_DICT and steps == int(row["steps"]):
            about["weights"] = OFFICIAL if weights.file.name == row["file"] else OTHERS
            printed = printed_row(row)
            guided = f"eval.cfg_scale={row['cfg_scale']}, decoder {row['autoencoder']}"
            about["published"] = f"FID {printed.values['fid']} with {guided} ({printed.where})"
    return build_run([("import", values), ("command line", parse_overrides(overrides))]), about


def _steps(weights: Weights, claim: Claim, row: Mapping[str, str] | None) -> tuple[int, str]:
    """The optimizer steps behind the weights, and who says so. Raises: UserError if nobody does."""
    if claim.steps is not None:
        return claim.steps, "as --steps says"
    if weights.form == STATE_DICT and row is not None and weights.file.name == row["file"]:
        return int(row["steps"]), f"as published: {printed_row(row).where}"
    name = weights.file.parent.stem if weights.file.name == UVIT_EMA else weights.file.stem
    if weights.form != STATE_DICT and name.isdigit() and int(name):
        return int(name), f"by the name of the checkpoint, {name}"
    raise UserError(
        "Give --steps, the optimizer steps that the weights were trained for: images seen and training Gflops follow "
        "from them. They are known of the released files "
        + ", ".join(row["file"] for row in released().values())
        + " under these names."
    )


def _renamed(weights: Weights, config: RunConfig) -> dict[str, Tensor]:
    if not is_diffusers(weights.tensors):
        return weights.tensors
    if not isinstance(config.model, DiTConfig):
        raise UserError(f"{weights.file} is a DiT of diffusers. Give --model dit and its --size.")
    return from_diffusers(weights.tensors, weights.file, config.model)


def _write(config: RunConfig, tensors: Mapping[str, Tensor], steps: int) -> None:
    """The checkpoint, read from the file of the weights as it is written, and the run's configuration."""
    needed = sum(value.nbytes for value in tensors.values())
    config.directory.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(config.directory).free) < needed:
        raise UserError(f"{config.directory} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.")
    with atomic_write(checkpoint_path(config.directory, steps), "wb") as file:
        torch.save({"global_step": steps, "state_dict": {PREFIX + name: v for name, v in tensors.items()}}, file)
    with atomic_write(config.directory / CONFIG) as file:
        file.write(config.to_yaml())
