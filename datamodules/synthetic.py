"""Seeded random images and latents for tests: small, instant, meaningless."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from datamodules.base import DataConfig, DataSet, LatentDataModule, subset_rows
from datamodules.cache import CacheMeta
from datamodules.prepare import prepare_cache

COUNT, SIDE, CLASSES = 64, 16, 4


def load_images(config: DataConfig) -> tuple[Tensor, Tensor]:
    """-> images uint8 (n,3,16,16) whose brightness rises with the class, labels (n,) int64.

    Raises: ValueError if a choice of pictures, or another resolution than 16 is asked for.
    """
    config.require_defaults("synthetic images", "root", "crop", "classes")
    if config.resolution not in (None, SIDE):
        raise ValueError(f"data.resolution is {config.resolution}; synthetic images have {SIDE}.")
    labels = torch.arange(COUNT) % CLASSES
    noise = torch.randint(64, (COUNT, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    rows = subset_rows(COUNT, config.subset)
    return (noise + 48 * labels[:, None, None, None]).to(torch.uint8)[rows], labels[rows]


def write_cache(path: Path, latent_shape: tuple[int, int, int] = (4, 8, 8), count: int = COUNT) -> Path:
    """A latent cache of random moments at `path`: means standard normal, posterior std 0.1, classes in turn."""
    generator = torch.Generator().manual_seed(0)

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.randn(len(images), *latent_shape, generator=generator)
        return mean, torch.full_like(mean, -4.6)  # log 0.1^2

    unit, zero = (1.0,) * latent_shape[0], (0.0,) * latent_shape[0]
    meta = CacheMeta("synthetic", CLASSES, SIDE, "random", "none", "none", latent_shape, unit, zero)
    prepare_cache(torch.zeros(count, 3, 1, 1), torch.arange(count) % CLASSES, encode, path, meta, progress=False)
    return path


DATASET = DataSet(
    title="Synthetic",
    image_size=SIDE,
    num_classes=CLASSES,
    image_rule="drawn at its size",
    module=LatentDataModule,
    images=load_images,
)
