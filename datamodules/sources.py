"""The user's pictures, decoded and cropped as they are asked for.

With `on_error=skip`, which pictures are left out is settled by decoding all of them once, before anything is encoded,
and kept in a record by the set's fingerprint. Counts, labels, shards and references are then functions of the set
alone, for any number of processes; a list made while encoding would leave them open to the end. Every set pays for that
pass once, damaged or not. Later the pictures on record are decoded again, as they may have been replaced since.

n pictures of the set, S side of the cropped square.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.base import DataConfig, DataSet, LatentDataModule, subset_rows
from datamodules.crops import RULES, crop, decode
from datamodules.processes import Processes, show_life, wait_for
from datamodules.raw import EncodedImages, ReadFailed, Rows, user_cache, write_whole

THREADS = 16  # at most, for decoding; Pillow lets go of the interpreter while it decodes and resizes

REMEDY = "Replace it, or leave such pictures out with data.on_error=skip."

# (root, cache, *, progress) -> the pictures at `root`; indexes of archives are kept in the folder `cache`.
Reader = Callable[..., EncodedImages]


class CroppedImages:
    """Pictures by row as the squares that are trained on: slices -> uint8 (B,3,S,S).

    Raises, where a slice is taken: ValueError naming a picture that cannot be decoded.
    """

    def __init__(self, raw: EncodedImages, rule: str, size: int, remedy: str = REMEDY) -> None:
        """`remedy` says what to do about a picture that cannot be decoded."""
        self.raw, self.rule, self.size, self.remedy = raw, rule, size, remedy

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: slice) -> Tensor:
        squares = list(_threads(os.getpid()).map(self.square, range(*rows.indices(len(self)))))
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()

    def square(self, row: int) -> np.ndarray:
        """-> (S,S,3) uint8"""
        try:
            picture = decode(self.raw.read(row), self.raw.name(row))
        except ReadFailed:
            raise
        except ValueError as error:
            raise ValueError(f"{error} {self.remedy}") from None
        return crop(picture, self.rule, self.size)

    @property
    def fingerprint(self) -> str:
        return self.raw.fingerprint


class ReadablePictures(Rows):
    """A set without the pictures that cannot be decoded; `skipped` says why, one sentence each."""

    def __init__(self, raw: EncodedImages, skipped: dict[int, str]) -> None:
        super().__init__(raw, np.setdiff1d(np.arange(len(raw)), list(skipped)))
        self.skipped = tuple(skipped.values())


def picture_set(
    title: str,
    *,
    side: int,
    num_classes: int,
    crop: str,
    reader: Reader,
    module: type[LatentDataModule],
    wanted: str,
) -> DataSet:
    """A set out of pictures below `data.root`, which `reader` opens; `wanted` says what should lie there."""

    def raw(settings: DataConfig) -> EncodedImages:
        if settings.root is None:
            raise ValueError(f"{title} needs data.root: {wanted}.")
        return _opened(reader, str(Path(settings.root).expanduser()), settings.classes, settings.subset)

    def images(settings: DataConfig) -> tuple[CroppedImages, Tensor]:
        pictures, remedy = raw(settings), REMEDY
        if settings.on_error == "skip":
            record = _record(pictures)
            pictures = _readable(pictures, record)
            remedy = f"It could be when {record} was made: remove that file, and all are looked at again."
        cropped = _cropped(pictures, settings.crop or crop, settings.resolution or side, remedy)
        return cropped, torch.from_numpy(cropped.raw.labels)

    return DataSet(
        title=title,
        image_size=side,
        num_classes=num_classes,
        image_rule=RULES[crop],
        module=module,
        images=images,
        raw=raw,
        crop=crop,
        mirrors=True,
        dtype="float16",
    )


@lru_cache(maxsize=4)  # listing a million files takes a while; a process does it once
def _opened(reader: Reader, root: str, classes: tuple[str, ...] | None, subset: int | None) -> EncodedImages:
    pictures = reader(Path(root), index_folder(), progress=Processes.here().rank == 0)
    if classes is not None:
        pictures = Rows(pictures, classes=classes)
    if subset is not None:
        pictures = Rows(pictures, subset_rows(len(pictures), subset).numpy())
    fastest = pictures.storage_order
    return pictures if (fastest == np.arange(len(pictures))).all() else Rows(pictures, fastest)


@lru_cache(maxsize=4)
def _readable(pictures: EncodedImages, record: Path) -> EncodedImages:
    """The pictures that can be decoded: the set itself, where all can.

    The first process looks, unless the record is there and still holds.

    Raises: ReadFailed if the disk does not give a picture; ValueError if the record cannot be written.
    """
    processes, skipped = Processes.here(), _skipped(record)
    if skipped is None or any(_fault(pictures, row) is None for row in skipped):
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            if processes.rank == 0:
                found = json.dumps(dict(_look_at_all(pictures, record.parent)), indent=1).encode()
                write_whole(record, lambda stream: stream.write(found))
        except OSError as error:
            raise ValueError(
                f"The list of unreadable pictures {record} cannot be written: {error.strerror}. Make room there, or "
                "give another paths.cache."
            ) from None
        if processes.rank:
            outdated = (None, skipped)
            wait_for(
                lambda: _skipped(record) in outdated, record.parent, "wait", "list of damaged picture", progress=False
            )
        skipped = _skipped(record) or {}
    return ReadablePictures(pictures, skipped) if skipped else pictures


def _look_at_all(pictures: EncodedImages, alive: Path) -> Iterator[tuple[int, str]]:
    """(row, one sentence) of the pictures to leave out."""
    for row, error in unreadable(pictures, alive=alive):
        if isinstance(error, ReadFailed):
            raise ReadFailed(
                f"{error} data.on_error=skip leaves out what cannot be decoded, not what the disk does not give: try "
                "again, or replace or remove it."
            )
        yield row, str(error)


def _record(pictures: EncodedImages) -> Path:
    """The list of the pictures of a set that are left out."""
    return (_records or index_folder()) / f"unreadable-{pictures.fingerprint[:16]}.json"


def _skipped(record: Path) -> dict[int, str] | None:
    """Row -> sentence, as the record says; None if it is not there, or no such list."""
    try:
        return {int(row): str(error) for row, error in json.loads(record.read_text()).items()}
    except (FileNotFoundError, NotADirectoryError, AttributeError, ValueError):
        return None


def keep_records(folder: Path) -> None:
    """Lists of unreadable pictures are kept in `folder` from now on, which all processes must share."""
    global _records
    _records = folder


_records: Path | None = None  # None: in this user's own index folder


@lru_cache(maxsize=8)
def _cropped(pictures: EncodedImages, rule: str, size: int, remedy: str) -> CroppedImages:
    return CroppedImages(pictures, rule, size, remedy)


def _fault(pictures: EncodedImages, row: int) -> ValueError | None:
    """Why a picture cannot be had."""
    try:
        decode(pictures.read(row), pictures.name(row))
    except ValueError as error:
        return error
    return None


def unreadable(
    pictures: EncodedImages, *, alive: Path | None = None, progress: bool = True
) -> Iterator[tuple[int, ValueError]]:
    """(row, error) of every picture that cannot be read (ReadFailed) or decoded, by decoding all.

    `alive` is the folder that other processes watch meanwhile.
    """
    rows: Iterable[int] = range(len(pictures))
    with tqdm(rows, "decode", unit="img", delay=5, leave=False, disable=None if progress else True) as bar:
        for start in range(0, len(pictures), 1024):  # a window, as map() queues everything it is given
            if alive:
                show_life(alive)
            window = range(start, min(start + 1024, len(pictures)))
            for row, error in zip(window, _threads(os.getpid()).map(partial(_fault, pictures), window), strict=True):
                bar.update()
                if error is not None:
                    yield row, error


def index_folder() -> Path:
    """Indexes of archives, by their state: $XDG_CACHE_HOME/isodiff/raw, by default ~/.cache/isodiff/raw."""
    return user_cache() / "raw"


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """One pool in each process: threads do not pass through fork."""
    return ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))), "decode")


def skipped_of(images: Any) -> tuple[str, ...]:
    """Sentences on the pictures of an image source that were left out as they cannot be decoded."""
    return getattr(getattr(images, "raw", None), "skipped", ())
