"""Figures of a comparison: score against training compute, Gflops against resolution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.errors import UserError
from bench.files import atomic_write
from bench.formats import number
from bench.store import Result
from bench.tables import labels, require_one_protocol, score_specs

# (colour, marker, line), told apart without colour too; colours: Okabe and Ito 2008, distinct in every colour vision.
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "-"),
    ("#56B4E9", "P", "--"),
    ("#000000", "X", "-."),
)
DPI = 150


def score_against_compute(results: Sequence[Result], column: str, path: Path) -> None:
    """PNG of a score over training Gflops (log), one curve a run, with 95 % intervals.

    Untrained weights have no place on a log axis: they stand at its left end, open and joined by a dotted line.
    Raises: UserError if the protocols differ or no row has that score.
    """
    require_one_protocol(results)
    specs = score_specs(results[0])
    if column not in specs:
        raise UserError(f"The results have no score '{column}'. Choose one of {', '.join(specs)}.")
    figure, axes = _figure()
    left = min((row.train_gflops for row in results if row.train_gflops), default=1.0) / 2
    for k, (run_id, label) in enumerate(labels(results).items()):
        colour, marker, line = STYLES[k % len(STYLES)]
        run = sorted((row for row in results if row.run_id == run_id), key=lambda row: row.steps)
        x = [row.train_gflops or left for row in run]
        y = [row.scores[column] for row in run]
        axes.errorbar(x, y, [row.ci95[column] for row in run], fmt="none", ecolor=colour, capsize=3)
        before = sum(not row.train_gflops for row in run)  # untrained points, which come first
        axes.plot(x[: before + 1], y[: before + 1], color=colour, linewidth=1, linestyle=(0, (1, 2)))
        axes.plot(x[:before], y[:before], color=colour, marker=marker, markerfacecolor="white", linestyle="none")
        axes.plot(x[before:], y[before:], color=colour, marker=marker, markersize=5, linestyle=line, label=label)
    _log(axes, "x")
    if any(not row.train_gflops for row in results):
        axes.text(left, 0.02, "untrained", transform=axes.get_xaxis_transform(), rotation=90, ha="right", fontsize=8)
    scores = [row.scores[column] for row in results]
    if min(scores) > 0 and max(scores) / min(scores) > 4:
        _log(axes, "y")
    protocol = results[0].protocol
    axes.set_xlabel("training Gflops (3 × Gflops × images seen)")
    axes.set_ylabel(f"{column} ({'higher' if specs[column].higher_is_better else 'lower'} is better)")
    title = f"{results[0].data}, {protocol['name']}: {protocol['num_samples']} samples, 95 % intervals"
    _save(figure, axes, title, path)


def gflops_against_resolution(series: Sequence[tuple[str, Sequence[tuple[int, float]]]], path: Path) -> None:
    """PNG of Gflops of one forward over the side of the image in pixels, both log; series: (label, points)."""
    figure, axes = _figure()
    for k, (label, points) in enumerate(series):
        colour, marker, line = STYLES[k % len(STYLES)]
        sides, gflops = zip(*points, strict=True)
        axes.plot(sides, gflops, color=colour, marker=marker, linestyle=line, label=label)
    _log(axes, "x", "y")
    axes.set_xticks(sorted({side for _, points in series for side, _ in points}))
    axes.set_xlabel("image side (pixels)")
    axes.set_ylabel("Gflops of one forward (1e9 multiply-adds)")
    _save(figure, axes, "Cost of one forward of one image", path)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _log(axes: Axes, *names: str) -> None:
    """Log axes (x, y) whose ticks are numbers, not powers of ten."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, axes: Axes, title: str, path: Path) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=DPI)
