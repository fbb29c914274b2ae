"""What a training would cost, without training: the text of `train --dry-run`."""

from __future__ import annotations

import time

import torch

from bench.config import RunConfig, sources
from bench.device import device_of
from bench.training.plan import TrainingPlan, build_module, plan_training
from datamodules.base import Batch


def describe(config: RunConfig) -> str:
    """The text of `train --dry-run`: resolved config, budget, steps, estimated time."""
    plan = plan_training(config)
    seconds = estimate_seconds(config, plan)
    return "\n".join(
        [
            f"# {config.run_id}",
            f"# values from: {sources(config)}",
            config.to_yaml(),
            budget_line(config, plan),
            f"estimated training time on this machine: {seconds / 60:.1f} min (one forward and backward timed)",
        ]
    )


def budget_line(config: RunConfig, plan: TrainingPlan) -> str:
    """One line: what the budget asked for and what it comes to."""
    cost, budget, batch_size = plan.cost, plan.budget, config.recipe.batch_size
    return (
        f"{config.use.model} {config.model.size}: {cost.params_m:.2f} M params, {cost.gflops:.4g} Gflops a forward; "
        f"budget {budget.requested} = {budget.steps} steps x {batch_size} images = {budget.images} images "
        f"= {budget.train_gflops:.4g} train Gflops (3 forwards an image; papers: {budget.train_gflops_papers:.4g})"
    )


def estimate_seconds(config: RunConfig, plan: TrainingPlan) -> float:
    """Seconds of training, from a timed forward and backward of a few images on this machine."""
    module = build_module(config, plan.spec)
    device = device_of(config.trainer.accelerator)
    module.to(device)
    images = max(1, min(config.recipe.batch_size, round(5 / plan.cost.gflops)))  # about 15 Gflops of work
    shape = (images, plan.spec.in_channels, plan.spec.latent_size, plan.spec.latent_size)
    labels = torch.zeros(images, dtype=torch.long, device=device)
    batch = Batch(torch.zeros(shape, device=device), labels, torch.arange(images))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
            losses = module.process.losses(*module.training_inputs(batch))
        losses["loss"].mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best / images * plan.budget.images / (config.trainer.devices * config.trainer.num_nodes)
