"""Frechet distances: golden values, closed forms, low rank, extrapolation, and what their states cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from metric_recipe import activations, feature_cases, golden_arrays, golden_json
from test_metrics import feed, moments
from torch import Tensor

from bench.errors import UserError
from bench.metrics.frechet import FrechetExtrapolated, FrechetFromRows, FrechetFromSums, Moments, frechet_distance

CASES = feature_cases(11)
EXPECTED = golden_json("expected")


@pytest.mark.parametrize("name", CASES)
def test_frechet_distance_equals_the_definition(name):
    reference, sample = CASES[name]
    expected = EXPECTED["cases"][name]["definition_float64"]["fid"]
    full_rank = len(sample) > sample.shape[1] and name != "dead_features"
    found = feed(frechet_distance(moments(reference), len(sample)), sample).value
    assert found == pytest.approx(expected, rel=1e-9 if full_rank else 1e-6, abs=1e-6 if name == "identical" else 0)
    assert found >= 0
    assert found == pytest.approx(EXPECTED["cases"][name]["adm"]["fid"], rel=1e-5, abs=1e-6)  # it averages in float32


def test_fid_and_sfid_equal_the_adm_evaluator_on_network_features():
    arrays, expected = golden_arrays("adm_e2e_small"), golden_json("adm_e2e_small")
    for kind, name in (("pool", "fid"), ("spatial", "sfid")):
        reference = moments(arrays[f"ref_{kind}"])
        found = feed(frechet_distance(reference, 10), arrays[f"sample_{kind}"]).value
        assert found == pytest.approx(expected["definition_float64"][name], rel=1e-6)
        assert found == pytest.approx(expected[name], rel=1e-5)  # ADM averages in float32


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    mu, a, b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 0.25, 16.0])
    found = Moments(mu, a.double().diag()).distance(Moments(0 * mu, b.double().diag()))
    assert float(found) == pytest.approx(5.25 + (1 + 0.25 + 1))  # |mu|^2 + sum (sqrt a - sqrt b)^2


def test_both_ways_to_a_frechet_distance_agree():
    reference, sample = moments(activations(300, 24, 3, 1)), activations(150, 24, 3, 2, shift=0.1)
    sums = feed(FrechetFromSums(reference, 150), sample)
    # The n x n matrix has 126 eigenvalues that are rounding, and a square root keeps half of their digits.
    assert list(feed(FrechetFromRows(reference, 150), sample)) == pytest.approx(list(sums), rel=1e-5)


def test_number_of_samples_decides_how_a_frechet_distance_is_kept():
    reference = moments(activations(50, 16, 3, 1))
    assert isinstance(frechet_distance(reference, 16), FrechetFromRows)
    assert isinstance(frechet_distance(reference, 17), FrechetFromSums)


def by_singular_values(reference: np.ndarray, sample: np.ndarray) -> float:
    """The distance without covariances: tr (S_r S)^(1/2) is the sum of the singular values of the rows' product."""
    a, b = reference - reference.mean(0), sample - sample.mean(0)
    a, b = a / np.sqrt(len(a) - 1), b / np.sqrt(len(b) - 1)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    shift = np.square(reference.mean(0) - sample.mean(0)).sum()
    return shift + np.square(a).sum() + np.square(b).sum() - 2 * root


@pytest.mark.parametrize("num_reference, n", [(40, 500), (500, 40), (40, 32), (40, 66), (500, 66), (2, 3), (500, 64)])
def test_low_rank_is_finite_and_equals_the_definition(num_reference, n):
    reference = activations(num_reference, 64, 3, 1).astype(np.float64)
    sample = activations(n, 64, 3, 2, shift=0.1).astype(np.float64)
    found = feed(frechet_distance(moments(reference), n), sample)
    assert found.value == pytest.approx(by_singular_values(reference, sample), rel=1e-6)
    assert np.isfinite(found.ci95)


@pytest.mark.parametrize("n, d", [(500, 64), (66, 64), (40, 64), (3, 64), (300, 1)])
def test_equal_sets_are_at_distance_zero(n, d):
    rows = activations(n, d, 3, 1)
    assert 0 <= feed(frechet_distance(moments(rows), n), rows).value < 1e-6


def test_extrapolation_takes_out_a_bias_linear_in_one_over_n():
    reference, rows = moments(activations(300, 8, 3, 1)), torch.from_numpy(activations(100, 8, 3, 2, shift=0.1))
    metric = FrechetExtrapolated(reference, 100)
    left_out = []
    for group in range(10):
        kept = metric.groups != group
        left_out.append(feed(FrechetFromSums(reference, 90), rows[kept]).value)
    plain, found = feed(FrechetFromSums(reference, 100), rows), feed(metric, rows)
    slope = (np.mean(left_out) - plain.value) / (1 / 90 - 1 / 100)
    assert found.value == pytest.approx(plain.value - slope / 100, rel=1e-9)
    assert found.ci95 == pytest.approx(plain.ci95, rel=1e-12)


def test_extrapolation_says_how_many_samples_it_needs():
    reference = moments(activations(300, 64, 3, 1))
    FrechetExtrapolated(reference, 128)
    with pytest.raises(UserError, match=r"64 features can be extrapolated .* from 128 samples or more, .* is 127"):
        FrechetExtrapolated(reference, 127)


@pytest.mark.parametrize(
    "mu, sigma, message",
    [
        (torch.zeros(3), torch.eye(4), r"got \(3,\) and \(4, 4\)"),
        (torch.zeros(4), torch.eye(4), "float64, got torch.float32"),
        (torch.zeros(4).double(), torch.eye(4).double() * torch.nan, "not finite"),
    ],
)
def test_moments_refuse_what_is_no_mean_and_covariance(mu, sigma, message):
    with pytest.raises(UserError, match=message):
        Moments(mu, sigma)


def test_features_that_overflow_are_named():
    metric = FrechetFromSums(moments(activations(50, 4, 3, 1)), 20)
    metric.update(torch.full((20, 4), 1e200, dtype=torch.float64), torch.arange(20))
    with pytest.raises(UserError, match="overflow"):
        metric.compute()


def state_bytes(metric: FrechetFromSums) -> int:
    states = metric.metric_state.values()
    return sum(t.nbytes for state in states for t in ([state] if isinstance(state, Tensor) else state))


def test_states_do_not_grow_with_the_number_of_samples():
    """But for `seen`, 4 bytes a sample; 20,480 rows of 32 float64 features alone would be 5 MB."""
    most = {}
    for n in (2048, 20_480):
        metric = FrechetFromSums(moments(activations(100, 32, 3, 1)), n)
        rows, sizes = torch.ones(n, 32), []
        for batch in torch.arange(n).split(64):
            metric.update(rows[batch], batch)
            sizes.append(state_bytes(metric) - metric.seen.nbytes)
        most[n] = max(sizes)
    sums, pending = 10 * 33 * 32 * 8, 1000 * 33 * 8
    assert most[2048] == most[20_480] <= sums + pending
    assert metric._defaults["outer"].untyped_storage().nbytes() == 8


@pytest.mark.parametrize("size", [1, 64, 999, 1000, 1001, 2500])
def test_batches_of_any_size_give_the_same_digits(size):
    reference, rows = moments(activations(100, 8, 3, 1)), torch.from_numpy(activations(2500, 8, 3, 2, shift=0.1))
    metric, alone = (FrechetFromSums(reference, 2500) for _ in range(2))
    for batch in torch.arange(2500).split(size):
        metric.update(rows[batch], batch)
    alone.update(rows, torch.arange(2500))
    assert list(metric.compute()) == pytest.approx(list(alone.compute()), rel=1e-12)
