"""A look at every optimizer step just before it is taken, and a stop of all processes where it must not be."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from bench import signals
from bench.errors import SharedError
from bench.files import atomic_write
from datamodules.base import LatentDataModule, rows_at
from models.base import DiffusionModule, MicroBatch

NAMED = 5  # samples that the sentence lists at most


class StepGuard(L.Callback):
    """Stops before a step whose loss or gradient norm is not finite, or whose norm is above `limit`; clips gradients.

    The norm is taken once, for the check, for clipping and for the log. Processes decide together: gradients are shared
    already, losses are not, and a signal or the end of the time may reach one process alone; so three numbers go round.
    Reading them is the one wait for the device that a step gets by this. What it costs is what the CPU does until the
    device has work again: the launch of the optimizer's kernels, and the draws of the next batch beyond their time.
    """

    def __init__(self, directory: Path, clip: float | None, limit: float | None, moment: float = math.inf) -> None:
        """moment: when the time is up, by time.monotonic()."""
        self.directory, self.clip, self.limit, self.moment = directory, clip, limit, moment
        self.signum = 0  # of a signal that any process got before the step at hand
        self.late = False  # whether the time was up before it
        self.parts: list[MicroBatch] = []  # of the step at hand, as far as this process sees it
        self.grad_norm = torch.tensor(math.nan)  # of the step at hand, before clipping
        self._taken = True

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._taken:
            self.parts, self._taken = [], False
        self.parts.append(cast(MicroBatch, cast(DiffusionModule, pl_module).seen))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._taken = True
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = get_total_norm([cast(Tensor, p.grad) for p in parameters])
        loss = torch.stack([part.losses["loss"].mean() for part in self.parts]).mean()
        broken = ~(torch.isfinite(loss) & torch.isfinite(self.grad_norm))
        if self.limit is not None:
            broken |= self.grad_norm > self.limit
        own = torch.tensor([signals.asked(), time.monotonic() >= self.moment], device=broken.device)
        shared = trainer.strategy.reduce(torch.cat([broken.long()[None], own]), reduce_op="max").tolist()
        stop, self.signum, self.late = bool(shared[0]), shared[1], bool(shared[2])
        if stop:
            self._stop(trainer, pl_module)
        if self.clip is not None:
            clip_grads_with_norm_(parameters, self.clip, self.grad_norm)

    def _stop(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what the step saw, then raise: UserError, on all processes."""
        step, norm = trainer.global_step + 1, float(self.grad_norm)
        samples = _samples(self.parts, trainer)
        loss = sum(sample["loss"] for sample in samples) / len(samples)
        not_finite = [sample["position"] for sample in samples if not math.isfinite(sample["loss"])]
        if not_finite:
            more = f" and {len(not_finite) - NAMED} more" if len(not_finite) > NAMED else ""
            reason = f"the loss is not finite, at position {', '.join(map(str, not_finite[:NAMED]))}{more} of the data"
        elif math.isfinite(norm):
            reason = f"the gradient norm {norm:.4g} is above trainer.stop_above_grad_norm {self.limit:g}"
        else:
            reason = "the gradient norm is not finite, though every loss is"
        path = self.directory / f"nan-step-{step}.json"
        layers = _layers(trainer, pl_module)
        if trainer.is_global_zero:
            found = {"step": step, "reason": reason, "loss": loss, "grad_norm": norm, "samples": samples}
            with atomic_write(path) as file:
                json.dump(_strict(found | {"layers": layers}), file, indent=1)
        trainer.strategy.barrier("guard")
        raise SharedError(
            f"Training stopped before step {step}: {reason}. {path} lists its samples, losses and norms, and the last "
            "checkpoint stays. Look at those samples, or train with a smaller recipe.optimizer.lr."
        )


def _samples(parts: list[MicroBatch], trainer: L.Trainer) -> list[dict[str, Any]]:
    """The samples of a step over all processes and micro-batches, in the order of their positions."""
    columns: dict[str, list[float]] = {}

    def gather(name: str, values: list[Tensor]) -> None:
        columns[name] = trainer.strategy.all_gather(torch.cat(values)).flatten().tolist()

    positions = [part.positions.to(trainer.strategy.root_device) for part in parts]
    gather("position", positions)
    gather("process", [torch.full_like(part, trainer.global_rank) for part in positions])
    gather("t", [part.t for part in parts])
    for name in parts[0].losses:
        gather(name, [part.losses[name] for part in parts])
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, LatentDataModule):  # which image of the set it is
        columns["row"] = rows_at(np.array(columns["position"]), data.seed, data.cache.count).tolist()
    samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return sorted(samples, key=lambda sample: sample["position"])


def _layers(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, dict[str, list[float]]]:
    """Euclidean norms by parameter, one number a process: of the parameter and of its gradient (0 without one)."""
    named = list(pl_module.named_parameters())
    norms = torch.stack(
        [
            torch.stack([value.detach().norm(), value.grad.norm() if value.grad is not None else value.new_zeros(())])
            for _, value in named
        ]
    )  # (P, 2)
    by_process = trainer.strategy.all_gather(norms).reshape(-1, len(named), 2)
    return {
        name: {"parameter": by_process[:, i, 0].tolist(), "gradient": by_process[:, i, 1].tolist()}
        for i, (name, _) in enumerate(named)
    }


def _strict(value: Any) -> Any:
    """For JSON, which has no word for them: nan and inf as text."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
