"""What a run comes to, by arithmetic alone, and the module it trains."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L

from bench import budget as budgets
from bench import registry
from bench.config import RunConfig
from bench.flops import GflopsReport, count
from bench.prepare import data_ends
from models.base import BackboneSpec, DiffusionModule


@dataclass(frozen=True)
class TrainingPlan:
    """The backbone's ends and cost, and what the budget buys."""

    spec: BackboneSpec
    cost: GflopsReport  # of one forward of one image
    budget: budgets.Budget
    checkpoint_steps: tuple[int, ...]  # scored; the last one is the end of training


def plan_training(config: RunConfig) -> TrainingPlan:
    """Raises: UserError if the budget buys no step."""
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
    return TrainingPlan(spec, cost, budget, budgets.checkpoint_steps(budget.steps, config.eval.checkpoints))


def build_module(config: RunConfig, spec: BackboneSpec) -> DiffusionModule:
    """The untrained module; its initial weights are a function of the seed."""
    architecture = registry.architecture(config.use.model)
    L.seed_everything(config.seed, verbose=False)
    return architecture.module(architecture.backbone(config.model, spec), config.recipe, config.seed)
