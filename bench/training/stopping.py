"""Ending a training between two steps because a signal asked for it or the time is up, on all processes alike."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from bench import signals
from bench.errors import SharedError
from bench.training.callbacks import StepCallback
from bench.training.guard import StepGuard


class OwnSignals(L.Callback):
    """Keeps the signals with `bench.signals`: Lightning's own answer to SIGTERM waits for all processes inside the
    handler, in the middle of a step, and hangs where not all of them got it.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        signals.take_back()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.take_back()


class StopAtStep(OwnSignals, StepCallback):
    """Saves `checkpoint` after the step in which any process got a signal or the time was up, and ends the training.

    The guard knows of both from the one exchange between processes that a step has.
    """

    def __init__(self, checkpoint: Path, guard: StepGuard) -> None:
        self.checkpoint, self.guard = checkpoint, guard
        self.stopped = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.world_size > 1:  # each process has looked for the newest checkpoint by itself
            step = torch.tensor(trainer.global_step, device=trainer.strategy.root_device)
            steps = trainer.strategy.all_gather(step).flatten().tolist()
            if len(set(steps)) > 1:
                raise SharedError(
                    f"The processes found different checkpoints (steps {', '.join(map(str, steps))}), as files changed "
                    "meanwhile. Run the same command again."
                )

    def on_step_end(self, trainer: L.Trainer, step: int) -> None:
        if self.guard.signum:
            signals.heed(self.guard.signum)  # in the last step, too: no process goes on to score alone
        if step == trainer.max_steps:
            return
        self.stopped = bool(self.guard.signum)
        if self.guard.signum or self.guard.late:
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True
