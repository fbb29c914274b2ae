"""Curves: which checkpoints meet at equal compute, and what thinning and smoothing do to a log."""

from __future__ import annotations

import json

import pytest

from bench.errors import UserError
from bench.reports.curves import levels, loss_curves, read_log, running_mean, thin


def test_levels_are_checkpoints_at_most_two_percent_apart(comparison, make_result):
    dit, ssm = comparison[0].run_id, comparison[3].run_id
    near, far = make_result(run_id="near", train_gflops=576.0 * 1.019), make_result(run_id="far", train_gflops=590.0)
    found = levels([*comparison, near, far])
    assert [(level.title, list(level.rows)) for level in found] == [
        ("untrained", [dit, ssm]),
        ("288 training Gflops", [dit, ssm]),
        ("576 to 586.9 training Gflops", [dit, ssm, "near"]),
        ("590 training Gflops", ["far"]),
    ]
    assert found[2].rows[ssm] is comparison[5]


def test_levels_are_of_images_where_more_runs_meet_there(make_result):
    rows = [make_result(run_id=name, train_gflops=gflops) for name, gflops in (("a", 100.0), ("b", 200.0))]
    assert [(level.title, list(level.rows)) for level in levels(rows)] == [("9,600 images seen", ["a", "b"])]


def test_two_checkpoints_of_one_run_are_two_levels(make_result):
    rows = [make_result(steps=steps, train_gflops=spent) for steps, spent in ((100, 576.0), (101, 581.8))]
    assert [level.title for level in levels(rows)] == ["576 training Gflops", "581.8 training Gflops"]


def log(steps):
    return [
        {"train/step": k, "images_seen": 8 * k, "train_gflops": 0.5 * k, "train/loss": float(k * k), "train/lr": 1e-3}
        | {"train/grad_norm": 1.0, "train/images_per_s": 9.0, "train/gflops_per_s": 9.0, "train/mfu": 0.5}
        for k in steps
    ]


def test_a_long_log_becomes_means_of_consecutive_lines_and_a_short_one_stays():
    curve = thin(log(range(1, 8)), points=3)  # 7 lines in bins of 3
    assert (curve.first, curve.steps) == ([1, 4, 7], [3, 6, 7])
    assert curve.losses == {"train/loss": [(1 + 4 + 9) / 3, (16 + 25 + 36) / 3, 49.0]}
    assert (curve.images_seen, curve.train_gflops) == ([24, 48, 56], [1.5, 3.0, 3.5])
    assert thin(log([1, 2]), points=2).losses == {"train/loss": [1.0, 4.0]}


def test_only_losses_of_every_line_are_kept():
    lines = log([1, 2])
    lines[1]["train/extra"] = 1.0
    assert list(thin(lines).losses) == ["train/loss"]


def test_a_log_without_its_last_newline_ends_a_line_earlier_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    whole = "".join(json.dumps(line) + "\n" for line in log([1, 2]))
    path.write_text(whole + '{"train/step": 9}\n{"train/st')  # a line without a loss, and half a line
    assert read_log(path) == log([1, 2])
    path.write_text(whole + "{no\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 3: "):
        read_log(path)


def test_runs_without_a_log_are_left_out(runs, comparison):
    (runs / comparison[3].run_id / "metrics.jsonl").unlink()
    curves = loss_curves(comparison, runs)
    assert list(curves) == [comparison[0].run_id]
    assert curves[comparison[0].run_id].losses["train/mse"] == [0.5 / step for step in range(10, 101, 10)]


def test_the_running_mean_looks_both_ways_and_keeps_a_straight_line():
    assert running_mean([5.0, 1.0, 3.0]) == [5.0, 1.0, 3.0]  # a 20th is below one point
    straight = [2.0 * k for k in range(60)]
    assert running_mean(straight) == straight
    jump = [0.0] * 30 + [3.0] * 30
    assert running_mean(jump)[28:32] == [0.0, 1.0, 2.0, 3.0]
