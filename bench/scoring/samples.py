"""The samples of a run: which ones a protocol asks for, and the files that hold them.

runs/<run_id>/samples/step-<steps>-<digest>/
  samples.npz    arr_0 (N,H,W,3) uint8 in index order, labels (N,) int64: the layout ADM's evaluator reads
  grid.png       the first samples of each class, one column a class
  blocks/        finished blocks of a sampling that was interrupted
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench import budget as budgets
from bench.config import RunConfig
from bench.files import atomic_write, short_digest
from bench.scoring.images import ImageSet, NpzImages, write_npz
from models.noise import iid_labels
from models.recipe import SamplerConfig

GRID_ROWS = 8  # samples of each class in a grid
GRID_COLUMNS = 10  # classes shown, or samples in a row where there are no classes


@dataclass(frozen=True)
class Sampling:
    """The part of a protocol that decides the samples, with every default filled in."""

    num_samples: int
    batch_size: int
    seed: int
    labels: str
    cfg_scale: float
    cfg_channels: str
    sampler: SamplerConfig

    @classmethod
    def of(cls, config: RunConfig) -> Sampling:
        scored, recipe = config.eval, config.recipe
        return cls(
            num_samples=scored.num_samples,
            batch_size=scored.batch_size,
            seed=scored.seed,
            labels=scored.labels,
            cfg_scale=scored.cfg_scale,
            cfg_channels=scored.cfg_channels or recipe.cfg_channels,
            sampler=scored.sampler or recipe.sampler,
        )

    def blocks(self) -> list[range]:
        """Sample indices in blocks of batch_size; the last block may be shorter.

        Blocks are what processes share out, so a block is computed in the same batch whatever their number.
        """
        n, size = self.num_samples, self.batch_size
        return [range(start, min(start + size, n)) for start in range(0, n, size)]

    def gflops(self, forward: float, num_classes: int) -> float:
        """Gflops to draw one image, where a forward costs `forward`; without classes there is nothing to guide by."""
        return budgets.sample_gflops(forward, self.sampler.steps, guided=self.cfg_scale != 1 and num_classes > 0)

    def draw_labels(self, indices: Sequence[int], num_classes: int) -> Tensor | None:
        """The labels asked for, (len(indices),) int64, or None if unconditional."""
        if num_classes == 0:
            return None
        if self.labels == "balanced":
            return torch.tensor([i % num_classes for i in indices])
        return iid_labels(self.seed, indices, num_classes)

    def directory(self, run: Path, step: int) -> Path:
        return run / "samples" / f"step-{step:08d}-{short_digest(json.dumps(asdict(self), sort_keys=True))}"


def sampling_protocol(config: RunConfig) -> dict[str, Any]:
    """The part of a protocol that decides the samples, flat, as stored with each row."""
    s = Sampling.of(config)
    return {
        "name": config.eval.name,
        "version": config.eval.version,
        "num_samples": s.num_samples,
        "labels": s.labels,
        "seed": s.seed,
        "cfg_scale": s.cfg_scale,
        "cfg_channels": s.cfg_channels,
        **{f"sampler{'' if key == 'name' else '_' + key}": value for key, value in asdict(s.sampler).items()},
        "batch_size": s.batch_size,
    }


class SampleFiles:
    """Blocks while sampling, one samples.npz and a grid when all are there."""

    def __init__(self, directory: Path, sampling: Sampling) -> None:
        self.directory, self.sampling = directory, sampling
        self.path, self.grid = directory / "samples.npz", directory / "grid.png"
        self._complete: NpzImages | None = None

    def read(self, block: range) -> Tensor | None:
        """Images (B,3,H,W) uint8 of a block, or None if they are not drawn yet."""
        if self._complete is None and self.path.exists():
            self._complete = NpzImages(self.path)
        if self._complete is not None:
            return self._complete.read(block)
        path = self._block_path(block)
        return torch.from_numpy(np.load(path, allow_pickle=False)).permute(0, 3, 1, 2) if path.exists() else None

    def write(self, block: range, images: Tensor) -> None:
        """Keep the images (B,3,H,W) uint8 of a finished block."""
        with atomic_write(self._block_path(block), "wb") as file:
            np.save(file, images.permute(0, 2, 3, 1).cpu().numpy())

    def finish(self, num_classes: int) -> None:
        """All blocks into samples.npz and grid.png, then they are removed. One process calls this."""
        if not self.path.exists():
            blocks = self.sampling.blocks()
            labels = self.sampling.draw_labels(range(self.sampling.num_samples), num_classes)
            arrays = {} if labels is None else {"labels": labels.numpy()}
            with atomic_write(self.path, "wb") as file:
                write_npz(file, self.sampling.num_samples, (self._load(block) for block in blocks), arrays)
        if not self.grid.exists():
            labels = self.sampling.draw_labels(range(self.sampling.num_samples), num_classes)
            write_grid(self.grid, NpzImages(self.path), labels)
        shutil.rmtree(self.directory / "blocks", ignore_errors=True)

    def _load(self, block: range) -> np.ndarray:
        return np.load(self._block_path(block), allow_pickle=False)

    def _block_path(self, block: range) -> Path:
        return self.directory / "blocks" / f"{block.start:08d}-{block.stop:08d}.npy"


def write_grid(path: Path, images: ImageSet, labels: Tensor | None) -> None:
    """A PNG of the first samples: one column a class (the first classes), or row by row without classes."""
    if labels is None:
        columns = [list(range(c, images.n, GRID_COLUMNS)) for c in range(min(GRID_COLUMNS, images.n))]
    else:
        columns = [(labels == c).nonzero().flatten().tolist() for c in labels.unique()[:GRID_COLUMNS]]
    height, width = images.size
    canvas = np.full((GRID_ROWS * (height + 2), len(columns) * (width + 2), 3), 255, np.uint8)
    for c, column in enumerate(columns):
        for r, index in enumerate(column[:GRID_ROWS]):
            y, x = r * (height + 2) + 1, c * (width + 2) + 1
            canvas[y : y + height, x : x + width] = images.read(range(index, index + 1))[0].permute(1, 2, 0)
    with atomic_write(path, "wb") as file:
        Image.fromarray(canvas).save(file, format="PNG")
