"""Values as papers print them: configs/published.csv, with how sure each is, and where papers contradict each other.

confidence  high: as printed by the paper, or by two independent sources; medium: by one other source; low: confirmed by
            none, shown only where it is asked for, and then marked
derived     columns of the row that are not printed: images = steps x batch size
guidance    none | classifier | cfg | rejection; `scale` is a classifier's scale, or cfg_scale as IsoDiff and DiT count
            it (1 is unguided; U-ViT prints cfg_scale - 1)
gflops      1e9 multiply-adds of one unguided forward, as printed; train_gflops_papers: the printed total over training,
            images x gflops without a factor for the backward pass
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import yaml

from bench.registry import CONFIGS

VALUES = (  # columns of published.csv that are numbers
    "params_m", "gflops", "images_m", "train_gflops_papers", "fid", "sfid", "inception_score", "precision", "recall",
)  # fmt: skip
TOTAL_TOLERANCE = 0.005  # of a printed total against images x gflops; three printed digits may be off by as much


@dataclass(frozen=True)
class Published:
    """One row of configs/published.csv. Values are texts, digit for digit; an empty one is not printed."""

    paper: str
    table: str
    data: str
    resolution: int  # image side in pixels; 0 where a row is about no data
    model: str
    variant: str
    guidance: str
    scale: str
    values: Mapping[str, str]  # by `VALUES`
    sampler: str
    derived: tuple[str, ...]
    confidence: str
    source: str
    note: str

    @property
    def where(self) -> str:
        """The table it stands in, such as 'DiT Table 2'."""
        return f"{self.paper} {self.table}".strip()

    def source_of(self, column: str) -> str:
        """Where a value is printed: `source` reads 'DiT Table 2; gflops, params_m: DiT Table 6'."""
        main, *others = self.source.split("; ")
        for other in others:
            columns, _, source = other.partition(": ")
            if source and column in columns.split(", "):
                return source
        return main

    @property
    def name(self) -> str:
        """The model without the -G by which papers mark guidance."""
        return plain_name(self.model)


class PrintedGflops(NamedTuple):
    """What papers print for one forward of a model."""

    gflops: float
    source: str
    confidence: str
    note: str


def plain_name(model: str) -> str:
    """'DiT-XL/2-G' -> 'DiT-XL/2'; guidance has a column of its own."""
    return model.removesuffix("-G")


@cache
def load_published() -> tuple[Published, ...]:
    """All rows, in the order of the file."""
    rows = []
    with (CONFIGS / "published.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            rows.append(
                Published(
                    resolution=int(row["resolution"] or 0),
                    values={key: row[key] for key in VALUES},
                    derived=tuple(row["derived"].split()),
                    **{
                        key: row[key]
                        for key in (
                            *("paper", "table", "data", "model", "variant", "guidance", "scale", "sampler"),
                            *("confidence", "source", "note"),
                        )
                    },
                )
            )
    return tuple(rows)


def total_deviation(row: Published) -> float | None:
    """The printed total over images x gflops, less 1; None where one of the three is not printed."""
    images, gflops, total = (row.values[key] for key in ("images_m", "gflops", "train_gflops_papers"))
    if not (images and gflops and total):
        return None
    return float(total) / (1e6 * float(images) * float(gflops)) - 1


def deviating_totals(rows: Sequence[Published]) -> list[Published]:
    """Rows whose printed total is further than `TOTAL_TOLERANCE` from images x gflops."""
    return [row for row in rows if abs(total_deviation(row) or 0.0) > TOTAL_TOLERANCE]


def printed_gflops(name: str, resolution: int) -> PrintedGflops | None:
    """Gflops of a model such as 'DiT-XL/2' on latents of ImageNet.

    Of several prints, the one with the most digits, and of those its own paper's before others'.

    Rows of low confidence do not count. None if nothing is printed.
    """
    found = [
        row
        for row in load_published()
        if (row.data, row.resolution, row.name) == ("ImageNet", resolution, name)
        and row.values["gflops"]
        and row.confidence != "low"
    ]
    if not found:
        return None
    best = max(found, key=lambda row: (len(row.values["gflops"]), name.startswith(row.paper)))
    notes = [entry.note for entry in contradictions() if entry.touches(name, resolution, "gflops")]
    return PrintedGflops(float(best.values["gflops"]), best.source_of("gflops"), best.confidence, " ".join(notes))


class Contradiction(NamedTuple):
    """Something printed that another print, or arithmetic, does not bear out."""

    model: str  # without -G
    resolution: int
    columns: tuple[str, ...]
    note: str
    data: str = "ImageNet"
    guidance: str | None = None  # None: with and without
    variant: str | None = None  # such as '3000K steps'; None: any
    tables: tuple[str, ...] | None = None  # files of configs/table/ whose business it is; None: of all
    low_confidence: bool = False  # it is about a value of low confidence, and said only beside that

    def touches(self, model: str, resolution: int, column: str, data: str = "ImageNet") -> bool:
        """Whether it is about this cell, whatever the guidance."""
        return (self.model, self.resolution, self.data) == (model, resolution, data) and column in self.columns


@cache
def contradictions() -> tuple[Contradiction, ...]:
    """configs/contradictions.yaml, in its order."""
    entries = yaml.safe_load((CONFIGS / "contradictions.yaml").read_text())["contradictions"]
    return tuple(
        Contradiction(**entry | {key: tuple(entry[key]) for key in ("columns", "tables") if key in entry})
        for entry in entries
    )
