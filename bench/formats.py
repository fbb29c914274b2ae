"""Numbers as text, and a table as Markdown, CSV, LaTeX or terminal text; its HTML is in report_template.html."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Cell(NamedTuple):
    text: str
    bold: bool = False


@dataclass(frozen=True)
class TableData:
    """What is printed (header, rows, notes) and the same numbers in full precision for CSV (records)."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]
    records: tuple[dict[str, Any], ...]  # keys are the CSV columns


def number(value: float) -> str:
    """Four significant digits at least; whole numbers below ten million in full."""
    if value >= 1e7:
        return f"{value:.3e}".replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def score_text(value: float | None, ci95: float | None, decimals: int) -> str:
    """'12.34 ± 0.56', or a dash where there is no score."""
    return "–" if value is None else f"{value:.{decimals}f} ± {ci95:.{decimals}f}"


def render(table: TableData, fmt: str) -> str:
    """The table as text; `fmt` is one of `FORMATS`."""
    return FORMATS[fmt](table)


def terminal(table: TableData) -> str:
    """Aligned plain text, models as rows or as columns, whichever is narrower; * stands for bold."""
    rows = [table.header, *([f"{text} *" if bold else text for text, bold in row] for row in table.rows)]
    text = min(_aligned(rows), _aligned(list(zip(*rows, strict=True))), key=lambda lines: len(lines[0]))
    notes = [textwrap.fill(note.replace("Bold:", "*:"), 100, break_on_hyphens=False) for note in table.notes]
    return "\n".join([*text, "", *notes])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return lines


def _markdown(table: TableData) -> str:
    lines = [table.header, ("---", *["---:"] * (len(table.header) - 1))]
    lines += [tuple(f"**{text}**" if bold else text for text, bold in row) for row in table.rows]
    rows = [f"| {' | '.join(text.replace('|', '&#124;') for text in line)} |\n" for line in lines]
    return "".join([*rows, *(f"\n{note}\n" for note in table.notes)])


def _csv(table: TableData) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table.records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.records)
    return out.getvalue()


_LATEX_SIGNS = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "–": "--",
}


def _latex(table: TableData) -> str:
    def escaped(text: str) -> str:
        return text.translate({ord(sign): markup for sign, markup in _LATEX_SIGNS.items()})

    def line(cells: Iterable[str]) -> str:
        return " & ".join(cells) + r" \\"

    body = [line(rf"\textbf{{{escaped(text)}}}" if bold else escaped(text) for text, bold in row) for row in table.rows]
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        line(map(escaped, table.header)),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{escaped(' '.join(table.notes))}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[TableData], str]] = {
    "terminal": terminal,
    "md": _markdown,
    "csv": _csv,
    "latex": _latex,
}
