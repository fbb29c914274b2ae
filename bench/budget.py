"""How long a run trains: one request in steps, images or compute, resolved to whole optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from bench.errors import UserError

FORWARDS_PER_STEP = 3  # forward plus backward count as three forwards (DiT, sec. 5, Fig. 9)
TOLERANCE = 0.02  # largest spread of a quantity that a table may call equal


@dataclass(frozen=True)
class BudgetConfig:
    """Exactly one is set; the other two follow from it, the batch size and the backbone's Gflops."""

    steps: int | None = None  # optimizer steps
    images: int | None = None  # training images seen, repeats included
    train_gflops: float | None = None  # 1e9 multiply-adds, three forwards per image

    def __post_init__(self) -> None:
        given = self.given
        if not given:
            raise UserError("budget is not set. Set one of budget.steps, budget.images, budget.train_gflops.")
        if len(given) > 1:
            keys = [f"budget.{key}" for key in given]
            raise UserError(f"{' and '.join(keys)}: budget given twice. Keep one; {keys[-1]}=null unsets another.")
        for key, amount in given.items():
            if not 0 < amount < math.inf:
                raise UserError(f"budget.{key} is {amount}; it must be above 0 and finite.")

    @property
    def given(self) -> dict[str, float]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


@dataclass(frozen=True)
class Budget:
    """What a request came to."""

    steps: int
    images: int  # steps x batch_size
    train_gflops: float  # this project's total: three forwards per image
    train_gflops_papers: float  # images x forward, the "total Gflops" that DiffuSSM's Table 1 prints
    requested: str  # such as "images=50000"


def training_gflops(gflops: float, batch_size: int, steps: int) -> float:
    """Total training compute in Gflops (1e9 multiply-adds): three forwards per image (DiT, sec. 5, Fig. 9).

    `gflops` is one unguided forward of one image through the backbone alone. Raises: ValueError if not all positive.
    """
    if min(gflops, batch_size, steps) <= 0:
        raise ValueError(f"Gflops {gflops}, batch size {batch_size} and steps {steps} must all be above 0.")
    return FORWARDS_PER_STEP * gflops * batch_size * steps


def sample_gflops(gflops: float, steps: int, guided: bool) -> float:
    """Gflops to draw one image in `steps` sampler steps; guidance evaluates the backbone twice per step."""
    return gflops * steps * (2 if guided else 1)


def resolve(budget: BudgetConfig, gflops: float, batch_size: int) -> Budget:
    """Whole optimizer steps of a request, rounded down. Raises: UserError if it does not pay for one step."""
    per_step = {"steps": 1, "images": batch_size, "train_gflops": training_gflops(gflops, batch_size, 1)}
    ((key, amount),) = budget.given.items()
    # 1e-12: a request of exactly n steps must not fall to n - 1 by the rounding of its product.
    steps = math.floor(amount / per_step[key] * (1 + 1e-12))
    if steps < 1:
        raise UserError(
            f"budget.{key} is {amount}, but one step takes {per_step[key]:g}. "
            "Raise the budget or lower recipe.batch_size."
        )
    images = steps * batch_size
    return Budget(steps, images, training_gflops(gflops, batch_size, steps), gflops * images, f"{key}={amount}")


def checkpoint_steps(steps: int, points: int) -> tuple[int, ...]:
    """The steps whose checkpoints are scored for a curve: `steps` last, each with half the compute of the next.

    Four points are steps/8, /4, /2, 1, rounded down; fewer where a short run would repeat a step or score step 0.
    """
    return tuple(sorted({steps // 2**k for k in range(min(points, steps.bit_length()))}))


def spread(spent: Collection[float]) -> float:
    """How far equal things are apart: largest over smallest, less 1."""
    return max(spent) / min(spent) - 1


def require_equal(quantity: str, spent: Mapping[str, float]) -> None:
    """Raises: UserError if what the named rows spend of `quantity` spreads by more than `TOLERANCE`."""
    if spread(spent.values()) > TOLERANCE:
        rows = ", ".join(f"{name} {value:.4g}" for name, value in spent.items())
        raise UserError(
            f"The rows differ by {100 * spread(spent.values()):.1f} % in {quantity} ({rows}); at most "
            f"{100 * TOLERANCE:.0f} % is compared. Set budget.{quantity}, large enough to round down to whole steps."
        )
