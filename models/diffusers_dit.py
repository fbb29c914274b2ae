"""DiT's tensors under diffusers' names, both ways: the folder of a DiTTransformer2DModel.

There queries, keys and values are three linear layers, every block holds its own copy of the embedders of timestep and
label, and positions are computed, not stored. Two things differ when diffusers runs it. Its sinusoid of the timestep
has the frequencies 10000^(-i/127), DiT's 10000^(-i/128), so outputs differ for every t but 0; no setting changes it but
the attribute `downscale_freq_shift` of the loaded network. And the second norm of a block has an epsilon of 1e-5 by
default, DiT 1e-6; our config.json sets the latter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base import BackboneSpec
from models.dit import DiTConfig
from models.layers import sincos_positions
from models.recipe import ProcessConfig

CONFIG = "config.json"
POSITIONS = "pos_embed"
# ours -> theirs, without "weight" and "bias"
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
QKV, PARTS = "attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")
EMBEDDERS = {  # in every block of theirs, below norm1.emb
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
# Settings of theirs that DiT fixes.
FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # of an IDDPM -> diffusers' names


def is_diffusers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are diffusers'."""
    return any(name.startswith("transformer_blocks.") for name in tensors)


def from_diffusers(tensors: Mapping[str, Tensor], file: Path, config: DiTConfig) -> dict[str, Tensor]:
    """DiT's tensors out of diffusers', read from `file`; names that are not known stay as they are.

    Raises: ValueError if the config.json beside the file is missing or of another network, or blocks have embedders of
    their own.
    """
    card = _read_card(file)
    heads = config.parts[2]
    needed = FIXED | {"num_attention_heads": heads}
    for key, value in needed.items():
        if card.get(key, value) != value:
            raise ValueError(f"{file.parent / CONFIG}: {key} is {card[key]!r}; DiT-{config.size} has {value!r}.")
    rest = dict(tensors)
    result: dict[str, Tensor] = {}
    for ours, names in _names(card["num_layers"]).items():
        if all(name in rest for name in names):
            parts = [rest.pop(name) for name in names]
            result[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    for block in range(card["num_layers"]):
        for ours, theirs in _embedders(block).items():
            if theirs not in rest:
                raise ValueError(f"{file} has no {theirs}; in diffusers every block has its own copy.")
            copy = rest.pop(theirs)
            if not torch.equal(result.setdefault(ours, copy), copy):
                raise ValueError(f"{file}: {theirs} differs from that of the first block; DiT has one for all blocks.")
    side = card["sample_size"] // card["patch_size"]
    result[POSITIONS] = sincos_positions(heads * card["attention_head_dim"], side, side)
    return result | rest


def to_diffusers(tensors: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Diffusers' tensors out of DiT's; parts of one tensor share its memory, copies of embedders have their own."""
    depth = config.parts[0]
    result: dict[str, Tensor] = {}
    for ours, names in _names(depth).items():
        result |= zip(names, tensors[ours].chunk(len(names)), strict=True)
    for block in range(depth):
        result |= {theirs: tensors[ours].clone() for ours, theirs in _embedders(block).items()}
    return result


def transformer_card(config: DiTConfig, spec: BackboneSpec) -> dict[str, Any]:
    """The config.json of a DiTTransformer2DModel that computes what our DiT does, but for the sinusoid.

    Raises: ValueError if diffusers has no such network.
    """
    depth, width, heads, patch_size = config.parts
    if not spec.num_classes:
        raise ValueError("diffusers' DiT has classes, and this run has none. Export it as safetensors.")
    if config.mlp_ratio != 4:
        raise ValueError(
            f"diffusers' DiT has model.mlp_ratio 4, this run {config.mlp_ratio}. Export it as safetensors."
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": version("diffusers"),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "num_layers": depth,
        "sample_size": spec.latent_size,
        "patch_size": patch_size,
        "num_embeds_ada_norm": spec.label_rows - 1,  # their table has one row more
        "norm_eps": 1e-6,
        **FIXED,
    }


def scheduler_card(process: ProcessConfig) -> dict[str, Any]:
    """The scheduler_config.json of a DDIMScheduler with the run's noise. Raises: ValueError if it is no IDDPM."""
    if process.name != "iddpm":
        raise ValueError(f"diffusers' DiT is an IDDPM, this run's process is {process.name}. Export it as safetensors.")
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": version("diffusers"),
        "num_train_timesteps": process.num_timesteps,
        "beta_schedule": BETAS[process.betas],
        "beta_start": 1e-4 * 1000 / process.num_timesteps,
        "beta_end": 0.02 * 1000 / process.num_timesteps,
        "prediction_type": {"eps": "epsilon", "x0": "sample"}[process.prediction],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }


def _read_card(file: Path) -> dict[str, Any]:
    path = file.parent / CONFIG
    if not path.is_file():
        raise ValueError(f"{file} has diffusers' names, but no {CONFIG} beside it, which says how many heads it has.")
    try:
        card = json.loads(path.read_text())
        for key in ("num_layers", "sample_size", "patch_size", "attention_head_dim"):
            if not isinstance(card[key], int):
                raise ValueError(f"{key} is {card[key]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of a DiTTransformer2DModel ({error}).") from None
    return card


def _names(depth: int) -> dict[str, tuple[str, ...]]:
    """Ours -> theirs, whose rows it is one below the other; without positions and embedders."""
    found: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in OUTSIDE.items()}
    for i in range(depth):
        found |= {f"blocks.{i}.{ours}": (f"transformer_blocks.{i}.{theirs}",) for ours, theirs in IN_BLOCK.items()}
        found[f"blocks.{i}.{QKV}"] = tuple(f"transformer_blocks.{i}.{part}" for part in PARTS)
    kinds = ("weight", "bias")
    return {f"{ours}.{k}": tuple(f"{name}.{k}" for name in theirs) for ours, theirs in found.items() for k in kinds}


def _embedders(block: int) -> dict[str, str]:
    return {ours: f"transformer_blocks.{block}.norm1.emb.{theirs}" for ours, theirs in EMBEDDERS.items()}
