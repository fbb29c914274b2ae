"""What happens around a training step: EMA, checkpoints at chosen steps, the log, the progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bench.console import progress
from bench.files import atomic_write


class EMA(WeightAveraging):
    """Exponential moving average of the weights, from the initial weights on, updated after every optimizer step.

    With `warmup` the decay of update n is min(decay, (1 + n) / (10 + n)), so that short runs are not averages of noise.
    A checkpoint's `state_dict` holds the average, `current_model_state` the raw weights.
    """

    def __init__(self, decay: float, warmup: bool) -> None:
        super().__init__(multi_avg_fn=_warmed_up(decay) if warmup else get_ema_multi_avg_fn(decay), use_buffers=False)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._average_model is not None:
            # The average starts as the initial weights (DiT's training script), not as the weights after step 1.
            self._average_model.n_averaged.fill_(1)


def _warmed_up(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    def update(averages: list[Tensor], currents: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, currents, num_averaged)

    return update


class CheckpointAt(L.Callback):
    """Keeps a checkpoint `step-<steps>.ckpt` after each of the given optimizer steps."""

    def __init__(self, directory: Path, steps: Collection[int]) -> None:
        self.directory, self.steps = directory, frozenset(steps)
        self._saved = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step in self.steps and step != self._saved:  # several micro-batches share one optimizer step
            trainer.save_checkpoint(self.directory / f"step-{step:08d}.ckpt")
            self._saved = step


class TrainingLog(L.Callback):
    """Appends a line to metrics.jsonl every `every` steps and draws the progress bar.

    metrics.jsonl is the record of the run; W&B mirrors it. Lines behind the checkpoint a run resumes from are dropped,
    so the file reads as if the run had never stopped.
    """

    def __init__(
        self, path: Path, *, steps: int, batch_size: int, gflops: float, every: int, mirror: Callable[[dict], None]
    ) -> None:
        self.path, self.steps, self.every, self.mirror = path, steps, every, mirror
        self.images_per_step, self.gflops = batch_size, gflops
        self.seconds = 0.0  # spent training, over all resumes
        self._bar: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds + (time.monotonic() - self._started)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        self._last_step, self._last_time = trainer.global_step, self._started
        self._bar = progress(total=self.steps, initial=trainer.global_step, unit="step", desc=self.path.parent.name)
        if trainer.is_global_zero:
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            complete = [line for line in lines if line.endswith("\n")]
            with atomic_write(self.path) as file:
                file.writelines(line for line in complete if json.loads(line)["train/step"] <= trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._bar.n:
            return
        self._bar.update(step - self._bar.n)
        if step % self.every and step != self.steps:
            return
        now = time.monotonic()
        images_per_s = (step - self._last_step) * self.images_per_step / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        row = {
            "train/step": step,
            "images_seen": step * self.images_per_step,
            "train_gflops": 3 * self.gflops * step * self.images_per_step,
            **{k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")},
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/images_per_s": images_per_s,
            "train/gflops_per_s": 3 * self.gflops * images_per_s,
        }
        self._bar.set_postfix_str(f"loss {row['train/loss']:.4f}, {images_per_s:.0f} images/s")
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.mirror(row)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.monotonic() - self._started
        self._bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.close()
