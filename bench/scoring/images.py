"""Finished images, wherever they came from: an npz as ADM's evaluator reads it, or a folder of PNG files.

Nothing is resized and nothing is held in memory: blocks are read when they are asked for.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bench.errors import UserError

ARRAY = "arr_0"  # the key ADM's evaluator reads
QUANTISE = "Quantise them first, for example floor(clamp(127.5 x + 128, 0, 255)) for images in [-1, 1]"
READ = 2**24  # bytes read at once
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # zipfile's; the last: encrypted, unknown method


class ImageSet(Protocol):
    """`n` uint8 images of one size, in a fixed order."""

    path: Path
    n: int
    size: tuple[int, int]  # height, width

    def read(self, block: range) -> Tensor:
        """The images `block` (step 1) -> (B, 3, H, W) uint8."""

    def sha256(self) -> str:
        """Of the stored bytes, in their order."""


def open_images(path: Path) -> ImageSet:
    """The images at `path`: an npz with arr_0 (N, H, W, 3) uint8, or a folder of PNG files in the order of their names.

    Raises: UserError naming what is there instead.
    """
    if path.is_dir():
        return PngFolder(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    there = "is no npz and no folder" if path.exists() else "does not exist"
    raise UserError(f"{path} {there}. Images are an npz with arr_0 (N, H, W, 3) uint8, or a folder of PNG files.")


def not_an_npz(path: Path, error: Exception) -> UserError:
    """Why `path` cannot be read as an npz, and what to do."""
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read (permission denied). Allow it, or give a copy of your own.")
    if "pickle" in str(error) and zipfile.is_zipfile(path):
        return UserError(f"{path} holds pickled objects, which are never loaded. Save it as plain arrays.")
    return UserError(
        f"{path} cannot be read as an npz: it is cut off, or another kind of file. Copy or make it again, as np.savez "
        "does."
    )


class NpzImages:
    """arr_0 of an npz. Stored plainly (np.savez) it is memory-mapped; compressed, it is unpacked as it is read."""

    def __init__(self, path: Path) -> None:
        """Raises: UserError for a file that is cut off, pickled, or holds anything but uint8 images (N, H, W, 3)."""
        self.path = path
        self._stream: Any = None
        self._next = 0  # the image `_stream` stands at
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if f"{ARRAY}.npy" not in names:
                    held = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
                    raise UserError(f"{path} holds no {ARRAY}, the key of the images; it holds {held}.")
                member = archive.getinfo(f"{ARRAY}.npy")
                with archive.open(member) as file:
                    shape, fortran, dtype = _read_header(file)
                    header = file.tell()
        except (*UNREADABLE, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise not_an_npz(path, error) from None
        if dtype.hasobject:
            raise UserError(f"{path}: {ARRAY} holds pickled objects, which are never loaded. Save it as uint8 images.")
        if dtype != np.uint8:
            raise UserError(f"{path}: {ARRAY} is {dtype}; scores are taken of uint8 images in 0..255. {QUANTISE}.")
        if len(shape) != 4 or shape[3] != 3 or fortran:
            raise UserError(f"{path}: {ARRAY} should be images (N, H, W, 3), it is {shape}.")
        self.n, self.size = shape[0], (shape[1], shape[2])
        self._bytes = int(np.prod(shape[1:]))  # of an image
        self._header = header
        if member.file_size != header + self.n * self._bytes:
            raise UserError(f"{path} is cut off: its header says {self.n} images, the data are not that long.")
        self._pixels = self._mapped(member) if member.compress_type == zipfile.ZIP_STORED else None

    def read(self, block: range) -> Tensor:
        shape = (len(block), *self.size, 3)
        if self._pixels is not None:
            pixels = np.array(self._pixels[block.start : block.stop])
        else:
            pixels = np.frombuffer(self._unpack(block.start, len(block)), np.uint8).reshape(shape).copy()
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with _damage_told(self.path), zipfile.ZipFile(self.path) as archive, archive.open(f"{ARRAY}.npy") as file:
            while data := file.read(READ):
                digest.update(data)
        return digest.hexdigest()

    def _mapped(self, member: zipfile.ZipInfo) -> np.ndarray:
        """The pixels where they lie in the file: behind the member's local header, which has its own name and extra."""
        with self.path.open("rb") as file:
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
        start = member.header_offset + 30 + name + extra + self._header
        return np.memmap(self.path, np.uint8, "r", offset=start, shape=(self.n, *self.size, 3))

    def _unpack(self, start: int, count: int) -> bytes:
        with _damage_told(self.path):
            if self._stream is None or start < self._next:
                self._stream = zipfile.ZipFile(self.path).open(f"{ARRAY}.npy")  # noqa: SIM115 (kept open)
                self._stream.read(self._header)
                self._next = 0
            to_skip = (start - self._next) * self._bytes
            while to_skip:
                to_skip -= len(self._stream.read(min(READ, to_skip)))
            self._next = start + count
            return self._stream.read(count * self._bytes)


class PngFolder:
    """The PNG files of a folder (`.png` or `.PNG`), `2.png` before `10.png`."""

    def __init__(self, path: Path) -> None:
        """Raises: UserError if there are none, or files of a kind that has lost pixels."""
        self.path = path
        files = [(file.suffix.lower(), file) for file in path.iterdir()]
        self.files = sorted((file for kind, file in files if kind == ".png"), key=_natural)
        lossy = min((file for kind, file in files if kind in (".jpg", ".jpeg", ".webp")), default=None)
        if lossy is not None:
            raise UserError(
                f"{lossy} is compressed with loss, which moves FID by points. Save the images as PNG or npz."
            )
        if not self.files:
            raise UserError(f"{path} holds no PNG files. Images are an npz with arr_0, or a folder of PNG files.")
        self.n, self.size = len(self.files), self._open(self.files[0]).shape[:2]

    def read(self, block: range) -> Tensor:
        images = [self._open(file) for file in self.files[block.start : block.stop]]
        for file, image in zip(self.files[block.start : block.stop], images, strict=True):
            if image.shape[:2] != self.size:
                (h, w), (height, width) = image.shape[:2], self.size
                raise UserError(f"{file} is {w}x{h}, {self.files[0].name} is {width}x{height}. Sizes must be alike.")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _open(self, file: Path) -> np.ndarray:
        """(H, W, 3) uint8; grey and palette images become RGB, as their pixels are the same."""
        try:
            with Image.open(file) as image:
                if image.mode not in ("RGB", "L", "P", "1"):
                    raise UserError(f"{file} has mode {image.mode}; images must be 8-bit RGB or grey, without alpha.")
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(f"{file} cannot be read as an image: {error}.") from None


def write_npz(file: IO[bytes], n: int, blocks: Iterable[np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
    """Write blocks of `n` images in all, (B, H, W, 3) uint8 each, as arr_0 of an npz, then the other `arrays`.

    One block is in memory at a time; the bytes are those of np.savez, which ADM's evaluator reads.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        blocks = iter(blocks)
        first = next(blocks)
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, *first.shape[1:])}
        with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for block in chain([first], blocks):
                member.write(np.ascontiguousarray(block).data)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _natural(path: Path) -> tuple[list[Any], str]:
    """Numbers in a name count as numbers, a suffix in capitals as one in small letters; then the name itself."""
    parts = re.split(r"(\d+)", path.stem + path.suffix.lower())
    return [int(part) if part.isdecimal() else part for part in parts], path.name


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """What zipfile raises where the bytes of `path` have changed, as a UserError."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged: {error}. Copy or make it again.") from None
