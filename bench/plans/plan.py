"""What the runs of a paper's table take: Gflops, hours, memory and disk, by arithmetic alone.

Hours: 2 operations a multiply-add, over GPUs x peak x MFU. `PER_PARAM` and configs/counted.csv give the memory.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bench import budget as budgets
from bench.errors import UserError
from bench.gpus import GPUS
from bench.registry import CONFIGS, nearest
from bench.tables.counted import Counted, counted
from bench.tables.specs import PaperRun, Place, TableSpec

GPUS_A_NODE = 8
IMAGES = {"imagenet256": 1_281_167, "imagenet512": 1_281_167, "lsun_bedrooms256": 3_033_042}  # of the training splits
# 1e9 multiply-adds an image, by torch's FlopCounterMode: Stable Diffusion's autoencoder by image side, and Inception.
ENCODE_GFLOPS = {256: 136.4, 512: 558.3}
DECODE_GFLOPS = {256: 311.1, 512: 1257.3}
INCEPTION_GFLOPS = 5.71
SAMPLES = 50_000
# float32 bytes a parameter: weights, gradients, two moments of AdamW, EMA; DDP's buckets come to it.
PER_PARAM, DDP_PER_PARAM = 20, 4
CHECKPOINT_PER_PARAM = 16  # EMA, weights, two moments
OVERHEAD_GB = 2.0  # CUDA context and workspaces
LATENT_CHANNELS, LATENT_FACTOR, MOMENTS, HALF = 4, 8, 4, 2  # mean and logvar of image and mirror, 2 bytes each


@dataclass(frozen=True)
class Machine:
    """The GPUs that each run gets."""

    kind: str
    gpus: int
    mfu: float  # share of the peak

    def __post_init__(self) -> None:
        if self.kind not in GPUS:
            raise UserError(f"--gpu {self.kind} is not known. {nearest(self.kind, list(GPUS))}")
        if self.gpus < 1 or (self.gpus > GPUS_A_NODE and self.gpus % GPUS_A_NODE):
            raise UserError(f"--gpus is {self.gpus}; give 1 to {GPUS_A_NODE}, or whole nodes of {GPUS_A_NODE}.")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1.")

    @property
    def memory_gb(self) -> int:
        return GPUS[self.kind].memory_gb

    def hours(self, gflops: float) -> float:
        """Of 1e9 multiply-adds."""
        return 2e9 * gflops / (self.gpus * GPUS[self.kind].bfloat16 * 1e12 * self.mfu) / 3600


@dataclass(frozen=True)
class RunPlan:
    """One training, and the rows that are scored from it."""

    run: PaperRun
    places: tuple[Place, ...]
    machine: Machine

    @cached_property
    def cost(self) -> Counted:
        return counted(self.run)

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return self.places[0].resolution

    @property
    def images(self) -> int:
        return self.run.images(self.cost.gflops)

    @property
    def steps(self) -> int:
        return self.images // self.run.batch_size

    @property
    def train_gflops(self) -> float:
        """Three forwards an image, as IsoDiff counts training."""
        return budgets.training_gflops(self.cost.gflops, self.run.batch_size, self.steps)

    @property
    def train_gflops_papers(self) -> float:
        return self.cost.gflops * self.images

    @property
    def train_hours(self) -> float:
        return self.machine.hours(self.train_gflops)

    @property
    def score_hours(self) -> float:
        """Of drawing, decoding and scoring the samples of every row."""
        image = DECODE_GFLOPS[self.side] + INCEPTION_GFLOPS
        forwards = sum(
            budgets.sample_gflops(self.cost.gflops, self.run.sampler_steps, place.cfg_scale != 1)
            for place in self.places
        )
        return self.machine.hours(SAMPLES * (forwards + len(self.places) * image))

    @property
    def accumulate(self) -> int | None:
        """The fewest micro-batches per step that fit the memory; None if not even single images do."""
        share = self._share()
        parts = (parts for parts in range(1, share + 1) if share % parts == 0)
        return next((n for n in parts if self.memory_gb(share // n) <= self.machine.memory_gb), None)

    def memory_gb(self, images: int) -> float:
        """Of one GPU that computes `images` at a time."""
        per_param = PER_PARAM + (DDP_PER_PARAM if self.machine.gpus > 1 else 0)
        kept = 1e6 * (self.cost.constant_mb + images * self.cost.activations_mb)
        return (per_param * 1e6 * self.cost.params_m + kept) / 1e9 + OVERHEAD_GB

    @property
    def micro_batch(self) -> int:
        """Images of a GPU at a time."""
        return self._share() // (self.accumulate or self._share())

    def _share(self) -> int:
        share, rest = divmod(self.run.batch_size, self.machine.gpus)
        if rest or not share:
            raise UserError(
                f"--gpus is {self.machine.gpus}; the batch of {self.run.batch_size} images of {self.run.name} cannot "
                "be shared by so many evenly."
            )
        return share

    @property
    def checkpoint_gb(self) -> float:
        return CHECKPOINT_PER_PARAM * self.cost.params_m / 1e3

    @property
    def samples_gb(self) -> float:
        """Of the uint8 images of all rows."""
        return len(self.places) * SAMPLES * 3 * self.side**2 / 1e9

    @property
    def released(self) -> dict[str, str] | None:
        """The row of configs/released_weights.csv whose file is this training's end."""
        with (CONFIGS / "released_weights.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                same = (row["model"], row["size"], int(row["resolution"]), row["autoencoder"])
                if same == (self.run.model, self.run.size, self.side, self.run.decoder) and not self.run.model_settings:
                    return row if int(row["steps"]) == self.steps else None
        return None


@dataclass(frozen=True)
class CachePlan:
    """Latents that several runs share."""

    data: str
    side: int
    machine: Machine

    @property
    def gigabytes(self) -> float:
        latent = LATENT_CHANNELS * (self.side // LATENT_FACTOR) ** 2
        return IMAGES[self.data] * (MOMENTS * HALF * latent + 8) / 1e9

    @property
    def hours(self) -> float:
        """Of encoding every image and its mirror."""
        return self.machine.hours(2 * IMAGES[self.data] * ENCODE_GFLOPS[self.side])


def plan_table(spec: TableSpec, machine: Machine) -> list[RunPlan]:
    """The runs of a table in the order of its file. Raises: UserError if there are none, or one cannot be planned."""
    plans = [RunPlan(run, tuple(spec.places_of(name)), machine) for name, run in spec.runs.items()]
    if not plans:
        raise UserError(f"configs/table/{spec.name}.yaml names no runs of ours, so there is nothing to plan.")
    for plan in plans:
        if not plan.places or plan.run.data not in IMAGES or plan.side not in ENCODE_GFLOPS:
            raise UserError(
                f"{spec.name}.yaml: run {plan.run.name} fills no row, or is of other data than {', '.join(IMAGES)}."
            )
    return plans


def caches(plans: Sequence[RunPlan]) -> list[CachePlan]:
    """The latents that the plans need, each once."""
    return list(dict.fromkeys(CachePlan(plan.run.data, plan.side, plan.machine) for plan in plans))
