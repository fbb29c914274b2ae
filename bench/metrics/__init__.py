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
    from bench.reference import Reference


class Score(NamedTuple):
    """A score and the half width of its 95 % interval (bench/metrics/uncertainty.py)."""

    value: float
    ci95: float


@dataclass(frozen=True)
class MetricSpec:
    """How a score is built from (reference, num_samples), which features it takes and how it is read."""

    name: str
    build: Callable[[Reference, int], SampleMetric]
    feature: str  # pool | spatial | logits
    higher_is_better: bool
    decimals: int


def _fid(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.frechet import frechet_distance

    return frechet_distance(reference.pool, num_samples)


def _sfid(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.frechet import frechet_distance

    return frechet_distance(reference.spatial, num_samples)


def _inception_score(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.inception_score import InceptionScore

    return InceptionScore(reference.num_logits, num_samples)


def _precision(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.precision_recall import Precision

    return Precision(reference.rows(), reference.radii, num_samples)


def _recall(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.precision_recall import Recall

    return Recall(reference.rows(), num_samples)


def _class_accuracy(reference: Reference, num_samples: int) -> SampleMetric:
    from bench.metrics.class_accuracy import ClassAccuracy

    return ClassAccuracy(reference.rows(), reference.row_labels(), num_samples)


METRICS = {
    spec.name: spec
    for spec in (
        MetricSpec("fid", _fid, "pool", higher_is_better=False, decimals=2),
        MetricSpec("sfid", _sfid, "spatial", higher_is_better=False, decimals=2),
        MetricSpec("inception_score", _inception_score, "logits", higher_is_better=True, decimals=2),
        MetricSpec("precision", _precision, "pool", higher_is_better=True, decimals=3),
        MetricSpec("recall", _recall, "pool", higher_is_better=True, decimals=3),
        MetricSpec("class_accuracy", _class_accuracy, "pool", higher_is_better=True, decimals=3),
    )
}


def spec(name: str) -> MetricSpec:
    """The score of that name. Raises: UserError if there is none."""
    if name not in METRICS:
        raise UserError(f"'{name}' is not a metric. {nearest(name, list(METRICS))}")
    return METRICS[name]


def column(name: str, extractor: str) -> str:
    """The column of a score: bare with ADM's Inception, else with the extractor's name, and 'fd' in place of 'fid'."""
    if extractor == "inception":
        return name
    short = {"fid": "fd", "sfid": "sfd"}.get(name, name)
    return f"{short}[{extractor}]"
