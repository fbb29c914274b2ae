"""Many files in one range of addresses: rows that lie in many shards are gathered by one indexing, as out of one file.

Indexed shard by shard, a batch of 64 latents costs a third more. Python's own `mmap` cannot choose the address of a
map, so the range is reserved by it, and the files are put there by the C library's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

MAP_FIXED = 0x10  # on Linux; Python's `mmap` does not name it
MAP_FAILED = ctypes.c_void_p(-1).value

_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t
)  # fmt: skip


class MappedRows:
    """Rows of one size out of many files: row r lies in file r // `file_rows`, which is mapped when it is asked for.

    Several threads may take rows at once. A file that is cut short after it was mapped ends the process (SIGBUS) where
    a row beyond its end is read; `python -m bench data check` finds such a file.

    `begin(k)` checks that file k holds its rows one behind the other, and says at which byte the first one begins.
    """

    def __init__(
        self,
        files: Sequence[Path],
        sizes: Sequence[int],
        *,
        count: int,
        file_rows: int,
        row_bytes: int,
        begin: Callable[[int], int],
    ) -> None:
        """Sizes are of the files, in bytes; `count` is of all rows."""
        self.files, self.sizes = tuple(files), tuple(sizes)
        self.count, self.file_rows, self.row_bytes, self.begin = count, file_rows, row_bytes, begin
        ends = np.cumsum([-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes], dtype=np.int64)
        self.starts: list[int] = [0, *ends[:-1].tolist()]  # of the files in the range, each on the border of a page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # without a right to read or write, so it takes addresses only
        self.range = mmap.mmap(-1, int(ends[-1]), flags, prot=0)
        self.bytes = np.frombuffer(self.range, np.uint8)
        # Every run of `row_bytes` bytes, by where it begins; indexing copies those asked for.
        windows = (len(self.bytes) - row_bytes + 1,)
        self.windows = np.ndarray(windows, f"V{row_bytes}", self.bytes, strides=(1,))
        self.offsets = np.zeros(len(files), np.int64)  # by file: row x row_bytes + this = where the row begins
        self.unmapped = set(range(len(files)))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows (B,) int64 -> (B,) void of `row_bytes`.

        Raises: IndexError for a row there is none of: bytes that no file lies behind would end the process.
        """
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.count):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.count}")
        files = rows // self.file_rows
        if self.unmapped:
            for file in self.unmapped.intersection(files.tolist()):
                self._map(file)
        return self.windows[rows * self.row_bytes + self.offsets[files]]

    def _map(self, index: int) -> None:
        """Put a file in its place, read-only.

        Rows come at random, so the system is told not to read ahead of them, as it would for a file read from its
        beginning to its end: on a cold disk that is work for pages that nobody has asked for.

        Raises: OSError if the file cannot be opened or mapped.
        """
        begin, start, size = self.begin(index), self.starts[index], self.sizes[index]
        with self.files[index].open("rb") as file:
            place = _mmap(
                self.bytes.ctypes.data + start, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, file.fileno(), 0
            )
        if place == MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.files[index]))
        self.range.madvise(mmap.MADV_RANDOM, start, size)
        self.offsets[index] = start + begin - index * self.file_rows * self.row_bytes
        self.unmapped.discard(index)  # another thread may have mapped it, too, to the same end
