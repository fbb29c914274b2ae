"""One training run: a RunConfig in, a run directory with checkpoints out. Rerunning resumes or does nothing.

runs/<run_id>/
  config.yaml            the resolved configuration; `train runs/<run_id>/config.yaml` repeats the run
  run.json               state, steps, budget, seconds
  metrics.jsonl          loss, rate and compute every few steps
  checkpoints/           step-<steps>.ckpt (scored), last.ckpt (only while training)
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from bench import budget as budgets
from bench import registry
from bench.callbacks import EMA, CheckpointAt, TrainingLog
from bench.config import WANDB_PROJECT, RunConfig, sources
from bench.console import is_main_process, quiet_lightning, say
from bench.errors import UserError
from bench.files import atomic_write
from bench.flops import GflopsReport, count
from bench.prepare import Data, data_ends, prepare_data
from bench.tracking import Tracker
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


def train(config: RunConfig, data: Data | None = None, tracker: Tracker | None = None, group: str = "") -> Path:
    """Train to the end of the budget, from the newest checkpoint if there is one -> the final checkpoint.

    `group` is the name of the comparison the run belongs to, for W&B.
    """
    run, directory = plan(config), config.directory
    final = checkpoint_path(directory, run.budget.steps)
    data = data or prepare_data(config)
    state = read_state(directory)
    if final.exists() and state.get("state") == "finished":
        if state["latents"] != data.fingerprint:
            raise UserError(
                f"{directory} was trained on other latents than {data.latents} (another data.root or autoencoder). "
                "Give the one it was trained on, or another paths.runs."
            )
        say(f"{config.run_id}: already trained ({run.budget.steps} steps)")
        return final
    budget = run.budget
    say(f"{config.run_id}: {budget.steps} steps x {config.recipe.batch_size} images, {budget.train_gflops:.4g} Gflops")
    if is_main_process():
        with atomic_write(directory / "config.yaml") as file:
            file.write(config.to_yaml())
    module = build_module(config, run.spec)
    tracker = tracker or Tracker(config.tracking, WANDB_PROJECT, directory)
    with tracker.run(config.run_id, group=group, config=asdict(config), job_type="train") as mirror:
        log = TrainingLog(
            directory / "metrics.jsonl",
            steps=run.budget.steps,
            batch_size=config.recipe.batch_size,
            gflops=run.cost.gflops,
            every=config.trainer.log_every,
            mirror=mirror.log,
        )
        trainer = build_trainer(config, run, directory, [log])
        resume = newest_checkpoint(directory)
        if resume is not None:
            say(f"  resuming from {resume}")
        _write_state(directory, state="running", steps=run.budget.steps)
        try:
            trainer.fit(module, datamodule=data.module(config), ckpt_path=resume, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C and SIGTERM
            raise KeyboardInterrupt from None
    if is_main_process():
        (directory / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
    _write_state(
        directory,
        state="finished",
        steps=run.budget.steps,
        images_seen=run.budget.images,
        train_gflops=run.budget.train_gflops,
        latents=data.fingerprint,
        train_seconds=round(log.seconds, 3),
        device=device_name(),
        world_size=trainer.world_size,
    )
    return final


def build_trainer(config: RunConfig, run: Plan, directory: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's Trainer for one run: DDP where there are several processes, EMA, checkpoints at the scored steps."""
    quiet_lightning()
    machine, checkpoints = config.trainer, directory / "checkpoints"
    return L.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy="ddp" if machine.devices * machine.num_nodes > 1 else "auto",
        precision=machine.precision,  # type: ignore[arg-type]
        max_steps=run.budget.steps,
        max_epochs=-1,
        accumulate_grad_batches=machine.accumulate,
        gradient_clip_val=config.recipe.optimizer.grad_clip,
        use_distributed_sampler=False,  # the data module shares positions out itself, without padding
        callbacks=[
            EMA(config.recipe.ema_decay, config.recipe.ema_warmup),
            *callbacks,
            CheckpointAt(checkpoints, run.checkpoint_steps),
            # Not at an interrupt as well: that may come in the middle of a step, and the resumed run would differ.
            ModelCheckpoint(
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
    )


def checkpoint_path(directory: Path, steps: int) -> Path:
    return directory / "checkpoints" / f"step-{steps:08d}.ckpt"


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint to resume from; one that cannot be read is set aside by name and the one before is taken."""
    found = sorted((directory / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a torn file raises whatever its broken part happens to hit
            aside = path.with_suffix(".broken")
            say(f"{path} cannot be read ({type(error).__name__}); set aside as {aside.name}, using the one before.")
            path.rename(aside)
        else:
            return path
    return None


def load_weights(module: DiffusionModule, checkpoint: Path) -> None:
    """The EMA weights of a checkpoint into `module`. Raises: UserError if they do not fit."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not fit its config.yaml: {' '.join(str(error).split())}") from None


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


def device_name() -> str:
    """The kind of device, for the record: 'cpu (2 threads)' or the GPU's name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({torch.get_num_threads()} threads)"


def read_state(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write_state(directory: Path, **values: Any) -> None:
    if is_main_process():
        with atomic_write(directory / "run.json") as file:
            json.dump(values, file, indent=2)
