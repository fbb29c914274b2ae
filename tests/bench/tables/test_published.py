"""Printed values: what papers print, their arithmetic, and that doubtful ones say so."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from bench.tables.published import (
    VALUES,
    contradictions,
    deviating_totals,
    load_published,
    printed_gflops,
    total_deviation,
)
from bench.tables.specs import load_table, paper_tables

ROWS = load_published()


def find(where: str, model: str, **equals: object):
    (row,) = (
        row
        for row in ROWS
        if (row.where, row.model) == (where, model) and all(getattr(row, key) == value for key, value in equals.items())
    )
    return row


@pytest.mark.parametrize(
    "where, model, equals, printed",
    [
        ("DiffuSSM Table 1", "DiffuSSM-XL-G", {"resolution": 256}, ("2.28", "4.49", "259.13", "0.86", "0.56")),
        ("DiffuSSM Table 1", "DiffuSSM-XL-G", {"resolution": 512}, ("3.41", "5.84", "255.06", "0.85", "0.49")),
        ("DiT Table 2", "DiT-XL/2-G", {"scale": "1.5"}, ("2.27", "4.60", "278.24", "0.83", "0.57")),
        ("DiT Table 3", "DiT-XL/2", {"resolution": 512}, ("12.03", "7.12", "105.25", "0.75", "0.64")),
        ("LDM Table 10", "LDM-4-G", {"scale": "1.5"}, ("3.60", "", "247.67", "0.87", "0.48")),
    ],
)
def test_scores_stand_digit_for_digit(where, model, equals, printed):
    values = find(where, model, **equals).values
    assert tuple(values[key] for key in ("fid", "sfid", "inception_score", "precision", "recall")) == printed


def test_every_printed_total_is_images_times_gflops():
    checked = [row for row in ROWS if total_deviation(row) is not None]
    assert {row.name for row in checked} >= {"DiffuSSM-XL", "DiT-XL/2", "ADM", "ADM-U", "LDM-4", "LDM-8", "U-ViT-H/2"}
    assert deviating_totals(checked) == []  # the exceptions, all of them


def test_a_total_that_does_not_hold_is_named():
    row = find("DiffuSSM Table 1", "DiT-XL/2", resolution=256)
    assert total_deviation(row) == pytest.approx(2.13e11 / (1792e6 * 118.64) - 1)
    wrong = replace(row, values={**row.values, "train_gflops_papers": "2.15e11"})
    assert deviating_totals([row, wrong]) == [wrong]
    assert total_deviation(find("DiT Table 6", "ADM", resolution=512)) is None


def test_values_are_numbers_and_rows_say_where_from():
    for row in ROWS:
        assert row.confidence in ("high", "medium", "low")
        assert row.guidance in ("", "none", "classifier", "cfg", "rejection")
        assert row.source
        assert all(float(text) > 0 for text in row.values.values() if text)
        assert set(row.derived) <= {key for key in VALUES if row.values[key]}
        assert (row.where.startswith(row.paper), bool(row.model)) == (True, True)


def test_derived_images_are_steps_times_batch():
    found = 0
    for row in ROWS:
        product = re.search(r"images = ([\d.]+)([KM]) x (\d+)", row.note)
        if product:
            steps = float(product[1]) * {"K": 1e3, "M": 1e6}[product[2]]
            assert float(row.values["images_m"]) == pytest.approx(steps * int(product[3]) / 1e6, rel=1e-3)
            assert row.derived == ("images_m",)
            found += 1
    assert found > 15


def test_a_value_knows_its_own_source():
    row = find("DiT Table 2", "ADM", resolution=256)
    assert (row.source_of("fid"), row.source_of("gflops")) == ("DiT Table 2", "DiT Table 6")


@pytest.mark.parametrize(
    "name, resolution, gflops, source",
    [
        ("DiT-XL/2", 256, 118.64, "DiT Table 4"),
        ("DiT-L/4", 256, 19.70, "DiT Table 4"),  # Table 1 rounds to 19.7
        ("DiT-B/4", 256, 5.56, "DiT Table 4"),  # Table 1 rounds to 5.6
        ("U-ViT-H/2", 256, 133.25, "DiCo Table 9"),  # U-ViT rounds to 133
        ("DiffuSSM-XL", 512, 1066.2, "DiCo Tables 9 and 10"),
    ],
)
def test_forward_gflops_are_the_most_precise_print(name, resolution, gflops, source):
    printed = printed_gflops(name, resolution)
    assert (printed.gflops, printed.source) == (gflops, source)


def test_nothing_is_printed_of_a_size_that_no_paper_has():
    assert printed_gflops("DiffuSSM-S", 256) is None


def test_contradictions_are_about_cells_that_are_printed():
    for entry in contradictions():
        rows = [row for row in ROWS if (row.name, row.resolution, row.data) == (*entry[:2], entry.data)]
        assert any(row.values[key] for row in rows for key in entry.columns), entry
        assert set(entry.tables or ()) <= set(paper_tables())


def test_low_confidence_rows_are_of_the_table_that_was_not_confirmed():
    low = [row for row in ROWS if row.confidence == "low"]
    assert {row.paper for row in low} == {"DiffuSSM"}
    names = {place.model for place in load_table("diffussm-table1").rows}
    assert {row.model for row in low if row.table == "Table 1"} <= names
