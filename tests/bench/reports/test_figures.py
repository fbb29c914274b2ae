"""Figures: what is drawn where, and files whose bytes follow from what is drawn."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from bench import cli
from bench.errors import UserError
from bench.reports import figures
from bench.reports.curves import levels, loss_curves
from bench.reports.plotting import STYLES, png, save
from bench.reports.selection import select
from bench.tables.comparison import labels

FD = "fd500[effnet-lite0]"


def curves(figure) -> dict[str, list[tuple[float, float]]]:
    (axes,) = figure.axes
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in labelled}


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_curve_holds_the_trained_checkpoints_in_order_of_compute(comparison):
    figure = figures.score_against_compute(comparison[::-1], FD)
    assert curves(figure) == {
        "DiffuSSM-T": [(288.0, 110.0), (576.0, 58.0)],
        "DiT-T/2": [(288.0, 120.0), (576.0, 61.234)],
    }
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylabel() == f"{FD} (lower is better)"


def test_untrained_scores_stand_open_at_the_left_end(comparison):
    figure = figures.score_against_compute(comparison, FD)
    marks = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [line.get_data()[1][0] for line in marks] == [310.5, 311.25]
    assert {line.get_data()[0][0] for line in marks} == {144.0}  # half the least training compute
    assert texts(figure)[0] == "untrained"


def test_bars_are_the_95_percent_intervals(make_result):
    figure = figures.score_against_compute([make_result(precision=(0.7, 0.02))], "precision[effnet-lite0]")
    (axes,) = figure.axes
    (bar,) = axes.collections[0].get_segments()
    assert bar[:, 1].tolist() == pytest.approx([0.68, 0.72])
    assert axes.get_yscale() == "linear"


def test_few_curves_carry_their_names_in_their_colours_and_many_have_a_legend(comparison, make_result):
    few = figures.score_against_compute(comparison, FD).axes[0]
    assert few.get_legend() is None
    named = {text.get_text(): text.get_color() for text in few.texts[1:]}
    assert named == {"DiffuSSM-T": STYLES[1][0], "DiT-T/2": STYLES[0][0]}
    many = figures.score_against_compute([make_result(run_id=f"x-{k}", size=f"{k}") for k in range(5)], FD).axes[0]
    assert [text.get_text() for text in many.get_legend().get_texts()] == [f"DiT-{k}" for k in range(5)]


def test_names_of_curves_that_end_together_stay_apart(make_result):
    ends = [make_result(run_id=f"x-{k}", size=f"{k}", fd=(60 + k / 100, 1.0)) for k in range(4)]
    far = make_result(run_id="far", size="far", fd=(90.0, 1.0), train_gflops=576.0)
    figure = figures.score_against_compute([*ends[:3], far], FD)
    png(figure)
    heights = sorted(text.get_window_extent().y0 for text in figure.axes[0].texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.9 * 12 * figure.dpi / 72


def test_an_unknown_score_and_mixed_protocols_are_refused(make_result):
    with pytest.raises(UserError, match=r"no score 'fid'. Choose one of fd500\[effnet-lite0\], precision"):
        figures.score_against_compute([make_result()], "fid")
    rows = [make_result(), make_result(run_id="b", protocol={"seed": 1})]
    with pytest.raises(UserError, match="seed 0 or 1"):
        figures.score_against_compute(rows, FD)


def test_loss_curves_are_running_means_in_the_style_of_their_run(runs, comparison):
    (runs / comparison[0].run_id / "metrics.jsonl").unlink()
    figure = figures.loss_against_compute(loss_curves(comparison, runs), labels(comparison))
    (ssm,) = [line for line in figure.axes[0].lines if line.get_label() == "DiffuSSM-T"]
    assert ssm.get_data()[0] == pytest.approx([3 * 0.025 * 96 * step for step in range(10, 101, 10)])
    assert ssm.get_data()[1] == pytest.approx([1 / step for step in range(10, 101, 10)])
    assert ssm.get_color() == STYLES[1][0]  # DiffuSSM is the second run, also where the first has no log
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        figures.loss_against_compute({}, labels(comparison))


def test_grids_lie_a_column_a_run_and_a_row_a_level(runs):
    results = select(["digits"], runs).results
    figure = figures.sample_grids(levels(results), labels(results), runs)
    shown = [
        (axes.get_title(), int(axes.images[0].get_array()[0, 0, 0]) if axes.images else None) for axes in figure.axes
    ]
    assert shown == [
        ("DiT-T/2, untrained", 40),
        ("DiffuSSM-T, untrained", 160),
        ("DiT-T/2, 288 training Gflops", 80),
        ("DiffuSSM-T, 288 training Gflops", 200),
        ("DiT-T/2, 576 training Gflops", 120),
        ("DiffuSSM-T, 576 training Gflops", None),  # its grid is gone
    ]


def test_without_any_grid_there_is_no_figure(runs, comparison):
    with pytest.raises(UserError, match="No sample grid of these runs is on disk"):
        figures.sample_grids(levels(comparison), labels(comparison), runs / "none")


def test_parts_of_gflops_are_stacked_to_the_whole(comparison):
    (axes,) = figures.gflops_by_part(comparison).axes
    ends = {}
    for bars in axes.containers:
        for place, bar in enumerate(bars):
            ends[place, bars.get_label()] = (bar.get_x(), bar.get_width())
    assert {label for _, label in ends} == {"linear", "attention", "convolution", "ssm kernel", "fft"}
    assert ends[1, "fft"] == pytest.approx((0.019, 0.006))
    assert sum(width for (place, _), (_, width) in ends.items() if place == 0) == pytest.approx(0.02)
    assert [text.get_text() for text in axes.texts] == ["0.02", "0.025"]


def test_gflops_over_resolution_are_log_log_with_the_resolutions_as_ticks():
    series = [("DiT-XL/2", [(256, 118.6), (512, 524.6)]), ("U-ViT-H/2", [(256, 133.2), (512, 546.2)])]
    figure = figures.gflops_against_resolution(series)
    (axes,) = figure.axes
    assert curves(figure) == dict(series)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xticks().tolist() == [256, 512]


@pytest.mark.parametrize(
    "kind, suffix",
    [("score", "png"), ("score", "svg"), ("score", "pdf"), ("loss", "pdf"), ("grids", "pdf"), ("gflops", "pdf")],
)
def test_the_same_results_give_the_same_bytes(runs, tmp_path, kind, suffix):
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        save(figures.draw(kind, select(["digits"], runs)), path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second and first.startswith(start)
    assert b"Date" not in first


def test_another_process_writes_the_same_bytes(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["bench", "figure", "digits", "--runs", str(runs), "--out", str(tmp_path / "a.pdf")]
    )
    cli.main()
    words = ["figure", "digits", "--runs", str(runs), "--out", str(tmp_path / "b.pdf")]
    subprocess.run([sys.executable, "-m", "bench", *words], check=True, capture_output=True)
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()


def test_a_png_has_the_stated_size(tmp_path, comparison):
    save(figures.score_against_compute(comparison, FD), tmp_path / "score.png")
    with Image.open(tmp_path / "score.png") as image:
        assert (image.format, image.size) == ("PNG", (7 * 150, 4.5 * 150))


@pytest.mark.parametrize(
    "words, expected",
    [
        (["digits", "--out", "a.jpg"], "End it in one of .png, .pdf, .svg."),
        (["digits", "--kind", "loss", "--score", "fid", "--out", "a.png"], "--score fid belongs to --kind score"),
        (["digits", "--every-checkpoint", "--out", "a.png"], "--every-checkpoint belongs to --kind grids"),
        (["digit", "--out", "a.png"], "Did you mean digits?"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_writes_nothing(runs, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "figure", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_styles_differ_in_every_part_that_a_reader_may_have_to_rely_on():
    colours, markers, _ = zip(*STYLES, strict=True)
    assert len(set(colours)) == len(set(markers)) == len(STYLES)
    assert [to_hex(colour).upper() for colour in colours] == list(colours)


def test_drawing_leaves_matplotlibs_global_state_alone():
    code = "import sys, bench.reports.figures; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
