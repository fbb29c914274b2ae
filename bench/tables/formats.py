"""Numbers as text, and a table as terminal text, Markdown, CSV, LaTeX or a page of HTML."""

from __future__ import annotations

import csv
import html
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
    title: str = ""


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
    title = [table.title, ""] if table.title else []
    return "\n".join([*title, *text, "", *notes])


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
    title = [f"**{table.title}**\n\n"] if table.title else []
    return "".join([*title, *rows, *(f"\n{note}\n" for note in table.notes)])


def _csv(table: TableData) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table.records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.records)
    return out.getvalue()


# Marks of footnotes; Unicode has no superscript q.
SUPERSCRIPTS = dict(zip("ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ⁰¹²³⁴⁵⁶⁷⁸⁹", "abcdefghijklmnoprstuvwxyz0123456789", strict=True))

_LATEX_SIGNS = (
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {
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
        "†": r"\dag{}",
    }
    | {sign: rf"\textsuperscript{{{plain}}}" for sign, plain in SUPERSCRIPTS.items()}
)


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
        rf"\caption{{{escaped(' '.join([*([f'{table.title}.'] if table.title else []), *table.notes]))}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


_STYLE = (
    "body{font:14px/1.4 sans-serif;margin:2em}table{border-collapse:collapse}"
    "th,td{padding:.2em .6em;text-align:right;white-space:pre;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}caption{text-align:left;font-weight:bold;padding:.4em .6em}"
)


def _html(table: TableData) -> str:
    """A page that needs nothing beside itself."""

    def line(tag: str, cells: Iterable[Cell]) -> str:
        marked = (f"<b>{html.escape(text)}</b>" if bold else html.escape(text) for text, bold in cells)
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in marked)}</tr>"

    title = html.escape(table.title or "Table")
    lines = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{_STYLE}</style></head><body>",
        "<table>",
        *([f"<caption>{title}</caption>"] if table.title else []),
        f"<thead>{line('th', map(Cell, table.header))}</thead>",
        "<tbody>",
        *(line("td", row) for row in table.rows),
        "</tbody></table>",
        *(f"<p>{html.escape(note)}</p>" for note in table.notes),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[TableData], str]] = {
    "terminal": terminal,
    "md": _markdown,
    "csv": _csv,
    "latex": _latex,
    "html": _html,
}
