"""The user's pictures, decoded and cropped as they are asked for.

With `on_error=skip`, which pictures are left out is settled by decoding all of them once, before anything is encoded,
and remembered by the set's fingerprint. Counts, labels, shards and references are then functions of the set alone, for
any number of processes; a record made while encoding would leave them open to the end. Only sets with damaged pictures
pay for that pass.

n pictures of the set, S side of the cropped square.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.base import DataConfig, DataSet, LatentDataModule, subset_rows
from datamodules.crops import RULES, crop, decode
from datamodules.processes import Processes, show_life, wait_for
from datamodules.raw import EncodedImages, Rows, user_cache, write_whole

THREADS = 16  # at most, for decoding; Pillow lets go of the interpreter while it decodes and resizes

# (root, cache, *, progress) -> the pictures at `root`; indexes of archives are kept in the folder `cache`.
Reader = Callable[..., EncodedImages]


class CroppedImages:
    """Pictures by row as the squares that are trained on: slices -> uint8 (B,3,S,S).

    Raises, where a slice is taken: ValueError naming a picture that cannot be decoded.
    """

    def __init__(self, raw: EncodedImages, rule: str, size: int) -> None:
        self.raw, self.rule, self.size = raw, rule, size

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: slice) -> Tensor:
        squares = list(_threads(os.getpid()).map(self.square, range(*rows.indices(len(self)))))
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()

    def square(self, row: int) -> np.ndarray:
        """-> (S,S,3) uint8"""
        try:
            picture = decode(self.raw.read(row), self.raw.name(row))
        except ValueError as error:
            raise ValueError(f"{error} Replace it, or leave such pictures out with data.on_error=skip.") from None
        return crop(picture, self.rule, self.size)

    @cached_property
    def fingerprint(self) -> str:
        return self.raw.fingerprint()


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
        pictures = raw(settings)
        if settings.on_error == "skip":
            pictures = _readable(pictures)
        cropped = _cropped(pictures, settings.crop or crop, settings.resolution or side)
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
def _readable(pictures: EncodedImages) -> ReadablePictures:
    """The pictures that can be decoded. The first process looks, unless the set was looked at before."""
    record = index_folder() / f"unreadable-{pictures.fingerprint()[:16]}.json"
    processes = Processes.here()
    if not record.exists():
        record.parent.mkdir(parents=True, exist_ok=True)
        if processes.rank == 0:
            found = json.dumps(
                {str(row): error for row, error in unreadable(pictures, alive=record.parent)}, indent=1
            ).encode()
            write_whole(record, lambda stream: stream.write(found))
        else:
            wait_for(lambda: not record.exists(), record.parent, "wait", "list of damaged picture", progress=False)
    skipped = {int(row): error for row, error in json.loads(record.read_text()).items()}
    return ReadablePictures(pictures, skipped)


@lru_cache(maxsize=8)
def _cropped(pictures: EncodedImages, rule: str, size: int) -> CroppedImages:
    return CroppedImages(pictures, rule, size)


def unreadable(pictures: EncodedImages, *, alive: Path | None = None, progress: bool = True) -> list[tuple[int, str]]:
    """(row, one sentence) of every picture that cannot be decoded, by decoding all.

    `alive` is the folder that other processes watch meanwhile.
    """

    def fault(row: int) -> str | None:
        try:
            decode(pictures.read(row), pictures.name(row))
        except ValueError as error:
            return str(error)
        return None

    found = []
    rows: Iterable[int] = range(len(pictures))
    with tqdm(rows, "decode", unit="img", delay=5, leave=False, disable=None if progress else True) as bar:
        for start in range(0, len(pictures), 1024):  # a window, as map() queues everything it is given
            if alive:
                show_life(alive)
            window = range(start, min(start + 1024, len(pictures)))
            for row, error in zip(window, _threads(os.getpid()).map(fault, window), strict=True):
                bar.update()
                if error is not None:
                    found.append((row, error))
    return found


def index_folder() -> Path:
    """What is learnt of raw sets, by their state: $XDG_CACHE_HOME/isodiff/raw, by default ~/.cache/isodiff/raw."""
    return user_cache() / "raw"


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """One pool in each process: threads do not pass through fork."""
    return ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))), "decode")


def skipped_of(images: Any) -> tuple[str, ...]:
    """Sentences on the pictures of an image source that were left out as they cannot be decoded."""
    return getattr(getattr(images, "raw", None), "skipped", ())
