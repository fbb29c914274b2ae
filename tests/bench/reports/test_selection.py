"""Selection: a comparison or runs by name, of one protocol, each checkpoint once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.errors import UserError
from bench.reports.selection import select
from bench.store import ResultStore


def told(selection) -> list[tuple[str, int]]:
    return [(row.run_id, row.steps) for row in selection.results]


def test_a_comparison_by_name(runs):
    found = select(["digits"], runs)
    assert (found.name, found.runs) == ("digits", runs)
    assert found.results == ResultStore(runs / "results.jsonl").load()


def test_runs_by_id_or_directory_in_the_order_given(runs, comparison):
    dit, ssm = comparison[0].run_id, comparison[3].run_id
    by_id = select([ssm, dit], runs)
    assert told(by_id) == [(ssm, 0), (ssm, 50), (ssm, 80), (dit, 0), (dit, 50), (dit, 100)]
    assert select([f"{runs}/{ssm}/", f"{runs}/{dit}"], runs / "elsewhere") == by_id
    assert told(select([dit], runs)) == [(dit, 0), (dit, 50), (dit, 100)]


def test_of_several_protocols_the_one_used_last_by_all(runs, comparison):
    store = ResultStore(runs / "results.jsonl")
    dit, ssm = comparison[2], comparison[5]
    guided = dit.protocol | {"cfg_scale": 4.0}
    store.append(replace(dit, protocol=guided, created="2026-02-01T00:00:00+00:00"))
    both = select([dit.run_id, ssm.run_id], runs).results
    assert {row.protocol["cfg_scale"] for row in both} == {1.0} and len(both) == 6
    assert [row.protocol["cfg_scale"] for row in select([dit.run_id], runs).results] == [4.0]
    store.append(replace(ssm, protocol=guided, created="2026-02-01T00:00:00+00:00"))
    assert told(select([dit.run_id, ssm.run_id], runs)) == [(dit.run_id, 100), (ssm.run_id, 80)]


def test_a_row_stored_for_two_comparisons_counts_once(runs, comparison):
    ResultStore(runs / "results.jsonl").append(replace(comparison[2], comparison="other"))
    assert len(select([comparison[2].run_id], runs).results) == 3


def test_what_cannot_be_selected(runs, comparison, tmp_path):
    dit = comparison[0].run_id
    with pytest.raises(UserError, match=r"no scores of 'digit', as a run or a comparison\. Did you mean digits\?"):
        select(["digit"], runs)
    with pytest.raises(UserError, match=r"'digits' is a comparison\. Name it alone, or name runs\."):
        select([dit, "digits"], runs)
    with pytest.raises(UserError, match="Name runs of one directory"):
        select([f"{runs}/{dit}", f"{tmp_path}/other/x"], runs)
    with pytest.raises(UserError, match=r"holds no results\.jsonl"):
        select(["digits"], tmp_path / "none")
    guided = replace(comparison[5], run_id="guided", protocol=comparison[5].protocol | {"cfg_scale": 4.0})
    ResultStore(runs / "results.jsonl").append(guided)
    with pytest.raises(UserError, match=r"different protocols: cfg_scale 1.0 or 4.0"):
        select([dit, "guided"], runs)
