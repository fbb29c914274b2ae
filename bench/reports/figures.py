"""Figures of stored results, for papers and the report: the same results give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from bench.errors import UserError
from bench.registry import nearest
from bench.reports.curves import AXES, Level, LossCurve, levels, loss_curves, running_mean
from bench.reports.plotting import HATCHES, STYLES, finish, log, log_if_wide, new_axes, new_figure
from bench.reports.selection import Selection
from bench.store import Result
from bench.tables.comparison import finals, labels, require_one_protocol, score_specs
from bench.tables.formats import number


def draw(kind: str, selection: Selection, *, column: str | None = None, every: bool = False) -> Figure:
    """The figure of a kind (score | loss | grids | gflops), of the selected runs.

    column: the score, None: the protocol's first; every: grids of every scored checkpoint, not of the last ones alone.

    Raises: UserError if a setting does not belong to the kind, or what it shows is not stored.
    """
    if column and kind != "score":
        raise UserError(f"--score {column} belongs to --kind score; --kind {kind} shows no score.")
    if every and kind != "grids":
        raise UserError(f"--every-checkpoint belongs to --kind grids, not to --kind {kind}.")
    results = selection.results
    if kind == "score":
        return score_against_compute(results, column or next(iter(results[0].scores)))
    if kind == "loss":
        return loss_against_compute(loss_curves(results, selection.runs), labels(results))
    if kind == "grids":
        return sample_grids(levels(results if every else finals(results)), labels(results), selection.runs)
    return gflops_by_part(results)


def score_against_compute(results: Sequence[Result], column: str) -> Figure:
    """A score over training Gflops (log), one curve a run, with 95 % intervals.

    Untrained weights have no place on a log axis: they stand at its left end, open and joined by a dotted line.
    Raises: UserError if the protocols differ or no row has that score.
    """
    require_one_protocol(results)
    specs = score_specs(results[0])
    if column not in specs:
        raise UserError(f"The results have no score '{column}'. {nearest(column, list(specs))}")
    figure, axes = new_axes()
    left = min((row.train_gflops for row in results if row.train_gflops), default=1.0) / 2
    names = labels(results)
    for k, (run_id, label) in enumerate(names.items()):
        colour, marker, line = STYLES[k % len(STYLES)]
        run = sorted((row for row in results if row.run_id == run_id), key=lambda row: row.steps)
        x = [row.train_gflops or left for row in run]
        y = [row.scores[column] for row in run]
        axes.errorbar(x, y, [row.ci95[column] for row in run], fmt="none", ecolor=colour, capsize=3)
        before = sum(not row.train_gflops for row in run)  # untrained points, which come first
        axes.plot(x[: before + 1], y[: before + 1], color=colour, linewidth=1, linestyle=(0, (1, 2)))
        axes.plot(x[:before], y[:before], color=colour, marker=marker, markerfacecolor="white", linestyle="none")
        axes.plot(x[before:], y[before:], color=colour, marker=marker, markersize=5, linestyle=line, label=label)
    log(axes, "x")
    if any(not row.train_gflops for row in results):
        axes.text(left, 0.02, "untrained", transform=axes.get_xaxis_transform(), rotation=90, ha="right", fontsize=8)
    log_if_wide(axes, [row.scores[column] for row in results])
    protocol = results[0].protocol
    axes.set_xlabel(f"{AXES['train_gflops']} (3 × Gflops × images seen)")
    axes.set_ylabel(f"{column} ({'higher' if specs[column].higher_is_better else 'lower'} is better)")
    finish(axes, f"{results[0].data}, {protocol['name']}: {protocol['num_samples']} samples, 95 % intervals")
    return figure


def loss_against_compute(curves: Mapping[str, LossCurve], names: Mapping[str, str]) -> Figure:
    """The loss that is minimised over training Gflops; names: run_id -> label of every run.

    A curve's style is that of its run in the other figures. Raises: UserError if no run has a log.
    """
    if not curves:
        raise UserError(f"None of {', '.join(names)} still has its metrics.jsonl, which holds the losses.")
    figure, axes = new_axes()
    for k, (run_id, label) in enumerate(names.items()):
        if run_id in curves:
            colour, _, line = STYLES[k % len(STYLES)]
            curve = curves[run_id]
            loss = curve.losses["train/loss"]
            axes.plot(curve.train_gflops, loss, color=colour, linewidth=0.6, alpha=0.4)
            axes.plot(curve.train_gflops, running_mean(loss), color=colour, linestyle=line, label=label)
    log_if_wide(axes, [loss for curve in curves.values() for loss in curve.losses["train/loss"]])
    axes.set_xlabel(f"{AXES['train_gflops']} (3 × Gflops × images seen)")
    axes.set_ylabel("training loss")
    finish(axes, "Loss of the logged training batches; thick: running mean over 5 % of the training")
    return figure


def gflops_by_part(results: Sequence[Result]) -> Figure:
    """Gflops of one forward of one image, by kind of operation, one bar a run."""
    rows, names = finals(results), labels(results)
    figure, axes = new_axes()
    left = [0.0] * len(rows)
    titles = [names[row.run_id] for row in rows]
    for k, part in enumerate(part for part in rows[0].gflops_parts if any(row.gflops_parts[part] for row in rows)):
        widths = [row.gflops_parts[part] for row in rows]
        colour, hatch, label = STYLES[k % len(STYLES)][0], HATCHES[k % len(HATCHES)], part.replace("_", " ")
        axes.barh(titles, widths, left=left, color=colour, edgecolor="white", hatch=hatch, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        axes.annotate(number(row.gflops), (row.gflops, place), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("Gflops (1e9 multiply-adds, one image, one unguided forward)")
    finish(axes, "Cost of one forward by kind of operation", direct=False)
    return figure


def sample_grids(groups: Sequence[Level], names: Mapping[str, str], runs: Path) -> Figure:
    """Sample grids side by side, a column a run, a row a level of compute; a missing checkpoint stays empty.

    Raises: UserError if none of the grids is on disk.
    """
    found = {(k, run_id): grid_of(row, runs) for k, level in enumerate(groups) for run_id, row in level.rows.items()}
    pictures = {place: Image.open(path).convert("RGB") for place, path in found.items() if path.is_file()}
    if not pictures:
        raise UserError(f"No sample grid of these runs is on disk, neither {next(iter(found.values()))} nor another.")
    first = next(iter(pictures.values()))
    width = min(3.5, 14 / len(names))  # inches
    height = width * first.height / first.width + 0.35
    figure = new_figure(width * len(names), height * len(groups))
    places = figure.subplots(len(groups), len(names), squeeze=False)
    for k, level in enumerate(groups):
        for c, (run_id, name) in enumerate(names.items()):
            axes = places[k, c]
            axes.set_axis_off()
            if (k, run_id) in pictures:
                axes.imshow(pictures[k, run_id], interpolation="none")
            axes.set_title(f"{name}, {level.title}", fontsize=8)
    return figure


def grid_of(row: Result, runs: Path) -> Path:
    """The PNG of a result's first samples."""
    return (runs / row.samples).with_name("grid.png")


def gflops_against_resolution(series: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> Figure:
    """Gflops of one forward over the side of the image in pixels, both log; series: (label, points)."""
    figure, axes = new_axes()
    for k, (label, points) in enumerate(series):
        colour, marker, line = STYLES[k % len(STYLES)]
        sides, gflops = zip(*points, strict=True)
        axes.plot(sides, gflops, color=colour, marker=marker, linestyle=line, label=label)
    log(axes, "x", "y")
    axes.set_xticks(sorted({side for _, points in series for side, _ in points}))
    axes.set_xlabel("image side (pixels)")
    axes.set_ylabel("Gflops of one forward (1e9 multiply-adds)")
    finish(axes, "Cost of one forward of one image")
    return figure
