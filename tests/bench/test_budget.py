"""Budgets against closed forms and the totals that papers print."""

from __future__ import annotations

import pytest

from bench.budget import BudgetConfig, checkpoint_steps, require_equal, resolve, sample_gflops, spread, training_gflops
from bench.errors import UserError


def test_training_counts_three_forwards_per_image():
    assert training_gflops(2.0, batch_size=5, steps=7) == 3 * 2.0 * 5 * 7


@pytest.mark.parametrize("gflops, batch_size, steps", [(0, 1, 1), (1.0, -1, 1), (1.0, 1, 0)])
def test_training_compute_of_nothing_is_an_error(gflops, batch_size, steps):
    with pytest.raises(ValueError, match="above 0"):
        training_gflops(gflops, batch_size, steps)


def test_guidance_doubles_the_cost_of_a_sample():
    assert sample_gflops(118.64, steps=250, guided=False) == 118.64 * 250
    assert sample_gflops(118.64, steps=250, guided=True) == 2 * 118.64 * 250


@pytest.mark.parametrize(
    "gflops, images, printed",
    [(280.3, 660e6, 1.85e11), (1066.2, 302e6, 3.22e11), (118.64, 1792e6, 2.13e11), (524.6, 768e6, 4.03e11)],
)
def test_papers_total_is_what_diffussm_table_1_prints(gflops, images, printed):
    budget = resolve(BudgetConfig(images=int(images)), gflops, batch_size=256)
    assert float(f"{budget.train_gflops_papers:.3g}") == printed
    assert budget.train_gflops == pytest.approx(3 * budget.train_gflops_papers)


def test_steps_are_taken_as_they_are():
    budget = resolve(BudgetConfig(steps=400_000), 5.56, batch_size=256)
    assert (budget.steps, budget.images, budget.requested) == (400_000, 102_400_000, "steps=400000")


def test_images_round_down_to_whole_steps():
    budget = resolve(BudgetConfig(images=1000), 1.0, batch_size=256)
    assert (budget.steps, budget.images, budget.requested) == (3, 768, "images=1000")


def test_compute_rounds_down_to_whole_steps():
    budget = resolve(BudgetConfig(train_gflops=100.0), 1.0, batch_size=8)  # 24 per step
    assert (budget.steps, budget.train_gflops, budget.requested) == (4, 96.0, "train_gflops=100.0")


def test_compute_of_exactly_n_steps_buys_n_steps():
    for gflops in (0.1, 5.5652, 118.6214, 276.0017):
        for steps in (1, 3, 7, 399_999, 7_000_000):
            request = BudgetConfig(train_gflops=training_gflops(gflops, 256, steps))
            assert resolve(request, gflops, 256).steps == steps


@pytest.mark.parametrize("config, needed", [(BudgetConfig(images=255), 256), (BudgetConfig(train_gflops=767.0), 768)])
def test_less_than_one_step_is_an_error(config, needed):
    with pytest.raises(UserError, match=f"one step takes {needed}"):
        resolve(config, 1.0, batch_size=256)


def test_budget_given_twice_names_both_keys():
    with pytest.raises(UserError, match=r"budget\.steps and budget\.train_gflops: budget given twice"):
        BudgetConfig(steps=10, train_gflops=1.0)


def test_budget_given_never_lists_the_choices():
    with pytest.raises(UserError, match=r"budget\.steps, budget\.images, budget\.train_gflops"):
        BudgetConfig()


@pytest.mark.parametrize("amount", [0.0, -1.0, float("inf"), float("nan")])
def test_budget_must_be_positive_and_finite(amount):
    with pytest.raises(UserError, match=r"budget\.train_gflops is .*above 0"):
        BudgetConfig(train_gflops=amount)


def test_checkpoints_halve_towards_the_start():
    assert checkpoint_steps(4000, points=4) == (500, 1000, 2000, 4000)
    assert checkpoint_steps(1001, points=3) == (250, 500, 1001)


def test_short_runs_score_each_step_once_and_never_step_zero():
    assert checkpoint_steps(3, points=8) == (1, 3)
    assert checkpoint_steps(3, points=10**12) == (1, 3)


def test_spread_is_largest_over_smallest():
    assert spread([100.0, 102.0, 101.0]) == pytest.approx(0.02)
    assert spread([5.0]) == 0


def test_unequal_rows_are_named_with_what_they_spend():
    require_equal("images", {"dit S/2": 1000, "uvit S/2": 1019})
    with pytest.raises(UserError, match=r"2\.1 % in images \(dit S/2 1000, uvit S/2 1021\).*budget\.images"):
        require_equal("images", {"dit S/2": 1000, "uvit S/2": 1021})
