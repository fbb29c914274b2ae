"""EMA, checkpoints and the log around a small real training."""

from __future__ import annotations

from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from bench.training.callbacks import EMA, CheckpointAt
from bench.training.checkpoints import checkpoint_path
from bench.training.trainer import LastCheckpoint


class Line(L.LightningModule):
    """One weight that moves by -0.1 a step (SGD on the sum of weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(100), batch_size=1)


class ClockRunsOut(L.Callback):
    """Lets the time between timed checkpoints end in the middle of the second step; keeps where they are saved."""

    def __init__(self, timed):
        self.timed, self.saved = timed, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 4:
            self.timed._last_time_checked = float("-inf")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.saved.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def fit(directory, steps, callbacks, ckpt_path=None, accumulate=1):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        default_root_dir=directory,
    )
    trainer.fit(Line(), ckpt_path=ckpt_path, weights_only=True)


def expected_average(steps: int, decay) -> float:
    """The recursion of DiT's training script, from the initial weight on."""
    average, weight = 1.0, 1.0
    for n in range(1, steps + 1):
        weight -= 0.1
        average = decay(n) * average + (1 - decay(n)) * weight
    return average


@pytest.mark.parametrize("warmup, decay", [(False, lambda n: 0.8), (True, lambda n: min(0.8, (1 + n) / (10 + n)))])
def test_ema_follows_the_recursion_from_the_initial_weights(tmp_path, warmup, decay):
    fit(tmp_path, 9, [EMA(0.8, warmup), CheckpointAt(tmp_path, [4, 9])])
    for steps in (4, 9):
        checkpoint = torch.load(checkpoint_path(tmp_path, steps), weights_only=True)
        assert checkpoint["state_dict"]["weight"].item() == pytest.approx(expected_average(steps, decay), rel=1e-5)
        assert checkpoint["current_model_state"]["weight"].item() == pytest.approx(1 - 0.1 * steps, rel=1e-5, abs=1e-6)


def test_ema_goes_on_after_a_resume(tmp_path):
    fit(tmp_path / "whole", 8, [EMA(0.9, True), CheckpointAt(tmp_path / "whole", [8])])
    fit(tmp_path / "part", 5, [EMA(0.9, True), CheckpointAt(tmp_path / "part", [5])])
    part = tmp_path / "part"
    fit(part, 8, [EMA(0.9, True), CheckpointAt(part, [5, 8])], ckpt_path=checkpoint_path(part, 5))
    whole, resumed = (torch.load(checkpoint_path(tmp_path / d, 8), weights_only=True) for d in ("whole", "part"))
    for key in ("state_dict", "current_model_state"):
        assert torch.equal(whole[key]["weight"], resumed[key]["weight"])


def test_checkpoints_count_optimizer_steps_not_micro_batches(tmp_path):
    fit(tmp_path, 4, [EMA(0.9, False), CheckpointAt(tmp_path, [2, 4])], accumulate=3)
    assert sorted(tmp_path.glob("checkpoints/*")) == [checkpoint_path(tmp_path, steps) for steps in (2, 4)]


def test_a_timed_checkpoint_waits_for_the_end_of_its_step(tmp_path):
    """In mid-step it would lack the gradients of the micro-batches before it."""
    timed = LastCheckpoint(tmp_path, filename="last", train_time_interval=timedelta(hours=1))
    clock = ClockRunsOut(timed)
    fit(tmp_path, 4, [clock, timed], accumulate=3)
    assert clock.saved[0] == 6  # micro-batches: of two whole steps
