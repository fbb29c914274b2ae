"""One training run: a RunConfig in, a run directory with checkpoints out. Rerunning resumes or does nothing.

runs/<run_id>/
  config.yaml            the resolved configuration; `train runs/<run_id>/config.yaml` repeats the run
  run.json               state, steps, budget, seconds
  metrics.jsonl          loss, rate and compute every few steps
  checkpoints/           step-<steps>.ckpt (scored), last.ckpt (only while training)
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import signals
from bench.config import WANDB_PROJECT, RunConfig, changed_settings
from bench.console import is_main_process, say
from bench.device import device_name
from bench.errors import Paused, UserError
from bench.files import atomic_write, remove_leftovers
from bench.prepare import Data, prepare_data, require_processes
from bench.tracking import Tracker
from bench.training.callbacks import EMA, TrainingLog
from bench.training.checkpoints import LAST, Stamp, checkpoint_path, newest_checkpoint, settings_of
from bench.training.continuing import start_from_other
from bench.training.guard import StepGuard
from bench.training.plan import TrainingPlan, build_module, plan_training
from bench.training.run_record import RunRecord, read_state, write_state
from bench.training.stopping import StopAtStep
from bench.training.trainer import build_trainer, prepare_backbone
from bench.training.watch import Watch


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
    plan, directory = plan_training(config), config.directory
    final = checkpoint_path(directory, plan.budget.steps)
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
            write_state(directory, **state | {"changed": changed_settings(config)})
        say(f"{config.run_id}: already trained ({plan.budget.steps} steps)")
        return final
    budget = plan.budget
    say(f"{config.run_id}: {budget.steps} steps x {config.recipe.batch_size} images, {budget.train_gflops:.4g} Gflops")
    with RunRecord(directory).training(budget.steps, changed_settings(config)):
        return _fit(config, plan, data, tracker, group, stop_at)


def _fit(
    config: RunConfig, plan: TrainingPlan, data: Data, tracker: Tracker | None, group: str, stop_at: float | None
) -> Path:
    directory, settings = config.directory, settings_of(config, data.fingerprint)
    resume = _begin(config, plan, settings)
    module = build_module(config, plan.spec)
    prepare_backbone(module, config.trainer)
    tracker = tracker or Tracker(config.tracking, WANDB_PROJECT, directory)
    with tracker.run(config.run_id, group=group, config=asdict(config), job_type="train") as mirror:
        ema = EMA(config.recipe.ema_decay, config.recipe.ema_warmup)
        clip, limit = config.recipe.optimizer.grad_clip, config.trainer.stop_above_grad_norm
        guard = StepGuard(directory, clip, limit, math.inf if stop_at is None else stop_at)
        log = TrainingLog(
            directory / "metrics.jsonl",
            guard,
            steps=plan.budget.steps,
            batch_size=config.recipe.batch_size,
            gflops=plan.cost.gflops,
            every=config.trainer.log_every,
            mirror=mirror.log,
        )
        watched = config.trainer.grid_every or config.trainer.score_every
        watch = [Watch(config, plan.spec, data, ema, log, mirror)] if watched else []
        stop = StopAtStep(directory / "checkpoints" / LAST, guard)
        trainer = build_trainer(config, plan, directory, [ema, guard, log, *watch, Stamp(settings)], [stop])
        try:
            with signals.finishing_steps():
                trainer.fit(module, datamodule=data.module(config), ckpt_path=resume, weights_only=True)
                if stop.stopped:
                    raise signals.Stopped
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    if trainer.global_step < plan.budget.steps:  # the time was up
        write_state(directory, "preempted")
        raise Paused(f"{config.run_id}: the time is up after step {trainer.global_step} of {plan.budget.steps}.")
    _finish(config, plan, data, log.seconds, trainer.world_size)
    signals.check()  # one that came in the last step
    return checkpoint_path(directory, plan.budget.steps)


def _begin(config: RunConfig, plan: TrainingPlan, settings: dict[str, Any]) -> Path | None:
    """Put the run directory in order -> the checkpoint to go on from; None: from the beginning."""
    directory, steps = config.directory, plan.budget.steps
    if is_main_process():
        remove_leftovers(directory)
        remove_leftovers(directory / "checkpoints")
        with atomic_write(directory / "config.yaml") as file:
            file.write(config.to_yaml())
    resume = newest_checkpoint(directory, settings, steps)
    if resume is not None:
        say(f"  resuming from {resume}")
        return resume
    return start_from_other(directory, settings, steps, plan.checkpoint_steps, config.trainer.log_every)


def _finish(config: RunConfig, plan: TrainingPlan, data: Data, seconds: float, world_size: int) -> None:
    directory = config.directory
    if is_main_process():
        (directory / "checkpoints" / LAST).unlink(missing_ok=True)
    write_state(
        directory,
        "finished",
        steps=plan.budget.steps,
        changed=changed_settings(config),
        images_seen=plan.budget.images,
        train_gflops=plan.budget.train_gflops,
        latents=data.fingerprint,
        train_seconds=round(seconds, 3),
        device=device_name(config.trainer.accelerator),
        world_size=world_size,
    )
