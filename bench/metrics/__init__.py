"""Scores of generated images: their names, directions and column titles. Torch loads when one is built.

Each score is a `torchmetrics.Metric` over features: `update(features, indices, labels)`, then `compute() -> Score`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bench.errors import UserError
from bench.registry import nearest

if TYPE_CHECKING:
    from bench.metrics.base import SampleMetric
    from bench.scoring.reference import Reference


class Score(NamedTuple):
    """A score and the half width of its 95 % interval (bench/metrics/uncertainty.py)."""

    value: float
    ci95: float


FEW = 10_000  # samples below which a Frechet distance is mostly bias; its column then names the count, as in fid1k


@dataclass(frozen=True)
class MetricSpec:
    """How a score is built from (reference, num_samples), which features it takes and how it is read."""

    name: str
    build: Callable[[Reference, int], SampleMetric]
    feature: str  # pool | spatial | logits
    higher_is_better: bool
    decimals: int
    needs_rows: bool = False  # of the reference: feature rows beside its moments


def _fid(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.frechet import frechet_distance

    return frechet_distance(reference.pool, num_samples)


def _fid_inf(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.frechet import FrechetExtrapolated

    return FrechetExtrapolated(reference.pool, num_samples)


def _sfid(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.frechet import frechet_distance

    return frechet_distance(reference.spatial_moments(), num_samples)


def _inception_score(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.inception_score import InceptionScore

    return InceptionScore(reference.num_logits, num_samples)


def _precision(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.precision_recall import Precision

    return Precision(reference.rows(), reference.radii, num_samples)


def _recall(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.precision_recall import Recall

    return Recall(reference.rows(), num_samples)


def _precision_float16(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.precision_recall import Precision

    return Precision(reference.rows(), None, num_samples, arithmetic="adm_float16")


def _recall_float16(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.precision_recall import Recall

    return Recall(reference.rows(), num_samples, arithmetic="adm_float16")


def _kid(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.kernel_distance import KernelDistance

    return KernelDistance(reference.rows(), num_samples)


def _class_accuracy(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.class_accuracy import ClassAccuracy

    return ClassAccuracy(reference.rows(), reference.row_labels(), num_samples)


METRICS = {
    spec.name: spec
    for spec in (
        MetricSpec("fid", _fid, "pool", higher_is_better=False, decimals=2),
        MetricSpec("fid_inf", _fid_inf, "pool", higher_is_better=False, decimals=2),
        MetricSpec("sfid", _sfid, "spatial", higher_is_better=False, decimals=2),
        MetricSpec("inception_score", _inception_score, "logits", higher_is_better=True, decimals=2),
        MetricSpec("precision", _precision, "pool", higher_is_better=True, decimals=3, needs_rows=True),
        MetricSpec("recall", _recall, "pool", higher_is_better=True, decimals=3, needs_rows=True),
        MetricSpec("precision_float16", _precision_float16, "pool", True, 3, needs_rows=True),
        MetricSpec("recall_float16", _recall_float16, "pool", True, 3, needs_rows=True),
        MetricSpec("kid", _kid, "pool", higher_is_better=False, decimals=5, needs_rows=True),
        MetricSpec("class_accuracy", _class_accuracy, "pool", True, 3, needs_rows=True),
    )
}


def spec(name: str) -> MetricSpec:
    """The score of that name. Raises: UserError if there is none."""
    if name not in METRICS:
        raise UserError(f"'{name}' is not a metric. {nearest(name, list(METRICS))}")
    return METRICS[name]


def column(name: str, extractor: str, num_samples: int, precision: str = "float32") -> str:
    """The column of a score, which says what keeps it from being compared with a published one.

    Bare with ADM's Inception in float32; else with the extractor's name and its precision, and 'fd' in place of 'fid'.
    A Frechet distance of fewer than 10,000 samples names their number: fid1k, fd500[effnet-lite0].
    """
    short = name
    if extractor != "inception":
        short = {"fid": "fd", "fid_inf": "fd_inf", "sfid": "sfd", "kid": "kd"}.get(name, name)
    if name in ("fid", "sfid") and num_samples < FEW:
        short += f"{num_samples // 1000}k" if num_samples % 1000 == 0 else str(num_samples)
    marks = [extractor] if extractor != "inception" else []
    marks += [precision] if precision != "float32" else []
    return f"{short}[{', '.join(marks)}]" if marks else short
