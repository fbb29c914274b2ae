"""Precision and recall: golden values, brute force in float64 down to the row, ties, jackknife, ADM's float16."""

from __future__ import annotations

import pytest
import torch
from metric_recipe import activations, feature_cases, golden_json
from test_metrics import feed
from torch import Tensor

from bench.errors import UserError
from bench.metrics.base import BLOCK
from bench.metrics.precision_recall import AdmFloat16, Exact, Precision, Recall, squared_radii
from bench.metrics.uncertainty import jackknife_groups

CASES = {name: tuple(map(torch.from_numpy, sets)) for name, sets in feature_cases(11).items()}
EXPECTED = golden_json("expected")["cases"]


def brute_distances(a: Tensor, b: Tensor) -> Tensor:
    """Sums of squared float64 differences, row by row: no product, nothing cancels."""
    return torch.stack([(b.double() - row.double()).square().sum(1) for row in a])


def brute_radii(rows: Tensor) -> Tensor:
    return brute_distances(rows, rows).sort(1).values[:, 3]


def brute_inside(queries: Tensor, rows: Tensor) -> Tensor:
    return (brute_distances(queries, rows) <= brute_radii(rows)).any(1)


def inside(queries: Tensor, rows: Tensor) -> Tensor:
    return Exact().covered(queries, rows, Exact().norms(rows), Exact().radii(rows))[:, 0]


def integers(n: int, d: int, top: int, seed: int) -> Tensor:
    """Features whose distances are exact in float32 and often equal."""
    return torch.randint(0, top, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def draw(n: int, d: int, stream: int, **changes: float) -> Tensor:
    return torch.from_numpy(activations(n, d, 3, stream, **changes))


def repeated(rows: Tensor, times: int) -> Tensor:
    return rows.repeat_interleave(times, 0)


SETS = {  # reference, samples
    "several_blocks": (draw(2300, 24, 1, rank=6), draw(1203, 24, 2, shift=0.1, rank=6)),
    "wide": (draw(160, 2048, 1, rank=40), draw(150, 2048, 2, shift=0.02, rank=40)),
    "one_dimension": (draw(1100, 1, 1, scale=3.0), draw(1050, 1, 2, scale=3.0)),
    "far_from_the_origin": (500 + draw(400, 32, 1), 500 + draw(300, 32, 2, shift=0.1)),
    "barely_enough": (draw(4, 8, 1), draw(5, 8, 2)),
    "candidates_and_one": (draw(11, 8, 1), draw(12, 8, 2)),
    "copies_of_the_reference": (draw(300, 64, 1), torch.cat([draw(300, 64, 1)[:100], draw(50, 64, 2)])),
    "duplicates": (repeated(draw(70, 64, 1), 4), repeated(draw(30, 64, 2, shift=0.1), 15)),
    "one_mode": (draw(200, 64, 1), repeated(draw(1, 64, 2), 60)),
    "one_mode_of_the_reference": (draw(200, 64, 1), repeated(draw(200, 64, 1)[:1], 60)),
    "one_point": (torch.ones(50, 16) / 3, torch.ones(40, 16) / 3),
    "grid_1d": (integers(1500, 1, 1000, 1), integers(1400, 1, 1100, 2)),
    "grid_3d": (integers(700, 3, 12, 1), integers(600, 3, 14, 2)),
    "grid_2048d": (integers(60, 2048, 3, 1), integers(50, 2048, 3, 2)),
    "huge": (1e20 * draw(60, 16, 1), 1e20 * draw(50, 16, 2, shift=0.1)),  # squares leave the range of float32
    "minute": (1e-24 * draw(60, 16, 1), 1e-24 * draw(50, 16, 2, shift=0.1)),
    "mixed_scales": (
        torch.cat([draw(60, 16, 1), 1e4 * draw(60, 16, 2), 1e-4 * draw(60, 16, 3)]),
        torch.cat([draw(60, 16, 4), 1e4 * draw(60, 16, 5), 1e-4 * draw(60, 16, 6)]),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_every_row_falls_as_in_float64(name):
    reference, samples = SETS[name]
    torch.testing.assert_close(squared_radii(reference), brute_radii(reference), rtol=1e-9, atol=0)
    assert torch.equal(inside(samples, reference), brute_inside(samples, reference))
    assert torch.equal(inside(reference, samples), brute_inside(reference, samples))


@pytest.mark.parametrize("name", [name for name in SETS if len(SETS[name][1]) >= 5])
def test_recall_without_a_group_is_recall_of_the_other_samples(name):
    reference, samples = SETS[name]
    metric = Recall(reference, len(samples))
    feed(metric, samples)
    groups = jackknife_groups(len(samples))
    kept = [groups != group for group in range(-1, int(groups.max()) + 1)]
    expected = [brute_inside(reference, samples[part]).double().mean() for part in kept]
    assert torch.equal(metric._values(), torch.stack(expected))


def test_a_ball_holds_its_boundary_and_nothing_beyond():
    line = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]  # radii 3, 2, 2, 3: from -3 to 6
    queries = torch.tensor([6.0, 6.000001, -3.0, -3.000001])[:, None]
    assert inside(queries, line).tolist() == [True, False, True, False]


def test_close_calls_are_settled_and_the_others_are_not_touched(monkeypatch):
    asked = []
    settled = Exact._settled
    monkeypatch.setattr(Exact, "_settled", lambda self, a, *rest: asked.append(len(a)) or settled(self, a, *rest))
    line = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
    inside(torch.tensor([[6.000001], [7.0], [1.0], [6.0]]), line)
    assert asked == [2]


@pytest.mark.parametrize("name", ["several_blocks", "wide", "far_from_the_origin", "mixed_scales", "grid_3d"])
def test_the_tolerance_bounds_the_error_of_float32(name):
    reference, samples = SETS[name]
    arithmetic = Exact()
    norms, a_norms = arithmetic.norms(reference), arithmetic.norms(samples)
    quick = arithmetic.distances(arithmetic.products(samples, reference), a_norms, norms)
    error = (quick.double() - brute_distances(samples, reference)).abs().amax(1)
    assert (error <= arithmetic.tolerance(samples.shape[1], a_norms + norms.max())).all()


def test_products_of_lower_precision_elsewhere_change_nothing():
    reference, samples = SETS["wide"]
    plain = feed(Recall(reference, len(samples)), samples)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert feed(Recall(reference, len(samples)), samples) == plain
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("arithmetic", ["exact", "adm_float16"])
def test_order_and_batches_do_not_matter(arithmetic):
    reference, samples = SETS["several_blocks"]
    reference, samples = 40 * reference, 40 * samples  # some float16 norms overflow, some do not
    orders = [torch.arange(len(samples)).split(1203), torch.arange(len(samples)).flip(0).split(97)]
    for build in (
        lambda: Precision(reference, None, len(samples), arithmetic),
        lambda: Recall(reference, len(samples), arithmetic),
    ):
        found = []
        for batches in orders:
            metric = build()
            for batch in batches:
                metric.update(samples[batch], batch)
            found.append(metric.compute())
        assert found[0] == found[1]


@pytest.mark.parametrize("name", CASES)
def test_exact_scores_equal_the_definition(name):
    reference, samples = CASES[name]
    precision, recall = EXPECTED[name]["definition_float64"]["precision_recall"]
    row = 1.01 if name == "wide_2048" else 1e-9  # nearly equal distances there: one row either way
    assert abs(feed(Precision(reference, None, len(samples)), samples).value - precision) * len(samples) < row
    assert abs(feed(Recall(reference, len(samples)), samples).value - recall) * len(reference) < row


@pytest.mark.parametrize("name", CASES)
def test_float16_scores_equal_the_emulation_and_nearly_adm(name):
    reference, samples = CASES[name]
    emulated, adm = EXPECTED[name]["half_emulation"], EXPECTED[name]["adm"]
    precision = Precision(reference, None, len(samples), "adm_float16")
    found = [
        feed(precision, samples).value,
        feed(Recall(reference, len(samples), "adm_float16"), samples).value,
    ]
    assert found == pytest.approx(emulated["precision_recall"], abs=1e-12)
    assert found == pytest.approx(adm["precision_recall"], abs=0.02)
    assert float(precision.radii.sum()) == pytest.approx(
        emulated["radii_ref_sum"], rel=1e-12 if adm["half_path"] else 1e-7
    )


def test_float16_recall_without_a_group_is_recall_of_the_other_samples():
    reference, samples = SETS["several_blocks"]
    metric = Recall(reference, len(samples), "adm_float16")
    feed(metric, samples)
    groups = jackknife_groups(len(samples))
    rest = [samples[groups != group] for group in range(10)]
    expected = [feed(Recall(reference, len(rows), "adm_float16"), rows).value for rows in rest]
    assert metric._values()[1:].tolist() == expected


def test_float16_distances_are_rounded_at_every_step():
    a, b = torch.tensor([[45.3, 3.1]]), torch.tensor([[45.1, 2.9]])
    arithmetic = AdmFloat16()
    found = arithmetic.distances(arithmetic.products(a, b), arithmetic.norms(a), arithmetic.norms(b))
    # By hand: squares 2054 + 9.6 and 2033 + 8.4, so norms 2064 and 2041; product 2052; 2064 - 4104 + 2041 = 1.
    # It would be 0 with the norms added first (4104, steps of 4) or with squares not rounded (norms 2062 and 2042).
    assert found.item() == 1
    assert float(brute_distances(a, b)) == pytest.approx(0.08, rel=1e-4)


def test_a_row_with_an_overflow_of_float16_is_taken_in_float32():
    reference, samples = (10 * rows for rows in SETS["several_blocks"])
    beyond = torch.cat([reference, torch.full((1, 24), 100.0)])  # its squared norm, 240,000, is infinite in float16
    radii = torch.cat([squared_radii(reference), torch.zeros(1)])[:, None]
    arithmetic = AdmFloat16()
    rounded = arithmetic.covered(samples, reference, arithmetic.norms(reference), radii[:-1])[:, 0]
    found = arithmetic.covered(samples, beyond, arithmetic.norms(beyond), radii)[:, 0]
    assert torch.equal(found, inside(samples, reference)) and not torch.equal(found, rounded)
    torch.testing.assert_close(arithmetic.radii(beyond)[:, 0], squared_radii(beyond), rtol=1e-5, atol=0)


def test_a_radius_of_zero_needs_no_comparison_with_all_rows(monkeypatch):
    monkeypatch.setattr(Exact, "precise", None)  # a call would fail
    assert (squared_radii(repeated(draw(100, 64, 1), 20)) == 0).all()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda rows: Precision(rows, None, 9, "float8"), "'float8' is not an arithmetic.*exact, adm_float16"),
        (lambda rows: Recall(rows, 9, "half"), "'half' is not an arithmetic.*exact, adm_float16"),
        (lambda rows: Precision(rows, squared_radii(rows), 9, "adm_float16"), "leave them out"),
        (lambda rows: Precision(rows[:3], None, 9), "more than 3 rows on either side, got 3"),
        (lambda rows: squared_radii(rows[:3]), "more than 3 rows on either side, got 3"),
        (lambda rows: Recall(rows, 4), "at least 5 samples"),
    ],
)
def test_what_cannot_be_scored_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build(CASES["base"][0])


def test_memory_beyond_the_rows_does_not_grow_with_their_square(monkeypatch):
    largest = []
    for arithmetic in (Exact, AdmFloat16):
        distances = arithmetic.distances
        monkeypatch.setattr(
            arithmetic,
            "distances",
            lambda self, products, *norms, plain=distances: (
                largest.append(products.numel()) or plain(self, products, *norms)
            ),
        )
    reference, samples = SETS["several_blocks"]
    feed(Recall(reference, len(samples)), samples)
    feed(Recall(reference, len(samples), "adm_float16"), samples)
    assert max(largest) == BLOCK * BLOCK
