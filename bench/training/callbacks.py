"""What happens around a training step: EMA, checkpoints at chosen steps, the log, the progress bar."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bench.budget import training_gflops
from bench.console import progress
from bench.files import append_line, atomic_write
from bench.gpus import peak_gflops
from bench.training.buckets import LossByTime, means
from bench.training.checkpoints import checkpoint_path
from bench.training.guard import StepGuard
from models.base import DiffusionModule


class EMA(WeightAveraging):
    """Exponential moving average of the weights, from the initial weights on, updated after every optimizer step.

    With `warmup` the decay of update n is min(decay, (1 + n) / (10 + n)), so that short runs are not averages of noise.
    A checkpoint's `state_dict` holds the average, `current_model_state` the raw weights.
    """

    def __init__(self, decay: float, warmup: bool) -> None:
        super().__init__(multi_avg_fn=moving_average(decay, warmup), use_buffers=False)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._average_model is not None:
            # The average starts as the initial weights (DiT's training script), not as the weights after step 1.
            self._average_model.n_averaged.fill_(1)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The average goes where the module is: Lightning makes it before it moves the module to its device."""
        cast(Any, self._average_model).module.to(pl_module.device)

    @property
    def average(self) -> DiffusionModule:
        """A module with the averaged weights, while training; not to be changed."""
        return cast(Any, self._average_model).module


def moving_average(decay: float, warmup: bool) -> Callable[[list[Tensor], list[Tensor], Tensor | int], None]:
    """The update of an `AveragedModel`, as `EMA` makes it."""
    if not warmup:
        return get_ema_multi_avg_fn(decay)

    def update(averages: list[Tensor], currents: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, currents, num_averaged)

    return update


class StepCallback(L.Callback, ABC):
    """Called after each optimizer step that is taken here; of several micro-batches only the last one takes it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step  # the one a run resumes from

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.on_step_end(trainer, self._step)

    @abstractmethod
    def on_step_end(self, trainer: L.Trainer, step: int) -> None:
        """`step` optimizer steps have been taken."""


class CheckpointAt(StepCallback):
    """Keeps the checkpoints of some optimizer steps in a run directory."""

    def __init__(self, directory: Path, steps: Collection[int]) -> None:
        self.directory, self.steps = directory, frozenset(steps)

    def on_step_end(self, trainer: L.Trainer, step: int) -> None:
        if step in self.steps:
            trainer.save_checkpoint(checkpoint_path(self.directory, step))


class TrainingLog(StepCallback):
    """Appends a line to metrics.jsonl every `every` steps and draws the progress bar.

    metrics.jsonl is the record of the run; W&B mirrors it. Lines behind the checkpoint a run resumes from are dropped,
    so the file reads as if the run had never stopped. Losses are means over the global batch of the step, those by
    timestep over all steps since the line before.
    """

    def __init__(
        self,
        path: Path,
        guard: StepGuard,
        *,
        steps: int,
        batch_size: int,
        gflops: float,
        every: int,
        mirror: Callable[[dict], None],
    ) -> None:
        self.path, self.guard, self.steps, self.every, self.mirror = path, guard, steps, every, mirror
        self.images_per_step, self.gflops = batch_size, gflops
        self.seconds = 0.0  # spent training, over all resumes
        self._bar: Any = None
        self._loaded: list[list[float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        total = self._strategy.reduce(self._by_time.sums.clone(), reduce_op="sum")
        return {"seconds": self.seconds + (time.monotonic() - self._started), "loss_by_time": total.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self._loaded = state_dict["seconds"], state_dict["loss_by_time"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        module = cast(DiffusionModule, pl_module)
        self._strategy, self.writes = trainer.strategy, trainer.is_global_zero
        self._by_time = LossByTime(module.process, module.device)
        if self._loaded is not None and trainer.is_global_zero:  # the sums of all processes
            self._by_time.sums.copy_(torch.tensor(self._loaded, dtype=torch.float64))
        peak = peak_gflops(torch.cuda.get_device_name(), str(trainer.precision)) if module.on_gpu else None
        self._peak = peak * trainer.world_size if peak else None
        self._started = time.monotonic()
        self._last_step, self._last_time = trainer.global_step, self._started
        self._bar = progress(total=self.steps, initial=trainer.global_step, unit="step", desc=self.path.parent.name)
        if trainer.is_global_zero:
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            complete = [line for line in lines if line.endswith("\n")]
            with atomic_write(self.path) as file:
                file.writelines(line for line in complete if json.loads(line)["train/step"] <= trainer.global_step)

    def on_step_end(self, trainer: L.Trainer, step: int) -> None:
        self._bar.update()
        for part in self.guard.parts:
            self._by_time.add(part)
        if step % self.every and step != self.steps:
            return
        values = self._read()
        if step % self.every == 0:  # not at an end between two lines: a run of a larger budget may go on from there
            self._by_time.reset()
        now = time.monotonic()
        images_per_s = (step - self._last_step) * self.images_per_step / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        values |= {
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/images_per_s": images_per_s,
            "train/gflops_per_s": training_gflops(self.gflops, 1, 1) * images_per_s,
        }
        if self._peak:
            values["train/mfu"] = values["train/gflops_per_s"] / self._peak
        self._bar.set_postfix_str(f"loss {values['train/loss']:.4f}, {images_per_s:.0f} images/s")
        self.record(step, values)

    def record(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl, and its mirror; on the first process."""
        if not self.writes:
            return
        spent = training_gflops(self.gflops, self.images_per_step, step)
        row = {"train/step": step, "images_seen": step * self.images_per_step, "train_gflops": spent, **values}
        append_line(self.path, json.dumps(row))
        self.mirror(row)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is not training: it counts neither as seconds nor in rates."""
        begin = time.monotonic()
        yield
        away = time.monotonic() - begin
        self._started += away
        self._last_time += away

    def _read(self) -> dict[str, float]:
        """The losses of this step, its gradient norm, and the losses by timestep, over all processes."""
        parts = self.guard.parts
        names = list(parts[0].losses)
        own = [torch.stack([part.losses[name].mean() for part in parts]).mean() for name in names]
        shared = self._strategy.reduce(torch.stack([*own, self.guard.grad_norm]), reduce_op="mean").tolist()
        total = self._strategy.reduce(self._by_time.sums.clone(), reduce_op="sum")
        return dict(zip([*(f"train/{name}" for name in names), "train/grad_norm"], shared, strict=True)) | means(total)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.monotonic() - self._started
        self._bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.close()
