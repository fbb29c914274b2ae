"""Weights as other programs store them: a file or a folder in, named tensors out. Nothing in a file is ever executed.

Read are
- a state dict, as DiT (.pt) and U-ViT (.pth) release their EMA weights, or a safetensors file;
- a checkpoint of DiT's trainer, or fast-DiT's: {model, ema, opt, args}; `ema` is taken;
- a checkpoint folder of U-ViT's trainer; its nnet_ema.pth is taken;
- a folder of diffusers: a transformer, or the pipeline around one (models/diffusers_dit.py renames its tensors);
- our own checkpoints, whose state_dict holds the EMA weights, and our own exports.

Tensors stay in their file until they are used (memory-mapped), in the type they are stored in.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

EXPORT = "model.safetensors"  # in a folder of ours
UVIT_EMA, UVIT_RAW = "nnet_ema.pth", "nnet.pth"
DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
IN_FOLDER = (EXPORT, UVIT_EMA, *DIFFUSERS, *(f"transformer/{name}" for name in DIFFUSERS))  # the first found is read

STATE_DICT, TRAINER = "state dict", "training checkpoint"
RAW = ("model", "state_dict", "nnet")  # what trainers call weights that are no average
PREFIXES = ("module.", "backbone.")  # of every name: DistributedDataParallel's, and our module's
LISTED = 4  # tensors named in a report, of each kind


@dataclass(frozen=True)
class Weights:
    """EMA weights and where they were."""

    tensors: dict[str, Tensor]
    file: Path
    form: str  # STATE_DICT | TRAINER
    taken: str  # the part with the EMA weights: ema, nnet_ema.pth, or "all of it"


def read_weights(path: Path) -> Weights:
    """The EMA weights in the file or folder `path`.

    Raises: ValueError if there is no such file, it is damaged or no file of weights, or holds no EMA weights.
    """
    file = _file_of(path)
    loaded = _load(file)
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, not named tensors. Give a file with a state dict.")
    taken = _ema_of(file, loaded)
    tensors = loaded if taken is None else loaded[taken]
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file} holds no named tensors, but {_listed(list(map(str, tensors)))}. Give a state dict.")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise ValueError(f"{file}: {name} is {value.dtype}; weights of a backbone are floating-point numbers.")
    if taken is None and file.name == UVIT_EMA:
        taken = UVIT_EMA
    return Weights(dict(tensors), file, STATE_DICT if taken is None else TRAINER, taken or "all of it")


def differences(given: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> str:
    """What tells the shapes by name apart: '2 missing (a, b), 1 of another shape (c is (3,), not (4,))', or ''."""
    missing = [name for name in needed if name not in given]
    unknown = [name for name in given if name not in needed]
    reshaped = [f"{n} is {given[n]}, not {shape}" for n, shape in needed.items() if given.get(n, shape) != shape]
    kinds = (("missing", missing), ("unexpected", unknown), ("of another shape", reshaped))
    return ", ".join(f"{len(names)} {kind} ({_listed(names)})" for kind, names in kinds if names)


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join(names[:LISTED] + more) or "nothing"


def _file_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}.")
    for name in IN_FOLDER:
        if (path / name).is_file():
            return path / name
    if (path / UVIT_RAW).is_file():
        raise ValueError(f"{path} holds raw weights only ({UVIT_RAW}); scores are of EMA weights, {UVIT_EMA}.")
    raise ValueError(f"{path} holds no weights that are known. Expected is one of {', '.join(IN_FOLDER)}.")


def _load(file: Path) -> Any:
    with file.open("rb") as opened:
        head = opened.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the weights it stands for. Fetch those: git lfs pull.")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{file} is a web page: the download was answered by a page, not by the file. Fetch it again.")
    zipped = head.startswith(b"PK")  # torch's format since 1.6; older files cannot be mapped
    if not head or (zipped and not zipfile.is_zipfile(file)):  # the directory of a zip stands at its end
        raise ValueError(f"{file} is cut off after {file.stat().st_size:,} bytes. Fetch it again.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):  # `args` of DiT's trainer
            warnings.simplefilter("ignore")  # at a newer pickle, which the error says better
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{file} holds more than tensors ({found[1]}), which could run code and is not loaded. Store the "
                "weights alone, as a state dict or as safetensors."
            ) from None
        if head.startswith(b"\x80"):  # as every pickle since Python 2
            raise ValueError(
                f"{file} is a pickle, but not one of torch's; it could run code and is not loaded."
            ) from None
        raise ValueError(f"{file} holds no weights: it is a file neither of torch nor of safetensors.") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = (
            str(error).partition("\n")[0].partition(". ")[0]
            if isinstance(error, SafetensorError | RuntimeError)
            else ""
        )
        said = f" ({reason.rstrip('.')})" if reason else ""
        raise ValueError(
            f"{file} cannot be read as weights{said}: damaged, cut off, or another kind of file."
        ) from None


def _ema_of(file: Path, loaded: dict[Any, Any]) -> str | None:
    """The entry with the EMA weights; None if every entry is one. Raises: ValueError if there are raw weights only."""
    for key, witness in (("ema", "ema"), ("state_dict", "current_model_state")):
        if witness in loaded and isinstance(loaded.get(key), dict):
            return key
    if set(loaded) == {"global_step", "state_dict"}:  # of weights that were imported: EMA alone
        return "state_dict"
    if any(isinstance(loaded.get(key), dict) for key in RAW):
        raise ValueError(
            f"{file} is a training checkpoint with raw weights only ({_listed(list(map(str, loaded)))}); scores are of "
            "EMA weights. Give a checkpoint that has 'ema', or a file with the state dict alone."
        )
    return None
