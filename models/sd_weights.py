"""The weights of Stable Diffusion's autoencoder, as the files people have name them.

Two conventions name the same network: diffusers' (today's and that of the published files), and Latent Diffusion's, in
checkpoints of Stable Diffusion and in U-ViT's autoencoder_kl.pth. Beside the words three things differ there: the
decoder counts its resolutions from the finest to the coarsest, diffusers in the order they are run; attention is made
of 1x1 convolutions, not of linear layers; checkpoints hold more than the autoencoder.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FILES = (  # looked for in a folder: diffusers' two, and U-ViT's
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "autoencoder_kl.pth",
)
CONFIG = "config.json"  # beside diffusers' files
# Attention weights as diffusers' published files name them -> today.
PUBLISHED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

PREFIX = "first_stage_model."  # of the autoencoder in a checkpoint of all of Stable Diffusion
LOSS = "loss."  # the discriminator of the autoencoder's own training
LDM = [  # diffusers -> Latent Diffusion: every rule is applied to a name, in this order
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
]


def read_weights(path: Path, scale: float) -> tuple[dict[str, Tensor], Path]:
    """The autoencoder's tensors in the folder or file `path`, and the file they came from.

    Raises: FileNotFoundError if there is none; ValueError if it holds no plain tensors, or a config.json beside it
    asks for another scale of the latents.
    """
    candidates = [path / name for name in FILES] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(path)
    config = file.parent / CONFIG
    if file.name in FILES and config.is_file():
        try:
            found = json.loads(config.read_text()).get("scaling_factor", scale)
        except (ValueError, AttributeError):  # no JSON, or none of settings
            raise ValueError(f"{config} is damaged: it is no JSON of settings. Fetch it again.") from None
        if found != scale:
            raise ValueError(f"{config} has scaling_factor {found}, not {scale}: this is not Stable Diffusion 1 or 2.")
    try:
        weights = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{file} cannot be read as plain tensors: {reason}. Fetch it again if it is damaged; if it holds other "
            "objects beside the tensors, store those as safetensors."
        ) from error
    for old, new in PUBLISHED.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    return weights, file


def is_ldm(weights: dict[str, Tensor]) -> bool:
    """Whether Latent Diffusion's names are used."""
    return any(name.startswith("encoder.mid.") for name in weights)


def ldm_name(name: str, levels: int) -> str:
    """Latent Diffusion's name of the tensor that diffusers calls `name`, in a network of so many resolutions."""
    for pattern, replacement in LDM:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up\.(\d+)\.", lambda level: f".up.{levels - 1 - int(level[1])}.", name)


def in_diffusers_shapes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Latent Diffusion's tensors without those of its training loss; attention weights (D,D,1,1) become (D,D)."""
    return {
        name: value.flatten(1) if ".attn_1." in name and value.shape[2:] == (1, 1) else value
        for name, value in weights.items()
        if not name.startswith(LOSS)
    }


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as tensors:
        return {short: tensors.get_tensor(name) for short, name in _own(tensors.keys()).items()}


def _read_torch(file: Path) -> dict[str, Tensor]:
    weights = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)  # training checkpoints hold more than weights
    if not (isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())):
        raise RuntimeError("it is no dictionary of tensors")
    return {short: weights[name] for short, name in _own(weights).items()}


def _own(names: Iterable[str]) -> dict[str, str]:
    """The autoencoder's own names -> those in its file, where other networks may lie beside it."""
    inside = {name.removeprefix(PREFIX): name for name in names if name.startswith(PREFIX)}
    return inside or {name: name for name in names}
