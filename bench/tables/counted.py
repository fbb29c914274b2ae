"""What the runs of the paper tables cost a forward, counted once and kept in configs/counted.csv.

gflops          as `bench flops` counts it: 1e9 multiply-adds of one unguided forward of one image
gflops_weights  without S4D kernels and FFTs, as the counters behind published values see it
params_m        trainable parameters, millions
activations_mb  1e6 bytes that autograd keeps of one training image, bfloat16 where autocast has it, attention fused
constant_mb     1e6 bytes that it keeps whatever the batch: weights in bfloat16, S4D kernels
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.files import atomic_write
from bench.registry import CONFIGS
from bench.tables.specs import RUN_FILE, PaperRun

if TYPE_CHECKING:
    from bench.training.plan import TrainingPlan

FILE = CONFIGS / "counted.csv"


@dataclass(frozen=True)
class Counted:
    """A line of configs/counted.csv."""

    model: str
    size: str
    settings: str  # of the model, such as 'M=4 patch_size=1'
    data: str
    recipe: str
    params_m: float
    gflops: float
    gflops_weights: float
    activations_mb: float
    constant_mb: float

    @property
    def key(self) -> tuple[str, ...]:
        return self.model, self.size, self.settings, self.data, self.recipe


@cache
def _stored() -> dict[tuple[str, ...], Counted]:
    rows = []
    with FILE.open(newline="") as file:
        for model, size, settings, data, recipe, *numbers in list(csv.reader(file))[1:]:
            rows.append(Counted(model, size, settings, data, recipe, *map(float, numbers)))
    return {row.key: row for row in rows}


def counted(run: PaperRun) -> Counted:
    """Raises: UserError if the file has no line for the run."""
    key = run.model, run.size, run.model_settings, run.data, run.recipe
    if key not in _stored():
        raise UserError(
            f"configs/counted.csv has no line for run {run.name} ({' '.join(part for part in key if part)}). "
            "Count it once with: python -m bench plan <table> --count"
        )
    return _stored()[key]


def count_missing(runs: Iterable[PaperRun]) -> list[Counted]:
    """Count what the file lacks and add it -> the new lines, in the order of `runs`."""
    known = dict(_stored())
    new = []
    for run in runs:
        if (run.model, run.size, run.model_settings, run.data, run.recipe) not in known:
            new.append(count_run(run))
            known[new[-1].key] = new[-1]
    if new:
        with atomic_write(FILE) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(f.name for f in fields(Counted))
            writer.writerows(astuple(row) for row in known.values())
        _stored.cache_clear()
    return new


def count_run(run: PaperRun) -> Counted:
    """A run's line, counted now."""
    from bench.config import load_run  # torch loads here
    from bench.training.plan import plan_training

    config = load_run(RUN_FILE, run.overrides)
    planned = plan_training(config)
    one, two = (_saved_bytes(run.model, config.model, planned, batch) for batch in (1, 2))
    cost = planned.cost
    return Counted(
        run.model,
        run.size,
        run.model_settings,
        run.data,
        run.recipe,
        round(cost.params_m, 3),
        round(cost.gflops, 4),
        round(cost.gflops_weights, 4),
        round((two - one) / 1e6, 1),
        round((2 * one - two) / 1e6, 1),
    )


def _saved_bytes(name: str, config: object, planned: TrainingPlan, batch: int) -> int:
    """Bytes that autograd keeps of a forward of `batch` images under bfloat16 autocast, weights left out."""
    import torch
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call

    from bench import registry

    spec = planned.spec
    with torch.device("meta"):
        backbone = registry.architecture(name).backbone(config, spec)
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    kept: dict[int, Tensor] = {}
    # Fake tensors pose as tensors of the CPU, on which attention is fused; on the meta device it is not.
    with FakeTensorMode():
        weights = {
            name: torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)
            for name, value in tensors
        }
        own = {value.untyped_storage()._cdata for value in weights.values()}

        def keep(value: Tensor) -> Tensor:
            if (storage := value.untyped_storage()._cdata) not in own:
                kept[storage] = value
            return value

        x = torch.empty(batch, spec.in_channels, spec.latent_size, spec.latent_size)
        labels = torch.zeros(batch, dtype=torch.int64) if spec.num_classes else None
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
            torch.autocast("cpu", torch.bfloat16),
        ):
            functional_call(backbone, weights, (x, torch.zeros(batch), labels))
        return sum(value.untyped_storage().nbytes() for value in kept.values())
