"""Scores: golden values of the ADM evaluator and of the definitions, intervals, and exactness over processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_recipe import activations, feature_cases, golden_arrays, golden_json, logits, rng, score_cases
from torch import Tensor

from bench import metrics
from bench.errors import UserError
from bench.metrics.base import SampleMetric
from bench.metrics.class_accuracy import ClassAccuracy
from bench.metrics.frechet import FrechetFromRows, FrechetFromSums, Moments, MomentSums, frechet_distance
from bench.metrics.inception_score import InceptionScore
from bench.metrics.precision_recall import Precision, Recall, squared_distances, squared_norms, squared_radii
from bench.metrics.uncertainty import T_QUANTILES, jackknife_groups

CASES = feature_cases(11)
EXPECTED = golden_json("expected")
ROOT = Path(__file__).parents[2]


def moments(rows: np.ndarray | Tensor) -> Moments:
    sums = MomentSums(rows.shape[1])
    sums.add(torch.as_tensor(rows))
    return sums.moments()


def feed(metric: SampleMetric, rows: np.ndarray | Tensor, labels: Tensor | None = None) -> metrics.Score:
    """Update in batches of 64, in a shuffled order."""
    rows = torch.as_tensor(rows)
    for batch in torch.from_numpy(rng(5).permutation(len(rows))).split(64):
        metric.update(rows[batch], batch, None if labels is None else labels[batch])
    return metric.compute()


@pytest.mark.parametrize("name", CASES)
def test_frechet_distance_equals_the_definition(name):
    reference, sample = CASES[name]
    expected = EXPECTED["cases"][name]["definition_float64"]["fid"]
    full_rank = len(sample) > sample.shape[1] and name != "dead_features"
    found = feed(frechet_distance(moments(reference), len(sample)), sample).value
    assert found == pytest.approx(expected, rel=1e-9 if full_rank else 1e-6, abs=1e-6 if name == "identical" else 0)
    assert found >= 0


@pytest.mark.parametrize("name", CASES)
def test_precision_and_recall_equal_the_definition(name):
    reference, sample = map(torch.from_numpy, CASES[name])
    precision, recall = EXPECTED["cases"][name]["definition_float64"]["precision_recall"]
    row = 1.01 if name == "wide_2048" else 1e-9  # nearly equal distances there: one row either way
    found = feed(Precision(reference, squared_radii(reference), len(sample)), sample).value
    assert abs(found - precision) * len(sample) < row
    assert abs(feed(Recall(reference, len(sample)), sample).value - recall) * len(reference) < row


@pytest.mark.parametrize("name", score_cases(11))
def test_inception_score_equals_the_adm_evaluator(name):
    given, part = score_cases(11)[name]
    expected = EXPECTED["inception_score"][name]
    found = feed(InceptionScore(given.shape[1], len(given), part), given).value
    assert found == pytest.approx(expected["definition_float64_log_softmax"], rel=1e-12)
    if not expected["is_nan"]:  # ADM's own value is NaN where a probability underflows
        assert found == pytest.approx(expected["value"], rel=2e-6)


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


def test_a_copy_of_a_reference_row_lies_in_its_ball_of_radius_zero():
    rows = torch.from_numpy(activations(30, 64, 3, 1)).repeat_interleave(5, 0)
    assert feed(Precision(rows, squared_radii(rows), 30), rows[::5]).value == 1


def test_equal_rows_are_at_distance_zero_in_spite_of_rounding():
    rows = torch.from_numpy(activations(60, 1280, 3, 1, shift=3.0)).double()
    distances = squared_distances(rows, rows, squared_norms(rows))
    assert torch.equal(distances.diagonal(), torch.zeros(60).double())
    torch.testing.assert_close(distances, torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square())


def test_class_accuracy_takes_the_majority_and_the_nearest_on_a_tie():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [100.0]])
    votes = torch.tensor([7, 3, 3, 7, 5, 9])
    asked = torch.tensor([7, 3, 5, 3])
    # Nearest five of -0.1: 7 3 3 7 5, a tie that 7 wins as the nearest; of 1.6: 3 3 7 7 5, won by 3; the same from 1.7.
    found = feed(ClassAccuracy(reference, votes, 4), torch.tensor([[-0.1], [1.6], [-0.1], [1.7]]), asked)
    assert found.value == 0.75


def subset_values(build: Callable[[int], SampleMetric], rows: Tensor, labels: Tensor | None) -> list[float]:
    """The score without each jackknife group, by scoring the remaining rows as a set of their own."""
    values = []
    groups = jackknife_groups(len(rows))
    for group in range(10):
        kept = groups != group
        values.append(feed(build(int(kept.sum())), rows[kept], None if labels is None else labels[kept]).value)
    return values


@pytest.mark.parametrize("score", ["fid_sums", "fid_rows", "inception_score", "precision", "recall", "class_accuracy"])
def test_interval_is_the_jackknife_of_ten_scores_without_a_group(score):
    wide = score == "fid_rows"
    reference = torch.from_numpy(activations(220, 200 if wide else 12, 3, 1))
    rows = torch.from_numpy(activations(103, 200 if wide else 12, 3, 2, shift=0.2, scale=0.9))
    asked = torch.arange(103) % 2
    build: Callable[[int], SampleMetric] = {
        "fid_sums": lambda n: frechet_distance(moments(reference), n),
        "fid_rows": lambda n: frechet_distance(moments(reference), n),
        "inception_score": lambda n: InceptionScore(12, n),
        "precision": lambda n: Precision(reference, squared_radii(reference), n),
        "recall": lambda n: Recall(reference, n),
        "class_accuracy": lambda n: ClassAccuracy(reference, torch.arange(220) % 2, n),
    }[score]
    labels = asked if score == "class_accuracy" else None
    values = np.array(subset_values(build, rows, labels))
    expected = 2.2621571628 * math.sqrt(9 / 10 * ((values - values.mean()) ** 2).sum())
    found = feed(build(103), rows, labels)
    assert found.ci95 == pytest.approx(expected, rel=1e-6)
    assert found.ci95 > 0


def draw_gaussians(seed: int, n: int, d: int) -> Tensor:
    return 0.3 + 1.1 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "score, n, d, repetitions",
    [
        ("fid", 100, 4, 200),
        ("fid", 40, 64, 200),
        ("inception_score", 300, 10, 200),
        ("precision", 200, 4, 200),
        ("recall", 100, 8, 200),
    ],
)
def test_intervals_cover_the_mean_score_of_sets_of_that_size(score, n, d, repetitions):
    standard = torch.randn(500, d, generator=torch.Generator().manual_seed(99_999))
    build: Callable[[], SampleMetric] = {
        "fid": lambda: frechet_distance(Moments(torch.zeros(d).double(), torch.eye(d).double()), n),
        "inception_score": lambda: InceptionScore(d, n),
        "precision": lambda: Precision(standard, squared_radii(standard), n),
        "recall": lambda: Recall(standard, n),
    }[score]
    scores = []
    for seed in range(repetitions):
        metric = build()
        metric.update(draw_gaussians(seed, n, d), torch.arange(n))
        scores.append(metric.compute())
    values, widths = np.array(scores).T
    coverage = (np.abs(values - values.mean()) <= widths).mean()
    assert 0.88 <= coverage <= 0.99


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
    reference = torch.from_numpy(CASES["base"][0])
    found = feed(Precision(reference, squared_radii(reference), 60), torch.full((60, 64), 50.0))
    assert found == (0.0, 3 / 60)


def build_all(num_samples: int) -> dict[str, SampleMetric]:
    rows = torch.from_numpy(activations(200, 16, 3, 1))
    wide = moments(activations(200, 128, 3, 1))
    return {
        "fid_sums": frechet_distance(moments(rows), num_samples),
        "fid_rows": frechet_distance(wide, num_samples),
        "inception_score": InceptionScore(16, num_samples, part=40),
        "precision": Precision(rows, squared_radii(rows), num_samples),
        "recall": Recall(rows, num_samples),
        "class_accuracy": ClassAccuracy(rows, torch.arange(200) % 10, num_samples),
    }


def sample_rows(metric: SampleMetric, n: int) -> Tensor:
    return torch.from_numpy(activations(n, metric.dim, 3, 2, shift=0.1))


@pytest.mark.parametrize("score", build_all(101))
def test_repeated_samples_count_once(score):
    once, twice = build_all(101)[score], build_all(101)[score]
    rows, labels = sample_rows(once, 101), torch.arange(101) % 10
    once.update(rows, torch.arange(101), labels)
    batches = torch.cat([torch.arange(101), torch.arange(30), torch.tensor([7, 7])])  # across and within batches
    for batch in batches.split(40):
        twice.update(rows[batch], batch, labels[batch])
    assert list(twice.compute()) == pytest.approx(list(once.compute()), rel=1e-12)


@pytest.mark.parametrize("score", build_all(101))
def test_states_stay_float64_under_every_cast(score):
    plain, cast = build_all(101)[score], build_all(101)[score]
    rows, labels = sample_rows(plain, 101), torch.arange(101) % 10
    for metric in (plain, cast):
        metric.update(rows[:50], torch.arange(50), labels[:50])
        if metric is cast:
            torch.nn.ModuleList([metric]).half().to(torch.bfloat16)
            metric.set_dtype(torch.float16)
        metric.update(rows[50:], torch.arange(50, 101), labels[50:])
    assert cast.compute() == plain.compute()


@pytest.mark.parametrize("score", build_all(101))
def test_reset_forgets(score):
    metric = build_all(101)[score]
    rows, labels = sample_rows(metric, 101), torch.arange(101) % 10
    metric.update(rows + 3, torch.arange(101), labels)
    metric.reset()
    metric.update(rows, torch.arange(101), labels)
    fresh = build_all(101)[score]
    fresh.update(rows, torch.arange(101), labels)
    assert metric.compute() == fresh.compute()


def test_an_incomplete_set_names_what_is_missing():
    metric = build_all(101)["fid_sums"]
    metric.update(sample_rows(metric, 101)[:90], torch.arange(90))
    with pytest.raises(UserError, match="101 samples, 11 are missing, the first is index 90"):
        metric.compute()


@pytest.mark.parametrize(
    "rows, indices, message",
    [
        (torch.zeros(4, 15), torch.arange(4), r"float features \(B, 16\)"),
        (torch.zeros((4, 16), dtype=torch.int64), torch.arange(4), "float features"),
        (torch.zeros(4, 16), torch.arange(3), r"integer indices \(4,\)"),
        (torch.zeros(4, 16), torch.arange(4).float(), "integer indices"),
        (torch.zeros(4, 16), torch.arange(99, 103), "0 to 100, got 101"),
        (
            torch.zeros(4, 16).index_fill(0, torch.tensor(2), torch.nan),
            torch.arange(40, 44),
            "sample 42 are not finite",
        ),
    ],
)
def test_bad_updates_are_refused_before_any_state_changes(rows, indices, message):
    metric = build_all(101)["fid_sums"]
    with pytest.raises(UserError, match=message):
        metric.update(rows, indices)
    assert int(metric.seen.sum()) == 0 and float(metric.outer.abs().sum()) == 0


def test_class_accuracy_needs_the_labels_asked_for():
    metric = build_all(101)["class_accuracy"]
    with pytest.raises(UserError, match="unconditional"):
        metric.update(sample_rows(metric, 101), torch.arange(101))


@pytest.mark.parametrize("build", [lambda r: Recall(r, 4), lambda r: frechet_distance(moments(r), 2)])
def test_too_few_samples_are_refused(build):
    with pytest.raises(UserError, match="needs at least"):
        build(torch.from_numpy(CASES["base"][0]))


def test_too_few_reference_rows_are_refused():
    with pytest.raises(UserError, match="more than 3 rows"):
        squared_radii(torch.zeros(3, 2))
    with pytest.raises(UserError, match="at least 2 rows"):
        moments(torch.zeros(1, 2))


def test_columns_name_every_extractor_but_inception():
    assert [metrics.column(name, "inception") for name in ("fid", "sfid", "recall")] == ["fid", "sfid", "recall"]
    names = [metrics.column(name, "effnet-lite0") for name in ("fid", "sfid", "recall")]
    assert names == ["fd[effnet-lite0]", "sfd[effnet-lite0]", "recall[effnet-lite0]"]


def test_unknown_metric_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean precision"):
        metrics.spec("precison")


def test_names_and_columns_load_no_torch():
    code = "import sys, bench.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Each process scores its share of the samples of `build_all` and prints what it computes.
TWO_PROCESSES = """
import json, sys, torch
sys.path[:0] = [r"{root}", r"{root}/tests", r"{root}/tests/bench"]
import torch.distributed as dist
from bench.errors import UserError
from test_metrics import build_all, sample_rows
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
everyone = torch.arange(101)
shares = dict(uneven=(everyone[::3], torch.cat([everyone[1::3], everyone[2::3]])), one_idle=(everyone, everyone[:0]))
shares["padded"] = (everyone[::2], torch.cat([everyone[1::2], everyone[:1]]))
found = dict()
for case, share in shares.items():
    for name, metric in build_all(101).items():
        for batch in share[rank].split(16):
            metric.update(sample_rows(metric, 101)[batch], batch, batch % 10)
        try:
            found[case + " " + name] = metric.compute()
        except UserError as error:
            found[case + " " + name] = str(error)
print(json.dumps(found))
"""


@pytest.mark.distributed
def test_two_processes_give_the_digits_of_one(tmp_path):
    code = TWO_PROCESSES.format(root=ROOT, store=tmp_path / "store")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(rank)], stdout=subprocess.PIPE, env=environment
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert found[0] == found[1]
    for name, metric in build_all(101).items():
        metric.update(sample_rows(metric, 101), torch.arange(101), torch.arange(101) % 10)
        alone = metric.compute()
        for case in ("uneven", "one_idle"):
            assert found[0][f"{case} {name}"] == pytest.approx(list(alone), rel=1e-11), (case, name)
        padded = found[0][f"padded {name}"]
        if name in ("fid_sums", "inception_score"):  # a row that came twice cannot be taken out of a sum
            assert "sample 0 from more than one process" in padded
        else:
            assert padded == pytest.approx(list(alone), rel=1e-11)


def test_spatial_logits_and_pool_reach_the_metric_that_wants_them():
    from bench.reference import Reference

    pool, spatial = torch.from_numpy(activations(60, 8, 3, 1)), torch.from_numpy(activations(60, 6, 3, 2))
    reference = Reference(
        "toy", 60, "random", "random-7", "none", 10, "", moments(pool), moments(spatial), pool, torch.arange(60) % 3
    )
    features = {
        "pool": pool[:20] + 0.1,
        "spatial": spatial[:20] + 0.1,
        "logits": torch.from_numpy(logits(20, 10, 3, 4)),
    }
    for spec in metrics.METRICS.values():
        metric = spec.build(reference, 20)
        metric.update(features[spec.feature], torch.arange(20), torch.arange(20) % 3)
        assert metric.compute().ci95 >= 0
        assert metric.higher_is_better == spec.higher_is_better
