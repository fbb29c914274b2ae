"""The machine side of a run: Lightning's Trainer, and how the backbone is computed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from bench.config import RunConfig, TrainerConfig
from bench.console import quiet_lightning
from bench.device import device_of
from bench.errors import UserError
from bench.training.callbacks import CheckpointAt
from bench.training.checkpoints import CheckpointFiles
from bench.training.compiling import compile_backbone
from bench.training.plan import TrainingPlan
from models.base import DiffusionModule


def prepare_backbone(module: DiffusionModule, machine: TrainerConfig) -> None:
    """Activation checkpointing and compilation, where asked for. Raises: UserError if they cannot be had here."""
    if machine.activation_checkpointing:
        try:
            module.recompute_activations()
        except ValueError as error:
            raise UserError(str(error)) from None
    if machine.compile:
        compile_backbone(module, device_of(machine.accelerator).type)


class LastCheckpoint(ModelCheckpoint):
    """Saves between steps alone: a checkpoint holds no gradients of a step that is half done."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def build_trainer(
    config: RunConfig, plan: TrainingPlan, directory: Path, first: list[L.Callback], last: Sequence[L.Callback] = ()
) -> L.Trainer:
    """Lightning's Trainer for one run: DDP where there are several processes, checkpoints at the scored steps.

    Callbacks `first`, EMA at their head, see a step before its checkpoint is saved, those of `last` after that. A
    StepGuard among them clips gradients.
    """
    quiet_lightning()
    machine, checkpoints = config.trainer, directory / "checkpoints"
    return L.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy="ddp" if machine.devices * machine.num_nodes > 1 else "auto",
        precision=machine.precision,  # type: ignore[arg-type]
        max_steps=plan.budget.steps,
        max_epochs=-1,
        accumulate_grad_batches=machine.accumulate,
        use_distributed_sampler=False,  # the data module shares positions out itself, without padding
        callbacks=[
            *first,
            CheckpointAt(directory, plan.checkpoint_steps),
            *last,
            LastCheckpoint(
                checkpoints,
                filename="last",
                save_top_k=1,
                train_time_interval=timedelta(minutes=machine.checkpoint_minutes),
                enable_version_counter=False,
            ),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        default_root_dir=directory,
        plugins=[CheckpointFiles()],
    )
