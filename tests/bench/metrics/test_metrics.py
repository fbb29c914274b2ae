"""Scores: golden values of the ADM evaluator and of the definitions, states, and exactness over processes."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_recipe import activations, feature_cases, golden_json, logits, rng, score_cases
from torch import Tensor, distributed, multiprocessing

from bench import metrics
from bench.errors import UserError
from bench.metrics.base import SampleMetric, share_states
from bench.metrics.class_accuracy import ClassAccuracy
from bench.metrics.frechet import FrechetExtrapolated, FrechetFromRows, Moments, MomentSums, frechet_distance
from bench.metrics.inception_score import InceptionScore
from bench.metrics.precision_recall import Precision, Recall, squared_distances, squared_norms, squared_radii

CASES = feature_cases(11)
EXPECTED = golden_json("expected")
ROOT = Path(__file__).parents[3]


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


def test_parts_of_the_inception_score_are_adms_5000_rows_in_order():
    """The last part may be shorter and weighs the same; a single row scores 1, for it is its own marginal."""
    given = torch.from_numpy(logits(5001, 10, 3, 22))
    p = given[:5000].double().softmax(1)
    first = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    assert feed(InceptionScore(10, 5001), given).value == pytest.approx((first + 1) / 2, rel=1e-12)


def test_a_copy_of_a_reference_row_lies_in_its_ball_of_radius_zero():
    rows = torch.from_numpy(activations(30, 64, 3, 1)).repeat_interleave(5, 0)
    assert feed(Precision(rows, squared_radii(rows), 30), rows[::5]).value == 1


def test_equal_rows_are_at_distance_zero_in_spite_of_rounding():
    rows = torch.from_numpy(activations(60, 1280, 3, 1, shift=3.0)).double()
    distances = squared_distances(rows, rows, squared_norms(rows))
    assert torch.equal(distances.diagonal(), torch.zeros(60).double())
    torch.testing.assert_close(distances, torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square())


def test_near_rows_of_large_norms_are_not_taken_for_equal():
    rows = torch.tensor([[1000.0], [1000.0 + 2.0**-7]]).double()  # all exact; 3e-11 of the squared norms is no rounding
    assert squared_distances(rows, rows, squared_norms(rows)).tolist() == [[0, 2.0**-14], [2.0**-14, 0]]


def test_class_accuracy_takes_the_majority_and_the_nearest_on_a_tie():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [100.0]])
    votes = torch.tensor([7, 3, 3, 7, 5, 9])
    asked = torch.tensor([7, 3, 5, 3])
    # Nearest five of -0.1: 7 3 3 7 5, a tie that 7 wins as the nearest; of 1.6: 3 3 7 7 5, won by 3; the same from 1.7.
    found = feed(ClassAccuracy(reference, votes, 4), torch.tensor([[-0.1], [1.6], [-0.1], [1.7]]), asked)
    assert found.value == 0.75


def build_all(num_samples: int) -> dict[str, SampleMetric]:
    rows = torch.from_numpy(activations(200, 16, 3, 1))
    wide = moments(activations(200, 128, 3, 1))
    return {
        "fid_sums": frechet_distance(moments(rows), num_samples),
        "fid_rows": frechet_distance(wide, num_samples),
        "fid_inf": FrechetExtrapolated(moments(rows), num_samples),
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


def test_columns_name_every_extractor_but_inception_and_few_samples():
    names = ("fid", "fid_inf", "sfid", "kid", "recall")
    assert [metrics.column(name, "inception", 50_000) for name in names] == list(names)
    other = [metrics.column(name, "effnet-lite0", 500) for name in names]
    assert other == [f"{name}[effnet-lite0]" for name in ("fd500", "fd_inf", "sfd500", "kd", "recall")]
    assert metrics.column("fid", "inception", 5000, "bf16") == "fid5k[bf16]"
    few = [metrics.column("fid", "inception", count) for count in (9_000, 9_999, 10_000)]
    assert few == ["fid9k", "fid9999", "fid"]  # fewer than 10,000 are few


def test_unknown_metric_gets_a_suggestion():
    with pytest.raises(UserError, match="Did you mean precision"):
        metrics.spec("precison")


def test_names_and_columns_load_no_torch():
    code = "import sys, bench.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def shares(world: int) -> dict[str, list[Tensor]]:
    """The samples each process scores, in a random order; in `idle` one has none, in `padded` sample 0 comes twice."""
    order = torch.from_numpy(rng(9).permutation(101))
    cases = {"uneven": [30, 71, 0][: world - 1], "idle": [60, 0][: world - 1]}
    cut = {name: list(order.split([*sizes, 101 - sum(sizes)])) for name, sizes in cases.items()}
    return cut | {"padded": [*cut["uneven"][:-1], torch.cat([torch.tensor([int(order[0])]), cut["uneven"][-1]])]}


def score_share(rank: int, world: int, directory: Path) -> None:
    """What one process of `world` computes, to <rank>.json."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    found: dict[str, object] = {}
    for case, share in shares(world).items():
        for name, metric in build_all(101).items():
            for batch in share[rank].split(7 + 9 * rank):
                metric.update(sample_rows(metric, 101)[batch], batch, batch % 10)
            try:
                found[f"{case} {name}"] = metric.compute()
            except UserError as error:
                found[f"{case} {name}"] = str(error)
    found["shared"] = score_together(shares(world)["idle"][rank])
    (directory / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_digits_of_one(world, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.spawn(score_share, (world, tmp_path), nprocs=world)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(other == found[0] for other in found)
    assert found[0].pop("shared") == [
        {name: pytest.approx(list(score), rel=1e-12) for name, score in scores.items()}
        for scores in score_together(torch.arange(101))
    ]
    for name, metric in build_all(101).items():
        metric.update(sample_rows(metric, 101), torch.arange(101), torch.arange(101) % 10)
        alone = list(metric.compute())
        counted = name in ("precision", "recall", "class_accuracy")
        for case in ("uneven", "idle"):
            assert found[0][f"{case} {name}"] == (alone if counted else pytest.approx(alone, rel=1e-12)), (case, name)
        if name in ("fid_sums", "fid_inf", "inception_score"):  # a row cannot be taken out of a sum again
            assert "from more than one process" in found[0][f"padded {name}"]
        else:
            assert found[0][f"padded {name}"] == pytest.approx(alone, rel=1e-12)


def build_pool() -> dict[str, SampleMetric]:
    """Metrics on the same 16 features; the first two keep the same sums, the next two the same rows."""
    built = build_all(101)
    reference = moments(activations(200, 16, 3, 1))
    return {
        "fid": built["fid_sums"],
        "fid_inf": built["fid_inf"],
        "recall": built["recall"],
        "fid_from_rows": FrechetFromRows(reference, 101),
        "precision": built["precision"],
    }


def score_together(share: Tensor) -> list[dict[str, metrics.Score]]:
    """Scores of metrics that hold their states in common, then the same after a reset and in other batches."""
    built = build_pool()
    collection = share_states(built)
    rows, scores = sample_rows(built["fid"], 101), []
    for size in (40, 16):
        collection.reset()
        for batch in share.split(size):
            collection.update(rows[batch], batch, batch % 10)
            assert built["fid"].outer is built["fid_inf"].outer
            assert built["fid"].pending is built["fid_inf"].pending
            assert built["recall"].rows is built["fid_from_rows"].rows
        scores.append(collection.compute())
    return scores


def test_metrics_of_one_collection_share_their_states():
    for scores in score_together(torch.arange(101)):
        for name, alone in build_pool().items():
            alone.update(sample_rows(alone, 101), torch.arange(101), torch.arange(101) % 10)
            assert list(scores[name]) == pytest.approx(list(alone.compute()), rel=1e-12), name


@pytest.mark.parametrize("score", build_all(101))
def test_a_saved_state_goes_on_where_it_was(score):
    half, rest, alone = (build_all(101)[score] for _ in range(3))
    rows, labels, indices = sample_rows(half, 101), torch.arange(101) % 10, torch.arange(101)
    for metric in (half, rest):
        metric.persistent(True)
    half.update(rows[:50], indices[:50], labels[:50])
    rest.load_state_dict(half.state_dict())
    rest.update(rows[40:], indices[40:], labels[40:])
    alone.update(rows, indices, labels)
    assert list(rest.compute()) == pytest.approx(list(alone.compute()), rel=1e-12)


MODULES = [f"bench.metrics.{module.name}" for module in pkgutil.iter_modules(metrics.__path__)]


@pytest.mark.parametrize("name", ["bench.metrics", *MODULES])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_metric_has_an_example(name):
    for title, found in vars(importlib.import_module(name)).items():
        if inspect.isclass(found) and issubclass(found, SampleMetric) and found.__module__ == name:
            assert inspect.isabstract(found) or ">>>" in (found.__doc__ or ""), title


def test_spatial_logits_and_pool_reach_the_metric_that_wants_them():
    from bench.scoring.reference import Reference

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
