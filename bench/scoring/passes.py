"""One pass over images: blocks in, scores out, exact under any number of processes.

Rank r takes blocks r, r + world size, ... of the image indices; nothing is padded or repeated, and no collective runs
outside `compute`. The features of a finished block stay on disk until the pass has ended, so a pass that was killed
goes on where it was, with any number of processes, and ends with the digits of one that was not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench import metrics
from bench.config import TrainerConfig
from bench.console import progress, quiet_lightning
from bench.device import device_name, require_device
from bench.errors import UserError
from bench.files import atomic_write, short_digest
from bench.metrics.base import share_states
from bench.scoring.scorer import Scorer
from bench.store import provenance
from bench.training.stopping import OwnSignals


class Source(Protocol):
    """Images in blocks of consecutive indices, drawn or read."""

    num_samples: int
    blocks: list[range]

    def images(self, block: range) -> Tensor:
        """(B, 3, H, W) uint8 on any device."""

    def labels(self, block: range) -> Tensor | None:
        """The classes asked for, (B,) int64, or None."""

    def finish(self) -> None:
        """All blocks of all processes are through; called on the first process."""


class FeatureBlocks:
    """The features of finished blocks, float32, one safetensors file each."""

    def __init__(self, parent: Path, scorer: Scorer | None) -> None:
        """Blocks lie in a folder of `parent` named by the extractor."""
        extractor = scorer.extractor if scorer else None
        name = f"{extractor.name}-{short_digest(extractor.sha256 + extractor.precision)}" if extractor else "none"
        self.directory = parent / f"features-{name}"

    def read(self, block: range) -> dict[str, Tensor] | None:
        path = self._path(block)
        return safetensors.torch.load_file(path) if path.exists() else None

    def write(self, block: range, features: dict[str, Tensor]) -> None:
        with atomic_write(self._path(block), "wb") as file:
            file.write(safetensors.torch.save({name: rows.cpu().contiguous() for name, rows in features.items()}))

    def remove(self) -> None:
        """Remove them, and the parent folder if nothing else is in it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        with suppress(OSError):
            self.directory.parent.rmdir()

    def _path(self, block: range) -> Path:
        return self.directory / f"{block.start:08d}-{block.stop:08d}.safetensors"


class ScoringPass(L.LightningModule):
    """Images, features and scores block after block; each metric is reduced over processes once."""

    def __init__(self, source: Source, scorer: Scorer | None, kept: FeatureBlocks) -> None:
        """scorer None: only go through the images, which draws them."""
        super().__init__()
        self.source, self.kept = source, kept
        self.extractor: Any = scorer.extractor if scorer else None
        self.specs = scorer.metrics if scorer else ()
        self.metrics = torch.nn.ModuleDict()  # by the features they take; those that keep the same states share them
        if scorer is not None:
            built = {spec: spec.build(scorer.reference, source.num_samples) for spec in self.specs}
            for feature in dict.fromkeys(spec.feature for spec in self.specs):
                self.metrics[feature] = share_states({s.name: m for s, m in built.items() if s.feature == feature})
        self.scores: dict[str, metrics.Score] = {}

    def test_dataloader(self) -> DataLoader:
        rank, world, blocks = self.trainer.global_rank, self.trainer.world_size, self.source.blocks
        require_enough_blocks(blocks, self.source.num_samples, world)
        return DataLoader(blocks[rank::world], batch_size=None, collate_fn=lambda block: block)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: range, device: torch.device, dataloader_idx: int) -> range:
        return batch

    def on_test_start(self) -> None:
        desc = "sampling and scoring" if self.extractor is not None else "sampling"
        self._bar = progress(total=self.source.num_samples, unit="image", desc=desc)

    def test_step(self, block: range, batch_idx: int) -> None:
        if self.extractor is None:
            self.source.images(block)
        else:
            features, labels = self._features(block), self.source.labels(block)
            for feature, metric in self.metrics.items():
                metric.update(features[feature], torch.tensor(block), labels)  # type: ignore[operator]
        self._bar.update(len(block) * self.trainer.world_size)

    def on_test_epoch_end(self) -> None:
        self._bar.close()
        scores: dict[str, metrics.Score] = {}
        for metric in self.metrics.values():
            scores |= metric.compute()  # type: ignore[operator]
        for spec in self.specs:
            column = metrics.column(spec.name, self.extractor.name, self.source.num_samples, self.extractor.precision)
            self.scores[column] = scores[spec.name]
        self.trainer.strategy.barrier("samples")  # every block of every process is on disk
        if self.trainer.is_global_zero:
            self.source.finish()

    def _features(self, block: range) -> dict[str, Tensor]:
        """What is on disk, or computed now and kept."""
        features = self.kept.read(block)
        if features is None:
            features = self.extractor(self.source.images(block), indices=block)
            self.kept.write(block, features)
        return features


def require_enough_blocks(blocks: list[range], num_samples: int, world: int) -> None:
    """Raises: UserError if some of `world` processes would have nothing to do."""
    if len(blocks) < world:
        raise UserError(
            f"{num_samples} images in blocks of {len(blocks[0])} are {len(blocks)} blocks, fewer than the {world} "
            "processes. Lower eval.batch_size or trainer.devices."
        )


def measured(world_size: int, scores: Mapping[str, metrics.Score], machine: TrainerConfig) -> dict[str, Any]:
    """What a stored row says of its scores: values, intervals, and what they were computed with."""
    return {
        "scores": {column: score.value for column, score in scores.items()},
        "ci95": {column: score.ci95 for column, score in scores.items()},
        "world_size": world_size,
        "device": device_name(machine.accelerator),
        **provenance(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run_pass(
    source: Source, scorer: Scorer | None, machine: TrainerConfig, kept: FeatureBlocks
) -> tuple[int, dict[str, metrics.Score]]:
    """One pass over all images of `source` -> (world size, scores by column).

    Raises: UserError if a GPU is asked for where there is none.
    """
    require_device(machine.accelerator)
    quiet_lightning()
    scoring = ScoringPass(source, scorer, kept)
    trainer = L.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy="ddp" if machine.devices * machine.num_nodes > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=[OwnSignals()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=kept.directory.parent,
    )
    try:
        trainer.test(scoring, verbose=False)
    except SystemExit:  # Lightning's answer to Ctrl-C and SIGTERM
        raise KeyboardInterrupt from None
    return trainer.world_size, scoring.scores
