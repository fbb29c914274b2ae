"""Figures: what is drawn where, and the file that comes of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from bench import figures
from bench.errors import UserError


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is saved while the test runs."""
    saved, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, axes, *rest: (saved.append(axes), save(figure, axes, *rest)))
    return saved


def curves(axes) -> dict[str, list[tuple[float, float]]]:
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in labelled}


def test_a_curve_holds_the_trained_checkpoints_in_order_of_compute(tmp_path, comparison, drawn):
    figures.score_against_compute(comparison[::-1], "fd500[effnet-lite0]", tmp_path / "score.png")
    (axes,) = drawn
    assert curves(axes) == {
        "DiffuSSM-T": [(288.0, 110.0), (576.0, 58.0)],
        "DiT-T/2": [(288.0, 120.0), (576.0, 61.234)],
    }
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylabel() == "fd500[effnet-lite0] (lower is better)"
    with Image.open(tmp_path / "score.png") as image:
        assert (image.format, image.size) == ("PNG", (7 * 150, 4.5 * 150))


def test_untrained_scores_stand_open_at_the_left_end(tmp_path, comparison, drawn):
    figures.score_against_compute(comparison, "fd500[effnet-lite0]", tmp_path / "score.png")
    marks = [line for line in drawn[0].lines if line.get_markerfacecolor() == "white"]
    assert [line.get_data()[1][0] for line in marks] == [310.5, 311.25]
    assert {line.get_data()[0][0] for line in marks} == {144.0}  # half the least training compute
    assert [text.get_text() for text in drawn[0].texts] == ["untrained"]


def test_bars_are_the_95_percent_intervals(tmp_path, make_result, drawn):
    figures.score_against_compute([make_result(precision=(0.7, 0.02))], "precision[effnet-lite0]", tmp_path / "p.png")
    axes = drawn[0]
    (bar,) = axes.collections[0].get_segments()
    assert bar[:, 1].tolist() == pytest.approx([0.68, 0.72])
    assert axes.get_yscale() == "linear"
    assert list(axes.texts) == []


def test_an_unknown_score_and_mixed_protocols_are_refused(tmp_path, make_result):
    with pytest.raises(UserError, match=r"no score 'fid'. Choose one of fd500\[effnet-lite0\], precision"):
        figures.score_against_compute([make_result()], "fid", tmp_path / "score.png")
    rows = [make_result(), make_result(run_id="b", protocol={"seed": 1})]
    with pytest.raises(UserError, match="seed 0 or 1"):
        figures.score_against_compute(rows, "fd500[effnet-lite0]", tmp_path / "score.png")
    assert list(tmp_path.iterdir()) == []


def test_gflops_over_resolution_are_log_log_with_the_resolutions_as_ticks(tmp_path, drawn):
    series = [("DiT-XL/2", [(256, 118.6), (512, 524.6)]), ("U-ViT-H/2", [(256, 133.2), (512, 546.2)])]
    figures.gflops_against_resolution(series, tmp_path / "cost.png")
    (axes,) = drawn
    assert curves(axes) == dict(series)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xticks().tolist() == [256, 512]
    assert (tmp_path / "cost.png").exists()


def test_styles_differ_in_every_part_that_a_reader_may_have_to_rely_on():
    colours, markers, _ = zip(*figures.STYLES, strict=True)
    assert len(set(colours)) == len(set(markers)) == len(figures.STYLES)
    assert [to_hex(colour).upper() for colour in colours] == list(colours)


def test_drawing_leaves_matplotlibs_global_state_alone():
    code = "import sys, bench.figures; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
