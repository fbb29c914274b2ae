"""The EMA weights of a run for others: safetensors and config, or a folder that diffusers' DiTPipeline loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bench.budget import BudgetConfig
from bench.config import PathsConfig, RunConfig
from bench.console import say
from bench.errors import UserError
from bench.evaluate import trained_checkpoint
from bench.exchange.imported import CONFIG, PREFIX
from bench.training.checkpoints import checked
from bench.training.plan import plan_training
from models.autoencoder import SD_NAMES, AutoencoderConfig, load_autoencoder
from models.base import BackboneSpec
from models.diffusers_dit import scheduler_card, to_diffusers, transformer_card
from models.dit import DiTConfig
from models.pretrained import DIFFUSERS, EXPORT

FORMATS = ("safetensors", "diffusers")


def export_run(config: RunConfig, out: Path, fmt: str, step: int | None = None) -> None:
    """Write the weights at `step` (None: the last) into the new folder `out`; it appears whole or not at all.

    Raises: UserError if the folder is there, the run has no such checkpoint or a damaged one, or the format cannot
    hold it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already. Give --out a folder that is not.")
    plan = plan_training(config)
    step = plan.budget.steps if step is None else step
    state = checked(trained_checkpoint(config, step), config)["state_dict"]
    tensors = {name.removeprefix(PREFIX): value for name, value in state.items()}
    out = out.resolve()  # `.` has no name to put a temporary one beside
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        lines = (_diffusers if fmt == "diffusers" else _ours)(config, plan.spec, tensors, step, temporary)
        temporary.replace(out)
    except ValueError as error:
        raise UserError(str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{out}: EMA weights of {config.run_id} after {step:,} steps")
    for line in lines:
        say(f"  {line}")


def _ours(config: RunConfig, spec: BackboneSpec, tensors: Mapping[str, Tensor], step: int, out: Path) -> list[str]:
    """model.safetensors and config.yaml, without this machine's paths; an earlier step is a shorter run."""
    portable = replace(
        config,
        data=replace(config.data, root=None, autoencoder_path=None),
        budget=config.budget if step == plan_training(config).budget.steps else BudgetConfig(steps=step),
        paths=PathsConfig(),
    )
    # What it is stands in the configuration; of several entries here, the order would be another each time.
    save_file(dict(tensors), out / EXPORT, {"format": "pt"})
    (out / CONFIG).write_text(portable.to_yaml())
    return [
        f"{EXPORT}, {CONFIG}; read again by: python -m bench import",
        f"not included: the autoencoder ({config.data.autoencoder}), the data, the optimizer",
    ]


def _diffusers(config: RunConfig, spec: BackboneSpec, tensors: Mapping[str, Tensor], step: int, out: Path) -> list[str]:
    """transformer/, scheduler/, model_index.json, and vae/ where the run has Stable Diffusion's autoencoder by path."""
    if not isinstance(config.model, DiTConfig):
        raise UserError("diffusers has a network for DiT alone. Leave out --format diffusers: safetensors takes any.")
    transformer, scheduler = transformer_card(config.model, spec), scheduler_card(config.recipe.process)
    for folder in ("transformer", "scheduler"):
        (out / folder).mkdir()
    save_file(to_diffusers(tensors, config.model), out / "transformer" / DIFFUSERS[0], {"format": "pt"})
    _write_json(out / "transformer" / "config.json", transformer)
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    data = config.data
    with_vae = data.autoencoder in SD_NAMES and data.autoencoder_path is not None
    if with_vae:
        load_autoencoder(AutoencoderConfig(data.autoencoder, data.autoencoder_path)).net.save_pretrained(out / "vae")
    parts = {"transformer": transformer, "scheduler": scheduler}
    index = {name: ["diffusers", card["_class_name"]] for name, card in parts.items()}
    index["vae"] = ["diffusers", "AutoencoderKL"] if with_vae else [None, None]
    about = {"_class_name": "DiTPipeline", "_diffusers_version": transformer["_diffusers_version"]}
    _write_json(out / "model_index.json", about | index)
    lines = ["transformer/, scheduler/ (DDIM), model_index.json" + (f", vae/ ({data.autoencoder})" if with_vae else "")]
    if not with_vae:
        lines.append("not included: vae/; give DiTPipeline.from_pretrained a vae, or export with data.autoencoder_path")
    lines.append(
        "diffusers gives the timestep other frequencies than DiT; for the outputs of this run set them right: for block"
        " in pipeline.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"
    )
    if spec.num_classes != 1000:
        lines.append(f"DiTPipeline takes 1000 for 'no class', here it is {spec.num_classes}: use guidance_scale=1")
    return lines


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
