"""Pictures inside archives, read in place: uncompressed tars and Parquet shards.

n pictures of the set.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.raw import EncodedImages, Names, ReadFailed, describe, write_whole

OPEN_FILES = 64  # archives a process holds open at once

_lock = threading.Lock()  # of the thread that reads a row group


class TarImages(EncodedImages):
    """Pictures inside uncompressed tars, read in place.

    `table` has names (joined) and their ends, label, archive, offset and bytes of each picture, classes and warnings.
    """

    def __init__(self, kind: str, root: Path, archives: Sequence[Path], table: dict[str, np.ndarray]) -> None:
        self.archives, self._names = tuple(archives), Names.joined(table["names"].tobytes(), table["ends"])
        self._archive, self._offset, self._size = table["archive"], table["offset"], table["size"]
        self._open: dict[int, _Descriptor] = {}
        classes = table["classes"].tolist()
        description = describe(kind, len(self._names), classes, root)
        super().__init__(description, classes, table["label"], table["warnings"].tolist())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def read(self, index: int) -> bytes:
        archive, size = int(self._archive[index]), int(self._size[index])
        try:
            descriptor = self._open.get(archive)
            if descriptor is None:
                descriptor = _Descriptor(self.archives[archive])
                kept = list(self._open.items())[-(OPEN_FILES - 1) :]
                self._open = {**dict(kept), archive: descriptor}  # replaced whole: other threads keep what they hold
            content = os.pread(descriptor.number, size, int(self._offset[index]))
        except OSError as error:
            raise ReadFailed(
                f"{self.name(index)} cannot be read out of {self.archives[archive]}: {error.strerror}."
            ) from None
        if len(content) != size:
            raise ReadFailed(f"{self.archives[archive]} is cut short: {self.name(index)} is not whole.")
        return content

    def name(self, index: int) -> str:
        return self._names[index]

    def stored_sizes(self) -> np.ndarray:
        return self._size


class Ordered(NamedTuple):
    """Labelled pictures in the order of the set; `rows` are their places in the order of the shards."""

    names: list[str]
    labels: np.ndarray
    rows: np.ndarray
    classes: list[str]
    warnings: list[str]


class ParquetImages(EncodedImages):
    """Pictures in Parquet shards, column `image` {bytes, path}; the last row groups read are held in memory.

    `place` (n,3): shard, row group and row of each picture; `group_bytes` (n,): stored size of its row group.
    A shard's rows are often shuffled: in class order every picture then costs a row group. See `storage_order`.
    """

    def __init__(
        self, root: Path, shards: Sequence[Path], ordered: Ordered, place: np.ndarray, group_bytes: np.ndarray
    ) -> None:
        self.shards, self._names = tuple(shards), Names(ordered.names)
        self._place, self._group_bytes = place, group_bytes
        self._groups: dict[tuple[int, int], Any] = {}
        description = describe("Parquet shards", len(place), ordered.classes, root)
        super().__init__(description, ordered.classes, ordered.labels, ordered.warnings)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups": {}}

    def read(self, index: int) -> bytes:
        number, group, row = self._place[index].tolist()
        column = self._groups.get((number, group))
        if column is None:
            with _lock:  # one thread reads the group, the others wait for it
                column = self._groups.get((number, group))
                if column is None:
                    column = self._read_group(number, group)
                    last = list(self._groups.items())[-1:]
                    self._groups = {**dict(last), (number, group): column}  # replaced whole: others keep what they hold
        content = column[row]["bytes"].as_py()
        if content is None:
            raise ValueError(f"{self.name(index)} cannot be read: its row of {self.shards[number]} holds no bytes.")
        return content

    def _read_group(self, number: int, group: int) -> Any:
        """The pictures of a row group: a column of {bytes}. Raises: ReadFailed."""
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.shards[number]) as shard:
                return shard.read_row_group(group, ["image.bytes"], use_threads=False)["image"]
        except (OSError, pyarrow.ArrowException) as error:  # damaged pages are told as OSError, too
            raise ReadFailed(f"Row group {group} of {self.shards[number]} cannot be read: {error}") from None

    def name(self, index: int) -> str:
        return self._names[index]

    def stored_sizes(self) -> np.ndarray:
        """Bytes of the row group of each picture: single sizes would take reading them all."""
        return self._group_bytes

    @property
    def storage_order(self) -> np.ndarray:
        return np.lexsort(self._place.T[::-1])


class _Descriptor:
    """A file open for `os.pread`, which has no position to share with threads or forked processes."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


# --- the index of archives --------------------------------------------------------------------------------------------


def packed(
    names: Sequence[str], labels: np.ndarray, places: np.ndarray, classes: Sequence[str], warnings: Sequence[str]
) -> dict[str, np.ndarray]:
    """What `TarImages` needs; `places` (n,3): archive, offset, bytes."""
    packed = Names(names)
    archive, offset, size = places.reshape(-1, 3).T.astype(np.int64)
    block = np.frombuffer(packed.block, np.uint8)
    return {
        "names": block, "ends": packed.ends, "label": labels, "archive": archive.astype(np.int32), "offset": offset,
        "size": size, "classes": np.array(classes, np.str_), "warnings": np.array(warnings, np.str_),
    }  # fmt: skip


def cached_table(
    kind: str, archives: Sequence[Path], cache: Path | None, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The index of these very archives out of `cache`, or built now; a damaged one is built again."""
    if cache is None:
        return build()
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in archives]
    file = cache / f"tar-index-{hashlib.sha256(json.dumps([kind, stamps]).encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(file) as table:
            return dict(table)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none yet, or torn
        table = build()
        with suppress(OSError):  # it would save the next process a pass
            write_whole(file, lambda stream: np.savez(stream, **table))  # type: ignore[arg-type]
        return table


@contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar to be read in order. Raises: ValueError if it is damaged, also while it is read."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged or not a tar: {error}.") from None


def _free_lock() -> None:
    """In a forked child: another thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_free_lock)
