"""How every figure looks and is written: styles, axes, labels, and files whose bytes follow from what is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.errors import UserError
from bench.files import atomic_write
from bench.tables.formats import number

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
HATCHES = ("", "///", "...", "xx", "--")  # of bars
DPI = 150
SIZE = (7.0, 4.5)  # inches
DIRECT = 4  # curves that carry their names at their ends; more than that share a legend
WIDE = 4  # largest over smallest value above which an axis is logarithmic
FORMATS: dict[str, dict[str, Any]] = {  # suffix -> metadata that would change from one writing to the next, left out
    ".png": {"Software": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    ".svg": {"Creator": None, "Date": None},
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, outside of pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes() -> tuple[Figure, Axes]:
    figure = new_figure(*SIZE)
    return figure, figure.add_subplot()


def log(axes: Axes, *names: str) -> None:
    """Log axes (x, y) whose ticks are numbers, not powers of ten."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axis.set_minor_formatter(NullFormatter())


def log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    """A log y axis for values that are positive and span more than a factor of `WIDE`."""
    if min(values) > 0 and max(values) / min(values) > WIDE:
        log(axes, "y")


def finish(axes: Axes, title: str, *, direct: bool = True) -> None:
    """Title, light grid, and the names of the curves: at their ends where they are few and `direct`, else a legend."""
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    curves = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    if direct and len(curves) <= DIRECT:
        _name_ends(axes, curves)
    else:
        axes.legend(frameon=False)


def _name_ends(axes: Axes, curves: Sequence[Line2D]) -> None:
    """Each curve's name right of its last point, moved up where it would cover another's."""
    height, apart = 0.8 * SIZE[1] * 72, 12.0  # points: of the axes, about; between two names
    points = [np.asarray(line.get_xydata()) for line in curves]  # (n, 2) each
    ends = [(float(x), float(y)) for x, y in (way[-1] for way in points)]
    to_axes = axes.transScale + axes.transLimits
    heights = [height * to_axes.transform(end)[1] for end in ends]
    lowest = float("-inf")
    for k in sorted(range(len(curves)), key=heights.__getitem__):
        lowest = max(heights[k], lowest + apart)
        axes.annotate(
            str(curves[k].get_label()),
            ends[k],
            (8, lowest - heights[k]),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=curves[k].get_color(),
        )


def require_format(path: Path) -> None:
    """Raises: UserError if the suffix of `path` names no format that figures are written in."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"'{path}' names no format of figures. End it in one of {', '.join(FORMATS)}.")


def save(figure: Figure, path: Path) -> None:
    """Write PNG, PDF or SVG, by the suffix of `path`. Raises: UserError for another suffix."""
    require_format(path)
    with atomic_write(path, "wb") as file:
        _write(figure, file, path.suffix.lower())


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    file = io.BytesIO()
    _write(figure, file, ".png")
    return file.getvalue()


def _write(figure: Figure, file: IO[bytes], suffix: str) -> None:
    # Fonts of a PDF as TrueType, which journals ask for; ids of an SVG from a fixed salt.
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "isodiff"}):
        figure.savefig(file, format=suffix[1:], dpi=DPI, metadata=FORMATS[suffix])
