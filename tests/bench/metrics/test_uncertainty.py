"""Intervals: the jackknife by its definition, and how often it covers what is known to be true."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from metric_recipe import activations
from test_metrics import feed, moments
from torch import Tensor

from bench.metrics.base import SampleMetric
from bench.metrics.frechet import FrechetExtrapolated, FrechetFromSums, Moments, frechet_distance
from bench.metrics.inception_score import InceptionScore
from bench.metrics.precision_recall import Precision, Recall, squared_radii
from bench.metrics.uncertainty import T_QUANTILES, jackknife_groups, share_score


@pytest.mark.parametrize("score", ["fid_sums", "fid_rows", "inception_score", "recall"])
def test_interval_is_the_jackknife_of_ten_scores_without_a_group(score):
    d = 200 if score == "fid_rows" else 12
    reference = torch.from_numpy(activations(220, d, 3, 1))
    rows = torch.from_numpy(activations(103, d, 3, 2, shift=0.2, scale=0.9))
    build: Callable[[int], SampleMetric] = {
        "fid_sums": lambda n: frechet_distance(moments(reference), n),
        "fid_rows": lambda n: frechet_distance(moments(reference), n),
        "inception_score": lambda n: InceptionScore(12, n),
        "recall": lambda n: Recall(reference, n),
    }[score]
    kept = [jackknife_groups(103) != group for group in range(10)]
    values = np.array([feed(build(int(mask.sum())), rows[mask]).value for mask in kept])
    expected = 2.2621571628 * math.sqrt(9 / 10 * ((values - values.mean()) ** 2).sum())
    found = feed(build(103), rows)
    assert found.ci95 == pytest.approx(expected, rel=1e-6)
    assert found.ci95 > 0


def test_quantiles_are_those_of_student_t():
    for degrees, quantile in enumerate(T_QUANTILES, start=1):
        x = np.linspace(0, quantile, 200_001)
        density = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
        assert np.trapezoid(density * (1 + x**2 / degrees) ** (-(degrees + 1) / 2), x) == pytest.approx(0.475, abs=1e-6)


def test_jackknife_groups_are_equal_and_cut_across_labels_that_go_round():
    groups = jackknife_groups(500)
    assert groups.bincount().tolist() == [50] * 10
    table = torch.zeros(10, 10).index_put((groups, torch.arange(500) % 10), torch.ones(500), accumulate=True)
    assert table.max() < 15  # groups by index % 10 would have 50 of one class


def test_no_hit_at_all_still_leaves_doubt():
    reference = torch.from_numpy(activations(100, 8, 3, 1))
    found = feed(Precision(reference, squared_radii(reference), 60), torch.full((60, 8), 50.0))
    assert found == (0.0, pytest.approx(1.96 * math.sqrt(2 / 64 * 62 / 64 / 60)))


def draw(seed: int, n: int, d: int) -> Tensor:
    """Rows of N(0.3, 1.1^2) in d dimensions."""
    return 0.3 + 1.1 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def repeat(build: Callable[[], SampleMetric], rows: Callable[[int], Tensor], times: int) -> tuple[np.ndarray, ...]:
    """Values and half widths (times,) of independent sets."""
    scores = []
    for seed in range(times):
        metric, features = build(), rows(seed)
        metric.update(features, torch.arange(len(features)))
        scores.append(metric.compute())
    values, widths = np.array(scores).T
    return values, widths


def coverage(values: np.ndarray, widths: np.ndarray, truth: float) -> float:
    return float((np.abs(values - truth) <= widths).mean())


def error(values: np.ndarray) -> float:
    """Three standard errors of the mean."""
    return 3 * float(values.std()) / math.sqrt(len(values))


STANDARD = Moments(torch.zeros(8).double(), torch.eye(8).double())
DISTANCE = 8 * (0.3**2 + (1.1 - 1) ** 2)  # of `draw` from STANDARD


def test_fid_covers_its_mean_at_that_count_and_fid_inf_the_true_distance():
    n = 160
    values, widths = repeat(lambda: FrechetFromSums(STANDARD, n), lambda seed: draw(seed, n, 8), 300)
    # The mean's error adds tr S / n; the curvature of the root adds sum_ij (1 + [i = j]) sqrt(l_i l_j) / (sqrt l_i +
    # sqrt l_j) / 2 (n - 1) over the eigenvalues l of S_r S, here all 1.1^2.
    bias = 8 * 1.1**2 / n + (8 * 8 + 8) * 1.1 / 2 / (2 * (n - 1))
    assert values.mean() == pytest.approx(DISTANCE + bias, abs=error(values))
    assert bias > 3 * error(values)
    assert 0.9 <= coverage(values, widths, values.mean()) <= 0.99
    assert coverage(values, widths, DISTANCE) < 0.9
    values, widths = repeat(lambda: FrechetExtrapolated(STANDARD, n), lambda seed: draw(seed, n, 8), 300)
    assert values.mean() == pytest.approx(DISTANCE, abs=error(values))
    assert 0.9 <= coverage(values, widths, DISTANCE) <= 0.99


def test_fid_inf_of_the_references_own_distribution_is_zero_on_average():
    """The interval is wide there: the first order vanishes, and the jackknife overstates the second."""
    n = 160
    values, widths = repeat(lambda: FrechetExtrapolated(STANDARD, n), lambda seed: (draw(seed, n, 8) - 0.3) / 1.1, 100)
    assert abs(values.mean()) < 0.1 * 8 * 5.5 / n  # a tenth of what fid is too high: (d + d (d + 1) / 4) / n
    assert coverage(values, widths, 0.0) >= 0.95
    assert values.min() < 0


def test_inception_score_covers_its_mean_which_is_the_closed_form():
    """Classifiers that are certain: exp of the entropy of the class counts, too low by (classes - 1) / 2n."""
    n, shares = 400, torch.arange(1, 11).double() / 55

    def certain(seed: int) -> Tensor:
        classes = shares.multinomial(n, replacement=True, generator=torch.Generator().manual_seed(seed))
        return 1000 * torch.eye(10)[classes]

    values, widths = repeat(lambda: InceptionScore(10, n), certain, 200)
    log = shares.log()
    entropy = -float(shares @ log)
    spread = float(shares @ log.square()) - entropy**2
    expected = math.exp(entropy) * (1 - (10 - 1) / (2 * n) + spread / (2 * n))
    assert values.mean() == pytest.approx(expected, abs=error(values))
    assert 0.9 <= coverage(values, widths, values.mean()) <= 0.99


@pytest.mark.parametrize("n", [60, 400, 5000])
@pytest.mark.parametrize("expected_hits", [1, 4, 10, 20, 30])
def test_shares_cover_the_probability_of_a_hit(n, expected_hits):
    """Exactly, from the binomial distribution."""
    probability = expected_hits / n
    k = np.arange(n + 1)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    weights = np.exp(log_choose + k * math.log(probability) + (n - k) * math.log1p(-probability))
    widths = np.array([share_score(i / n, n).ci95 for i in k])
    assert weights[np.abs(k / n - probability) <= widths].sum() >= 0.93


def test_interval_of_a_share_is_the_spread_of_independent_sets():
    def hits(seed: int) -> Tensor:
        return (torch.rand(400, 1, generator=torch.Generator().manual_seed(seed)) > 0.9).float() * 9

    values, widths = repeat(lambda: Precision(torch.zeros(1, 1), torch.ones(1), 400), hits, 300)
    assert 0.93 <= coverage(values, widths, 0.9) <= 0.98
    assert values.std() == pytest.approx(widths.mean() / 1.96, rel=0.1)


@pytest.mark.parametrize("score, n, d", [("fid_rows", 40, 64), ("precision", 200, 4), ("recall", 100, 8)])
def test_intervals_cover_the_mean_score_of_sets_of_that_size(score, n, d):
    standard = torch.randn(500, d, generator=torch.Generator().manual_seed(99_999))
    build: Callable[[], SampleMetric] = {
        "fid_rows": lambda: frechet_distance(Moments(torch.zeros(d).double(), torch.eye(d).double()), n),
        "precision": lambda: Precision(standard, squared_radii(standard), n),
        "recall": lambda: Recall(standard, n),
    }[score]
    values, widths = repeat(build, lambda seed: draw(seed, n, d), 200)
    assert 0.9 <= coverage(values, widths, values.mean()) <= 0.99
