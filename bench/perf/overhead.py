"""What training costs beside the arithmetic: `python -m bench perf overhead`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from bench import budget as budgets
from bench.budget import BudgetConfig
from bench.config import RunConfig, load_run
from bench.flops import count
from bench.perf.data import random_cache
from bench.training.callbacks import EMA, TrainingLog, moving_average
from bench.training.guard import StepGuard
from bench.training.plan import TrainingPlan, build_module
from bench.training.trainer import build_trainer
from datamodules.base import Batch, LatentDataModule
from models.base import BackboneSpec, DiffusionModule

if TYPE_CHECKING:
    from bench.perf.perf import Duel  # which imports this module

WARM_UP, STEPS = 5, 100  # the first steps are not timed
IMAGES = 4  # of 4x32x32 latents a step: DiT-T/2 takes about 0.1 s for them on a core
SPEC = BackboneSpec(learn_sigma=True)


def loop(images: int = IMAGES, steps: int = STEPS) -> list[Duel]:
    """A run as `train` does it, with its guard, log and checkpoints, beside the least loop that trains the same.

    They take turns step by step inside one fit, so that whatever else the machine does meets both. Times
    are those of the middle step; the line of the log that one in twenty writes would add half a millisecond to it.
    """
    from bench.perf.perf import Clocked, Duel

    config = load_run("digits", [f"recipe.batch_size={images}", "trainer.accelerator=cpu"])
    cost, total = count(config.use.model, config.model, SPEC), WARM_UP + steps
    run = TrainingPlan(SPEC, cost, budgets.resolve(BudgetConfig(steps=total), cost.gflops, images), ())
    cache, _ = random_cache(8 * images)
    waiting: dict[str, Clocked] = {}  # what a side has not yet asked for

    def data() -> LatentDataModule:
        return LatentDataModule(cache, batch_size=images)

    def fit() -> dict[str, Clocked]:
        module = build_module(config, SPEC)
        bare = _BareLoop(build_module(config, SPEC), config, iter(data().loader()))
        turns = _Turns(bare)
        with tempfile.TemporaryDirectory() as folder:
            guard = StepGuard(Path(folder), config.recipe.optimizer.grad_clip, None)
            log = TrainingLog(
                Path(folder) / "metrics.jsonl",
                guard,
                steps=total,
                batch_size=images,
                gflops=cost.gflops,
                every=config.trainer.log_every,
                mirror=lambda row: None,
            )
            ema = EMA(config.recipe.ema_decay, config.recipe.ema_warmup)
            trainer = build_trainer(config, run, Path(folder), [ema, guard, log], [turns])
            trainer.fit(module, datamodule=data())
        return {
            "ours": Clocked(statistics.median(turns.seconds[WARM_UP:]), _weights(module)),
            "theirs": Clocked(statistics.median(bare.seconds[WARM_UP:]), _weights(bare.average.module)),
        }

    def side(name: str) -> Clocked:
        if name not in waiting:
            waiting.update(fit())
        return waiting.pop(name)

    note = f", EMA weights after {total} steps of {images} images; times are of the middle step"
    peer = "a bare loop round the same module, optimizer and EMA"
    ours, theirs = (partial(side, name) for name in ("ours", "theirs"))
    return [Duel("training loop", peer, ours, theirs, _largest, "largest difference", note)]


def checkpointing(images: int = IMAGES) -> list[Duel]:
    """Forward and backward of one batch with `trainer.activation_checkpointing`, beside none."""
    from bench.perf.perf import Duel

    config = load_run("digits", ["trainer.accelerator=cpu"])
    latents = torch.randn(images, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(latents, torch.arange(images) % 10, torch.arange(images))

    def side(recompute: bool) -> Callable[[], Tensor]:
        module = build_module(config, SPEC)
        if recompute:
            module.recompute_activations()
        return lambda: _gradients(module, batch)

    ours, theirs = side(True), side(False)
    kept = [saved_bytes(action) / 2**20 for action in (ours, theirs)]
    note = f", {images} images; kept for the backward pass are {kept[0]:.0f} MB, else {kept[1]:.0f} MB"
    peer = "the same, keeping all activations"
    return [Duel("checkpointing", peer, ours, theirs, _largest, "largest difference of gradients", note)]


def saved_bytes(action: Callable[[], Any]) -> int:
    """Bytes of the tensors that `action` keeps for its backward pass, no parameters; shared storage counts once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        action()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _BareLoop:
    """What a script would do, in the order in which Lightning does it."""

    def __init__(self, module: DiffusionModule, config: RunConfig, batches: Iterator[Batch]) -> None:
        self.module, self.recipe, self.batches = module, config.recipe, batches
        optimizers = module.configure_optimizers()
        self.optimizer, self.scheduler = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
        average: Any = moving_average(self.recipe.ema_decay, self.recipe.ema_warmup)
        self.average = AveragedModel(module, multi_avg_fn=average)
        self.average.n_averaged.fill_(1)
        self.seconds: list[float] = []

    def step(self) -> None:
        begin = time.perf_counter()
        module = self.module
        loss = module.process.losses(*module.training_inputs(next(self.batches)))["loss"].mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), self.recipe.optimizer.grad_clip or float("inf"))
        self.optimizer.step()
        self.scheduler.step()
        self.average.update_parameters(module)
        self.seconds.append(time.perf_counter() - begin)


class _Turns(L.Callback):
    """Times the steps of a Trainer, and has a bare loop take one after each."""

    def __init__(self, bare: _BareLoop) -> None:
        self.bare = bare
        self.seconds: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begin)
        self.bare.step()
        self.begin = time.perf_counter()


def _gradients(module: DiffusionModule, batch: Batch) -> Tensor:
    module.zero_grad()
    module.process.losses(*module.training_inputs(batch))["loss"].mean().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def _weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


OVERHEAD: dict[str, Callable[[], list[Duel]]] = {"loop": loop, "checkpointing": checkpointing}
