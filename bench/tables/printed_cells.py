"""The printed cells of a paper's table: which value of which source, and the marks of its footnotes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.errors import UserError
from bench.tables.formats import SUPERSCRIPTS
from bench.tables.own_rows import SCORES
from bench.tables.published import VALUES, Contradiction, Published, contradictions, load_published, plain_name
from bench.tables.specs import Place, TableSpec

LETTERS = [sign for sign, plain in SUPERSCRIPTS.items() if plain.isalpha()]  # of sources
DIGITS = str.maketrans({plain: sign for sign, plain in SUPERSCRIPTS.items() if plain.isdigit()})  # of contradictions
UNCONFIRMED = "?"


class Value(NamedTuple):
    """A printed value and where it is printed."""

    text: str
    source: str
    derived: bool
    low: bool


@dataclass
class Marks:
    """Footnotes in the order in which the table first needs them."""

    sources: dict[str, str] = field(default_factory=dict)  # sentence -> letter
    contradictions: dict[str, str] = field(default_factory=dict)  # sentence -> digits

    def source(self, sentence: str) -> str:
        return self.sources.setdefault(sentence, LETTERS[len(self.sources)])

    def contradiction(self, sentence: str) -> str:
        return self.contradictions.setdefault(sentence, str(len(self.contradictions) + 1).translate(DIGITS))

    def notes(self) -> list[str]:
        found = [f"{mark} {sentence}." for sentence, mark in self.sources.items()]
        return [*([" ".join(found)] if found else []), *(f"{m} {s}" for s, m in self.contradictions.items())]


def printed_rows(spec: TableSpec, place: Place, low_confidence: bool) -> list[Published]:
    """The rows of published.csv about a place, in the order of the table's sources.

    Raises: UserError if a source has several of them, which the table's file must tell apart.
    """
    names = {plain_name(place.model), *([plain_name(place.also)] if place.also else [])}
    found = []
    for source in spec.sources:
        rows = [
            row
            for row in load_published()
            if row.where == source
            and (row.data, row.resolution, row.guidance) == (place.data, place.resolution, place.guidance)
            and row.name in names
            and (not place.scale or not row.scale or float(row.scale) == float(place.scale))
            and (place.variant is None or row.variant in ("", place.variant))
        ]
        for low in (False, True):
            alike = [row for row in rows if (row.confidence == "low") == low]
            if len(alike) > 1:
                raise UserError(
                    f"{spec.name}.yaml: {source} has {len(alike)} rows of {place.model} at {place.resolution}. Tell "
                    f"them apart by variant: {', '.join(row.variant or 'none' for row in alike)}."
                )
            found += alike if low_confidence or not low else []
    return found


def printed_values(rows: Sequence[Published]) -> dict[str, Value]:
    """Column -> the first value that is printed."""
    values = {}
    for key in VALUES:
        printing = [row for row in rows if row.values[key]]
        if printing:
            alike = [row for row in printing if float(row.values[key]) == float(printing[0].values[key])]
            row = next((row for row in alike if row.confidence != "low"), printing[0])  # confirmed elsewhere
            values[key] = Value(row.values[key], row.source_of(key), key in row.derived, row.confidence == "low")
    return values


def main_source(spec: TableSpec, shown: Mapping[str, Value]) -> str | None:
    """Where a row is said to be printed: in the table itself if it has a score of it, else where its FID is."""
    scores = {key: value.source for key, value in shown.items() if key in SCORES}
    if spec.sources[0] in scores.values():
        return spec.sources[0]
    return scores.get("fid") or next(iter(scores.values()), None)


def printed_text(
    spec: TableSpec, place: Place, key: str, value: Value | None, main: str | None, marks: Marks, low: bool
) -> str:
    """A cell with its marks; `main` is the source that the row's name stands for, `low`: unconfirmed ones show."""
    if value is None:
        return "–"
    text = value.text + (UNCONFIRMED if value.low else "")
    if value.derived:
        text += marks.source(f"{value.source}, steps × batch size")
    elif value.source != main:
        text += marks.source(value.source)
    for entry in contradictions():
        if _applies(entry, spec, place, key, low):
            text += marks.contradiction(entry.note)
    return text


def _applies(entry: Contradiction, spec: TableSpec, place: Place, key: str, low: bool) -> bool:
    names = {plain_name(place.model), plain_name(place.also)}
    return (
        any(entry.touches(name, place.resolution, key, place.data) for name in names)
        and entry.guidance in (None, place.guidance)
        and (entry.variant is None or place.variant in (None, entry.variant))
        and (entry.tables is None or spec.name in entry.tables)
        and (low or not entry.low_confidence)
    )
