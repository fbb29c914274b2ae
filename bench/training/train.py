"""One training run: a RunConfig in, a run directory with checkpoints out. Rerunning resumes or does nothing.

runs/<run_id>/
  config.yaml            the resolved configuration; `train runs/<run_id>/config.yaml` repeats the run
  run.json               state, steps, budget, seconds
  metrics.jsonl          loss, rate and compute every few steps
  checkpoints/           step-<steps>.ckpt (scored), last.ckpt (only while training)
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from bench import budget as budgets
from bench import registry, signals
from bench.config import WANDB_PROJECT, RunConfig, sources
from bench.console import is_main_process, say
from bench.errors import Paused, UserError
from bench.files import atomic_write, remove_leftovers
from bench.flops import GflopsReport, count
from bench.prepare import Data, data_ends, prepare_data, require_processes
from bench.tracking import Tracker
from bench.training.callbacks import EMA, TrainingLog
from bench.training.checkpoints import LAST, Stamp, checkpoint_path, newest_checkpoint, settings_of
from bench.training.continuing import start_from_other
from bench.training.guard import StepGuard
from bench.training.run_record import RunRecord
from bench.training.stopping import StopAtStep
from bench.training.trainer import build_trainer, prepare_backbone
from models.base import BackboneSpec, DiffusionModule


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to, by arithmetic alone."""

    spec: BackboneSpec
    cost: GflopsReport  # of one forward of one image
    budget: budgets.Budget
    checkpoint_steps: tuple[int, ...]  # scored; the last one is the end of training


def plan(config: RunConfig) -> Plan:
    """Ends of the backbone, its Gflops, and the steps the budget buys. Raises: UserError if it buys none."""
    ends = data_ends(config)
    spec = BackboneSpec(
        in_channels=ends.channels,
        latent_size=ends.side,
        num_classes=ends.num_classes,
        learn_sigma=config.recipe.process.learn_sigma,
        null_label=config.recipe.label_dropout > 0,
    )
    cost = count(config.use.model, config.model, spec)
    budget = budgets.resolve(config.budget, cost.gflops, config.recipe.batch_size)
    return Plan(spec, cost, budget, budgets.checkpoint_steps(budget.steps, config.eval.checkpoints))


def build_module(config: RunConfig, spec: BackboneSpec) -> DiffusionModule:
    """The untrained module; its initial weights are a function of the seed."""
    architecture = registry.architecture(config.use.model)
    L.seed_everything(config.seed, verbose=False)
    return architecture.module(architecture.backbone(config.model, spec), config.recipe, config.seed)


def train(
    config: RunConfig,
    data: Data | None = None,
    tracker: Tracker | None = None,
    group: str = "",
    stop_at: float | None = None,
) -> Path:
    """Train to the end of the budget -> the final checkpoint.

    It starts from the newest checkpoint; where the run has none, from that of a run that differs only in its budget.
    `group` is the name of the comparison the run belongs to, for W&B.

    Raises: Paused once time.monotonic() is past `stop_at`, and Stopped after a signal, each with a checkpoint from
    which the next call goes on; UserError if a step would not be finite, a checkpoint is of another run, or another
    process trains this one.
    """
    require_processes(config.trainer)
    run, directory = plan(config), config.directory
    final = checkpoint_path(directory, run.budget.steps)
    state = read_state(directory)
    if "imported" in state:
        say(f"{config.run_id}: weights imported from {state['imported']['file']}, without optimizer: nothing to train")
        return final
    data = data or prepare_data(config)
    if final.exists() and state.get("state") == "finished":
        if state["latents"] != data.fingerprint:
            raise UserError(
                f"{directory} was trained on other latents than {data.latents} (another data.root or autoencoder). "
                "Give the one it was trained on, or another paths.runs."
            )
        if "changed" not in state:  # by an earlier version
            write_state(directory, **state | {"changed": config.changed})
        say(f"{config.run_id}: already trained ({run.budget.steps} steps)")
        return final
    budget = run.budget
    say(f"{config.run_id}: {budget.steps} steps x {config.recipe.batch_size} images, {budget.train_gflops:.4g} Gflops")
    with RunRecord(directory).training(budget.steps, config.changed):
        return _fit(config, run, data, tracker, group, stop_at)


def _fit(config: RunConfig, run: Plan, data: Data, tracker: Tracker | None, group: str, stop_at: float | None) -> Path:
    directory, steps = config.directory, run.budget.steps
    checkpoints, settings = directory / "checkpoints", settings_of(config, data.fingerprint)
    if is_main_process():
        remove_leftovers(directory)
        remove_leftovers(checkpoints)
        with atomic_write(directory / "config.yaml") as file:
            file.write(config.to_yaml())
    resume = newest_checkpoint(directory, settings, steps)
    if resume is not None:
        say(f"  resuming from {resume}")
    else:
        resume = start_from_other(directory, settings, steps, run.checkpoint_steps, config.trainer.log_every)
    module = build_module(config, run.spec)
    prepare_backbone(module, config.trainer)
    tracker = tracker or Tracker(config.tracking, WANDB_PROJECT, directory)
    with tracker.run(config.run_id, group=group, config=asdict(config), job_type="train") as mirror:
        ema = EMA(config.recipe.ema_decay, config.recipe.ema_warmup)
        clip, limit = config.recipe.optimizer.grad_clip, config.trainer.stop_above_grad_norm
        guard = StepGuard(directory, clip, limit, math.inf if stop_at is None else stop_at)
        log = TrainingLog(
            directory / "metrics.jsonl",
            guard,
            steps=steps,
            batch_size=config.recipe.batch_size,
            gflops=run.cost.gflops,
            every=config.trainer.log_every,
            mirror=mirror.log,
        )
        watch: list[L.Callback] = []
        if config.trainer.grid_every or config.trainer.score_every:
            from bench.training.watch import Watch  # whose imports need this module

            watch.append(Watch(config, run.spec, data, ema, log, mirror))
        stop = StopAtStep(checkpoints / LAST, guard)
        trainer = build_trainer(config, run, directory, [ema, guard, log, *watch, Stamp(settings)], [stop])
        try:
            with signals.finishing_steps():
                trainer.fit(module, datamodule=data.module(config), ckpt_path=resume, weights_only=True)
                if stop.stopped:
                    raise signals.Stopped
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    if trainer.global_step < steps:  # the time was up
        write_state(directory, "preempted")
        raise Paused(f"{config.run_id}: the time is up after step {trainer.global_step} of {steps}.")
    if is_main_process():
        (checkpoints / LAST).unlink(missing_ok=True)
    write_state(
        directory,
        "finished",
        steps=steps,
        changed=config.changed,
        images_seen=run.budget.images,
        train_gflops=run.budget.train_gflops,
        latents=data.fingerprint,
        train_seconds=round(log.seconds, 3),
        device=device_name(config.trainer.accelerator),
        world_size=trainer.world_size,
    )
    signals.check()  # one that came in the last step
    return checkpoint_path(directory, steps)


def describe(config: RunConfig) -> str:
    """The text of `train --dry-run`: resolved config, budget, steps, estimated time."""
    run = plan(config)
    seconds = estimate_seconds(config, run)
    return "\n".join(
        [
            f"# {config.run_id}",
            f"# values from: {sources(config)}",
            config.to_yaml(),
            budget_line(config, run),
            f"estimated training time on this machine: {seconds / 60:.1f} min (one forward and backward timed)",
        ]
    )


def budget_line(config: RunConfig, run: Plan) -> str:
    """One line: what the budget asked for and what it comes to."""
    cost, budget, batch_size = run.cost, run.budget, config.recipe.batch_size
    return (
        f"{config.use.model} {config.model.size}: {cost.params_m:.2f} M params, {cost.gflops:.4g} Gflops a forward; "
        f"budget {budget.requested} = {budget.steps} steps x {batch_size} images = {budget.images} images "
        f"= {budget.train_gflops:.4g} train Gflops (3 forwards an image; papers: {budget.train_gflops_papers:.4g})"
    )


def estimate_seconds(config: RunConfig, run: Plan) -> float:
    """Seconds of training, from a timed forward and backward of a few images on this machine."""
    module = build_module(config, run.spec)
    device = torch.device("cuda" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    module.to(device)
    images = max(1, min(config.recipe.batch_size, round(5 / run.cost.gflops)))  # about 15 Gflops of work
    shape = (images, run.spec.in_channels, run.spec.latent_size, run.spec.latent_size)
    labels = torch.zeros(images, dtype=torch.long) if run.spec.num_classes else None
    batch = _TimingBatch(torch.zeros(shape), labels, torch.arange(images)).to(device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
            losses = module.process.losses(*module.training_inputs(batch))
        losses["loss"].mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best / images * run.budget.images / (config.trainer.devices * config.trainer.num_nodes)


@dataclass(frozen=True)
class _TimingBatch:
    latents: torch.Tensor
    labels: torch.Tensor | None
    positions: torch.Tensor

    def to(self, device: torch.device) -> _TimingBatch:
        labels = self.labels.to(device) if self.labels is not None else None
        return _TimingBatch(self.latents.to(device), labels, self.positions)


def device_name(accelerator: str = "auto") -> str:
    """The kind of device, for the record: 'cpu (2 threads)' or the GPU's name."""
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if gpu else f"cpu ({torch.get_num_threads()} threads)"


def read_state(directory: Path) -> dict[str, Any]:
    return RunRecord(directory).read()


def write_state(directory: Path, state: str, **values: Any) -> None:
    """As `RunRecord.write`, on the first process."""
    if is_main_process():
        RunRecord(directory).write(state, **values)
