"""Kernel distance: golden values, closed forms, and its replicates."""

from __future__ import annotations

import pytest
import torch
from metric_recipe import activations, feature_cases, golden_json
from test_metrics import feed
from torch import Tensor

from bench.errors import UserError
from bench.metrics import kernel_distance
from bench.metrics.kernel_distance import KernelDistance
from bench.metrics.uncertainty import jackknife_groups

CASES = {name: tuple(map(torch.from_numpy, sets)) for name, sets in feature_cases(11).items()}
EXPECTED = golden_json("expected")["cases"]


def by_definition(rows: Tensor, reference: Tensor) -> float:
    """Over whole kernel matrices, with the diagonals taken out of the means."""
    x, y = rows.double(), reference.double()
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return float(
        (xx.sum() - xx.diagonal().sum()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()
    )


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_definition(name):
    reference, samples = CASES[name]
    found = feed(KernelDistance(reference, len(samples)), samples).value
    assert found == pytest.approx(EXPECTED[name]["definition_float64"]["kid_unbiased_all_rows"], rel=1e-9)


@pytest.mark.parametrize("n", [3, 47, 130])
def test_replicates_are_the_score_of_the_other_samples(n, monkeypatch):
    monkeypatch.setattr(kernel_distance, "BLOCK", 40)  # several blocks, the last ones short
    reference = torch.from_numpy(activations(93, 12, 3, 1))
    samples = torch.from_numpy(activations(n, 12, 3, 2, shift=0.1))
    metric = KernelDistance(reference, n)
    feed(metric, samples)
    groups = jackknife_groups(n)
    kept = [samples[groups != group] for group in range(-1, int(groups.max()) + 1)]
    values = metric._values().tolist()
    assert values[0] == pytest.approx(by_definition(samples, reference), rel=1e-9)
    rest = [value for rows, value in zip(kept[1:], values[1:], strict=True) if len(rows) > 1]
    assert rest == pytest.approx([by_definition(rows, reference) for rows in kept[1:] if len(rows) > 1], rel=1e-9)


def test_two_points_are_the_closed_form():
    reference, samples = torch.full((5, 4), 1.0), torch.full((6, 4), 3.0)
    # x . y / d is 9 among samples, 1 in the reference, 3 between: 10^3 + 2^3 - 2 * 4^3.
    assert feed(KernelDistance(reference, 6), samples).value == pytest.approx(1000 + 8 - 128, rel=1e-12)


def test_its_expectation_is_zero_for_equal_distributions_at_any_size():
    values = []
    for seed in range(300):
        rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed))
        metric = KernelDistance(rows[:12], 8)
        metric.update(rows[12:], torch.arange(8))
        values.append(metric.compute().value)
    found = torch.tensor(values)
    assert abs(found.mean()) < 3 * found.std() / 300**0.5
    assert (found < 0).any()


def test_order_and_batches_do_not_matter():
    reference, samples = CASES["base"]
    at_once, shuffled = KernelDistance(reference, 500), KernelDistance(reference, 500)
    at_once.update(samples, torch.arange(500))
    assert feed(shuffled, samples) == at_once.compute()


def test_too_few_rows_are_refused():
    reference = CASES["base"][0]
    with pytest.raises(UserError, match="at least 2 reference rows, got 1"):
        KernelDistance(reference[:1], 10)
    for n in (1, 2):  # without one group of two samples a single one is left
        with pytest.raises(UserError, match=f"at least 3 samples, num_samples is {n}"):
            KernelDistance(reference, n)
