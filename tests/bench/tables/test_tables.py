"""Tables: exact texts, refusals, and what may be called best or equal."""

from __future__ import annotations

import csv
import io
import re
import sys
from dataclasses import replace

import pytest

from bench import cli
from bench.console import say
from bench.errors import UserError
from bench.store import ResultStore
from bench.sweeps.sweep import load_sweep
from bench.tables import comparison as tables
from bench.tables.command import print_named
from bench.tables.formats import number
from bench.tables.stored import compared

MARKDOWN = """\
| model | params (M) | Gflops | of which SSM | images seen | training Gflops | Gflops × images | sample Gflops | fd500[effnet-lite0] ↓ | precision[effnet-lite0] ↑ | untrained fd500[effnet-lite0] ↓ |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| DiT-T/2 | 1.25 | 0.02 | 0 | 9,600 | 576 | 192 | 0.5 | 61.23 ± 1.11 | 0.701 ± 0.021 | 310.50 ± 2.00 |
| DiffuSSM-T | 1.5 | 0.025 | 0.009 | 7,680 | 576 | 192 | 0.625 | **58.00 ± 1.25** | 0.730 ± 0.020 | 311.25 ± 2.00 |

DiffuSSM-T has the best fd500[effnet-lite0] (58.00 ± 1.25); its interval overlaps no other's.

Warning: 500 samples are few. Below 10,000 a Frechet distance is largely bias: compare fd500[effnet-lite0] only with distances of as many samples, and never with published ones.

Protocol digits500 (version 1): 500 samples, labels balanced, seed 0; sampler ddim, 25 steps; cfg_scale 1 (unguided), cfg_channels all; decoder kl-f4; uint8 by DiT's rule. Extractor effnet-lite0 (bb22), float32; resize bilinear to 224. Reference digits (5000 images: as they are; cc33).

Training: data digits, recipe digits, batch_size 96, seed 0, weights ema. Training Gflops differ by 0.00 %.

Gflops: 1e9 multiply-adds of one unguided forward of one image, backbone only (SSM: S4D kernel and FFTs). Training Gflops: 3 × Gflops × images seen; Gflops × images is the total that papers print. Sample Gflops: per generated image.

±: half width of the 95 % interval over the drawing of the generated samples (delete-a-group jackknife; shares of samples: binomial); it covers neither the training seed nor the reference. Bold: the best, where its interval overlaps no other's.
"""  # noqa: E501

TERMINAL = """\
model                                  DiT-T/2      DiffuSSM-T
params (M)                                1.25             1.5
Gflops                                    0.02           0.025
of which SSM                                 0           0.009
images seen                              9,600           7,680
training Gflops                            576             576
Gflops × images                            192             192
sample Gflops                              0.5           0.625
fd500[effnet-lite0] ↓             61.23 ± 1.11  58.00 ± 1.25 *
precision[effnet-lite0] ↑        0.701 ± 0.021   0.730 ± 0.020
untrained fd500[effnet-lite0] ↓  310.50 ± 2.00   311.25 ± 2.00

DiffuSSM-T has the best fd500[effnet-lite0] (58.00 ± 1.25); its interval overlaps no other's.
"""


def bold(table) -> list[str]:
    return [cell.text for row in table.rows for cell in row if cell.bold]


def test_markdown_of_a_comparison(comparison):
    assert tables.render(tables.build(comparison), "md") == MARKDOWN


def test_terminal_text_of_a_comparison(comparison):
    text = tables.terminal(tables.build(comparison))
    assert text.startswith(TERMINAL)
    assert max(map(len, text.splitlines())) <= 100
    assert "*: the best" in " ".join(text.split())


def test_csv_holds_full_precision_under_names_with_units(comparison):
    text = tables.render(tables.build(comparison), "csv")
    first, second = csv.DictReader(io.StringIO(text))
    assert list(first) == [
        "run_id", "model", "size", "data", "recipe", "changed", "batch_size", "seed", "weights", "steps",
        "params_m", "gflops", "gflops_ssm", "images_seen", "train_gflops", "train_gflops_papers", "sample_gflops",
        "fd500[effnet-lite0]", "fd500[effnet-lite0]_ci95", "precision[effnet-lite0]", "precision[effnet-lite0]_ci95",
        "untrained_fd500[effnet-lite0]", "untrained_fd500[effnet-lite0]_ci95",
        "protocol_name", "protocol_version", "protocol_num_samples",
    ]  # fmt: skip
    assert (first["fd500[effnet-lite0]"], first["fd500[effnet-lite0]_ci95"]) == ("61.234", "1.106")
    assert (second["run_id"], float(second["gflops_ssm"])) == ("diffussm-t-digits-0000bbbb", 0.003 + 0.006)
    assert "\r" not in text


def test_latex_is_one_booktabs_table_with_the_protocol_in_its_caption(comparison):
    text = tables.render(tables.build(comparison), "latex")
    order = [r"\begin{table}", r"\begin{tabular}{lrrrrrrrrrr}", r"\toprule", r"\midrule", r"\bottomrule"]
    order += [r"\end{tabular}", r"\caption{", r"\end{table}"]
    assert [text.count(piece) for piece in order] == [1] * len(order)
    assert sorted(order, key=text.index) == order
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [row.count(" & ") for row in rows] == [10, 10, 10]
    assert re.findall(r"\\textbf\{.*?\}", text) == [r"\textbf{58.00 $\pm$ 1.25}"]
    assert r"cfg\_scale 1 (unguided)" in text
    assert r"95 \% interval" in text
    assert not set("±×↓↑–") & set(text)


def test_signs_of_a_markup_in_names_stay_text(make_result):
    table = tables.build([make_result(title="A&B_50%|#{x}~^\\")])
    assert r"A\&B\_50\%\textbar{}\#\{x\}\textasciitilde{}\textasciicircum{}\textbackslash{}-T/2 & " in tables.render(
        table, "latex"
    )
    assert "| A&B_50%&#124;#{x}~^\\-T/2 |" in tables.render(table, "md")


@pytest.mark.parametrize("others", [(61.0, 1.0), (59.99, 1.0)])
def test_nothing_is_bold_where_intervals_touch(make_result, others):
    table = tables.build([make_result(fd=(58.0, 2.0)), make_result(run_id="b", title="U-ViT", fd=others)])
    assert [text for text in bold(table) if text.startswith("58")] == []
    assert table.notes[0] == (
        "DiT-T/2 has the best fd500[effnet-lite0] (58.00 ± 2.00), "
        "but its interval overlaps that of U-ViT-T/2: no verdict."
    )


def test_the_best_is_the_highest_where_higher_is_better(make_result):
    low, high = make_result(precision=(0.5, 0.01)), make_result(run_id="b", title="U-ViT", precision=(0.6, 0.01))
    assert bold(tables.build([low, high])) == ["0.600 ± 0.010"]


def test_a_single_row_is_not_the_best_of_anything(make_result):
    table = tables.build([make_result()])
    assert bold(table) == []
    assert table.notes[1].startswith("Protocol digits500")


def test_ssm_and_untrained_columns_appear_where_some_row_has_them(comparison, make_result):
    assert tables.build([make_result()]).header == (
        "model", "params (M)", "Gflops", "images seen", "training Gflops", "Gflops × images", "sample Gflops",
        "fd500[effnet-lite0] ↓", "precision[effnet-lite0] ↑",
    )  # fmt: skip
    table = tables.build(comparison[:3] + comparison[4:])  # DiffuSSM was not scored untrained
    assert [row[-1].text for row in table.rows] == ["310.50 ± 2.00", "–"]
    assert [record["untrained_fd500[effnet-lite0]"] for record in table.records] == [310.5, None]


def test_guidance_is_never_called_unguided(make_result):
    note = tables.build([make_result(protocol={"cfg_scale": 1.5, "cfg_channels": "3"})]).notes[1]
    assert "cfg_scale 1.5, cfg_channels 3;" in note


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"protocol": {"num_samples": 1000}}, "num_samples 500 or 1000"),
        ({"protocol": {"sampler": "ddpm", "sampler_steps": 250}}, "sampler ddim or ddpm; sampler_steps 25 or 250"),
        ({"protocol": {"sampler_eta": 1.0}}, "sampler_eta None or 1.0"),
        ({"data": "imagenet256"}, "data digits or imagenet256"),
    ],
)
def test_rows_of_different_protocols_are_refused(make_result, changes, told):
    with pytest.raises(UserError, match=f"different protocols: {told}. Score them alike"):
        tables.build([make_result(), make_result(run_id="b", **changes)])


def test_no_results_make_no_table():
    with pytest.raises(UserError, match="bench evaluate"):
        tables.build([])


def test_equalised_gives_the_spread_of_the_final_rows(comparison):
    assert tables.equalised(comparison) == 0.0
    shorter = [*comparison[:-1], replace(comparison[-1], train_gflops=570.0)]
    assert tables.equalised(shorter) == pytest.approx(576 / 570 - 1)


def test_rows_that_are_not_equal_are_named_with_what_they_spent(comparison):
    with pytest.raises(UserError, match=r"25.0 % in images \(DiT-T/2 9600, DiffuSSM-T 7680\)"):
        tables.equalised(comparison, "images")
    assert (
        "Training Gflops differ by 2.86 %."
        in tables.build([*comparison[:-1], replace(comparison[-1], train_gflops=560.0)]).notes[3]
    )


def test_runs_of_one_size_are_told_apart(make_result):
    seeds = [make_result(run_id="dit-t-2-aaaa"), make_result(run_id="dit-t-2-bbbb", seed=1)]
    assert list(tables.labels(seeds).values()) == ["DiT-T/2 (seed 0)", "DiT-T/2 (seed 1)"]
    changes = [{}, {"model.depth": 2}, {"model.qkv_bias": False, "data.classes": [3, 8]}, {"recipe.ema_decay": 0.9}]
    parts = [make_result(run_id=f"dit-t-2-{i}", changed=changed) for i, changed in enumerate(changes)]
    assert list(tables.labels(parts).values()) == [
        "DiT-T/2 (recipe digits)",
        "DiT-T/2 (depth 2, recipe digits)",
        "DiT-T/2 (qkv_bias false, 2 classes, recipe digits)",
        "DiT-T/2 (recipe digits with ema_decay=0.9)",
    ]
    assert list(tables.labels(parts[1:2]).values()) == ["DiT-T/2 (depth 2)"]  # alone, too, it is not the named size
    sizes = [make_result(run_id="a"), make_result(run_id="b", batch_size=8, changed={"recipe.batch_size": 8})]
    assert [name.partition("(")[2] for name in tables.labels(sizes).values()] == [
        f"batch_size {row.batch_size})" for row in sizes
    ]
    budgets = [make_result(run_id="dit-t-2-aaaa"), make_result(run_id="dit-t-2-bbbb")]
    assert list(tables.labels(budgets).values()) == ["DiT-T/2 aaaa", "DiT-T/2 bbbb"]


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.012345, "0.01235"), (118.6432, "118.6"), (50016, "50,016"), (1.4237e11, "1.424e11")],
)
def test_numbers_keep_four_digits(value, text):
    assert number(value) == text


def test_of_comparisons_with_one_name_the_one_scored_last_is_meant(comparison, tmp_path):
    longer = [
        replace(
            row, run_id=row.run_id + "-longer", train_gflops=10 * row.train_gflops, created="2026-02-01T00:00:00+00:00"
        )
        for row in comparison
    ]
    rescored = [replace(row, protocol=row.protocol | {"seed": 1}) for row in comparison]
    assert compared([*rescored, *comparison, *longer], "digits", tmp_path) == longer
    again = [replace(row, created="2026-03-01T00:00:00+00:00") for row in comparison]
    assert compared([*longer, *again], "digits", tmp_path) == again
    other_seed = [replace(row, run_id=row.run_id + "-1", seed=1) for row in comparison]
    assert compared([*other_seed, *again], "digits", tmp_path) == again
    assert compared(again, "digit", tmp_path) == []


def test_of_a_sweep_all_runs_of_its_file_are_meant(tmp_path, make_result):
    """Seeds, batch sizes and budgets, which would be other comparisons; not runs that only an earlier file had."""
    path = tmp_path / "seeds.yaml"
    path.write_text(
        "use: {recipe: digits}\nmodel: {size: T/2}\nequal: none\n"
        "sweep: {list: [{seed: 0, budget.steps: 5}, {seed: 1, budget.steps: 9}]}\n"
    )
    sweep = load_sweep(str(path), [f"paths.runs={tmp_path / 'runs'}"])
    rows = [
        make_result(run_id=run.run_id, comparison="seeds", seed=i, train_gflops=run.train_gflops, steps=run.steps)
        for i, run in enumerate(sweep.runs)
    ]
    earlier = make_result(run_id="dit-t-2-earlier", comparison="seeds", created="2025-01-01T00:00:00+00:00")
    assert compared([earlier, *rows], "seeds", tmp_path / "runs") == rows
    assert compared([earlier, *rows], "seeds", tmp_path / "elsewhere") == [earlier, rows[0]]  # as for a comparison


def test_the_command_prints_a_stored_comparison(tmp_path, comparison, capsys):
    for row in comparison:
        ResultStore(tmp_path / "results.jsonl").append(row)
    print_named("digits", "md", tmp_path)
    assert capsys.readouterr().out == MARKDOWN


def test_notices_do_not_stand_in_a_table(monkeypatch, tmp_path, comparison, capsys):
    """Stdout may be a file of that format."""
    for row in comparison:
        ResultStore(tmp_path / "results.jsonl").append(row)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"cut')
    monkeypatch.setattr(sys, "argv", ["bench", "table", "digits", "--format", "md", "--runs", str(tmp_path)])
    cli.main()
    out, err = capsys.readouterr()
    assert out == MARKDOWN and "cut off" in err
    say("back")
    assert capsys.readouterr().out == "back\n"


def test_an_unknown_comparison_is_answered_with_the_nearest_one(tmp_path, make_result):
    ResultStore(tmp_path / "results.jsonl").append(make_result())
    with pytest.raises(UserError, match=r"'digit' is neither a paper's table .* Did you mean digits\?"):
        print_named("digit", "md", tmp_path)
    with pytest.raises(UserError, match="bench compare"):
        print_named("digits", "md", tmp_path / "nothing here")
