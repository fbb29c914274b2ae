"""Many files in one range of addresses: rows that lie in many shards are gathered by one indexing, as out of one file.

Indexed shard by shard, a batch of 64 latents costs a third more. Python's own `mmap` cannot choose the address of a
map, so the range is reserved by it, and the files are put there by the C library's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAP_FIXED = 0x10  # on Linux and macOS; Python's `mmap` does not name it
MAP_FAILED = ctypes.c_void_p(-1).value


class MappedFiles:
    """Files one behind the other, each from the border of a page on; a file is mapped when `map` asks for it.

    The bytes of a file that is not mapped cannot be read: the system ends a process that tries.
    """

    def __init__(self, files: Sequence[Path], sizes: Sequence[int]) -> None:
        self.files, self.sizes = tuple(files), tuple(sizes)  # paths; bytes
        ends = np.cumsum([-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes], dtype=np.int64)
        self.starts: list[int] = [0, *ends[:-1].tolist()]  # of each file, in bytes from the beginning of the range
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # without a right to read or write, so it takes addresses only
        self.range = mmap.mmap(-1, int(ends[-1]), flags, prot=0)
        self.bytes = np.frombuffer(self.range, np.uint8)  # (all,) keeps the range alive

    def map(self, index: int) -> None:
        """Put a file in its place, read-only; rows come at random, so the system is told not to read around them.

        That is 100 times faster on a cold disk.

        Raises: OSError if the file cannot be opened or mapped.
        """
        start, size = self.starts[index], self.sizes[index]
        address = self.bytes.ctypes.data + start
        with self.files[index].open("rb") as file:
            place = _mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, file.fileno(), 0)
        if place == MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self.files[index]))
        self.range.madvise(mmap.MADV_RANDOM, start, size)

    def rows(self, size: int) -> np.ndarray:
        """All runs of `size` bytes, by where they begin; indexing copies those asked for -> (all - size + 1,) void."""
        return np.ndarray((len(self.bytes) - size + 1,), f"V{size}", self.bytes, strides=(1,))


_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t
)  # fmt: skip
