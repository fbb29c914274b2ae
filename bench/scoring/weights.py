"""Weights of the networks behind features: their files, given or fetched once, and how they enter a network."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bench.console import progress, say
from bench.errors import UserError
from bench.files import atomic_write
from datamodules.raw import user_cache

TIMEOUT = 60  # seconds without a byte before a fetch is given up
BLOCK = 1 << 20  # bytes per read of a fetch


@dataclass(frozen=True)
class PublishedFile:
    """Where a file of weights is published, and what it is."""

    url: str
    sha256: str  # 64 hex digits
    only: bool = True  # a given file must be this very one; False: any file with the network's entries will do

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def is_another(self, found: str, where: object, fate: str = "") -> UserError:
        """The error for a file at `where` whose SHA-256 is `found`; `fate` says what became of it."""
        return UserError(
            f"{where} is another file than {self.name}: its SHA-256 begins with {found[:16]}, not {self.sha256[:16]}."
            + fate
        )


def read_weights(
    extractor: str, published: PublishedFile, given: Path | None, fetch: bool
) -> tuple[dict[str, Tensor], str]:
    """The state dict and the SHA-256 of the file `given`, or else of the one in the cache, which `fetch` may fill.

    Raises: UserError if there is no file, if it is another one than published, or if it holds no weights.
    """
    path = given or user_cache() / published.name
    if given is None and not path.is_file():
        if not fetch:
            raise UserError(
                f"Extractor {extractor} needs weights: get {published.url} and pass eval.extractor_weights=PATH, "
                f"or pass eval.fetch_weights=true to have it fetched once into {path.parent}."
            )
        _fetch(published, path)
    if not path.is_file():
        raise UserError(f"There is no file {path}; eval.extractor_weights should be the weights of {extractor}.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != published.sha256:
        if given is None:
            path.unlink()
            raise published.is_another(found, path, " It was removed; eval.fetch_weights=true fetches it again.")
        if published.only:
            raise published.is_another(found, path)
    return _state(path), found


def _fetch(published: PublishedFile, path: Path) -> None:
    """Put the published file at `path`, all of it or nothing."""
    say(f"fetching {published.url} into {path.parent}")
    digest = hashlib.sha256()
    try:
        with urlopen(published.url, timeout=TIMEOUT) as response, atomic_write(path, "wb") as file:
            size = int(response.headers["Content-Length"] or 0) or None
            with progress(total=size, desc=published.name, unit="B", unit_scale=True) as bar:
                while block := response.read(BLOCK):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
            if digest.hexdigest() != published.sha256:
                raise published.is_another(digest.hexdigest(), published.url, " Nothing of it was kept.")
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{published.url} could not be fetched ({error}). Try again, or get it in another way and pass "
            "eval.extractor_weights=PATH."
        ) from None


def _state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is no state dict: a mapping from names to tensors is expected.")
    return state


def load_weights(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state` in place of the network's own entries. Raises: UserError unless names and shapes are the same."""
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted(wanted.keys() | given.keys()):
        if wanted.get(key) != given.get(key):
            raise UserError(
                f"These are not the weights of {name}: {key} should be {wanted.get(key, 'absent')}, it is "
                f"{given.get(key, 'absent')}."
            )
    network.load_state_dict(state, assign=True)


def resample_positions(table: Tensor, cells: int) -> Tensor:
    """Position table of M x M patches for cells x cells, as DINOv2 does: (1, 1 + M^2, D) -> (1, 1 + cells^2, D).

    Bicubic, not antialiased, by the factor (cells + 0.1) / M, which shifts the far edge by a tenth of a patch. timm
    would antialias, by cells / M: another table, and other features than those of dgm-eval and EDM2.
    """
    side = math.isqrt(table.shape[1] - 1)
    if side == cells:
        return table
    grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, M, M)
    grid = interpolate(grid.float(), scale_factor=(cells + 0.1) / side, mode="bicubic")  # (1, D, cells, cells)
    return torch.cat([table[:, :1], grid.flatten(2).mT], 1)


# Convolution and the batch norm after it: of Inception, of EfficientNet's stem and head, of its blocks.
_CONVOLUTIONS = ("conv", "_conv_stem", "_conv_head", "_expand_conv", "_depthwise_conv", "_project_conv")
_NORMS = ("bn", "_bn0", "_bn1", "_bn0", "_bn1", "_bn2")


def fold_batch_norm(network: nn.Module) -> None:
    """Put each batch norm into the convolution before it: 10 to 25 % faster, features within 3e-6."""
    for module in list(network.modules()):
        for conv, norm in zip(_CONVOLUTIONS, _NORMS, strict=True):
            if hasattr(module, conv):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())


def random_weights(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Seeded random weights in the order of the state dict, one Philox stream per entry; convolutions keep variance."""
    state = {}
    for i, (key, value) in enumerate(network.state_dict().items()):
        shape = tuple(value.shape)
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, 1000 + i], dtype=np.uint64)))
        if key.endswith("num_batches_tracked"):
            array = np.zeros(shape)
        elif key.endswith("conv.weight"):
            array = rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        elif key.endswith("bn.weight"):
            array = np.ones(shape)
        elif key.endswith("running_var"):
            array = rng.uniform(0.5, 1.5, shape)
        else:  # 0.1: bias and running mean of a batch norm
            array = rng.standard_normal(shape) * {"fc.weight": 0.05, "fc.bias": 1.0}.get(key, 0.1)
        state[key] = torch.from_numpy(array).to(value.dtype)
    return state
