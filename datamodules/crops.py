"""From stored bytes to the square uint8 image that is trained on and scored against.

A crop rule is a few Pillow resizes and a centre crop. Each resize runs horizontally first, then vertically, rounding to
bytes in between, as it did in the Pillow that ADM, DiT, U-ViT and LDM used; since Pillow 13 `resize` turns the order
round for some tall images, so both passes are spelled out here and the bits do not depend on Pillow's version.

Shapes: H W image size, S side of the square.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.Image import Resampling, Transpose
from scipy.sparse import csr_array

RULES = {  # name -> what it does, as manifests say it
    "adm_imagenet": "halved by BOX while the short side is at least twice the target, short side resized to the target "
    "by BICUBIC, centre cropped (ADM, DiT, U-ViT)",
    "adm_lsun": "short side resized to the target by BOX, centre cropped (ADM on LSUN)",
    "ldm": "centre cropped to a square, resized to the target by BICUBIC (LDM on LSUN)",
}

WEIGHT_BITS = 22  # Pillow weighs bytes by integers in units of 2^-22
BICUBIC_SUPPORT = 2.0  # half-width of the filter, in pixels of the coarser grid

# --- decode ----------------------------------------------------------------------------------------------------------


def decode(data: bytes, name: str) -> Image.Image:
    """The image in `data`, a whole file, as RGB of its stored size; `name` is what an error calls it.

    As ADM and DiT read their images: the content decides the format, grey, CMYK and palettes are converted, alpha is
    dropped, EXIF orientation is ignored.

    Raises: ValueError if the file is truncated, corrupt, or of no format that Pillow reads.
    """
    try:
        with _whole_files_only():
            image = Image.open(io.BytesIO(data))
            image.load()
        return _rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"{name} cannot be decoded: its {len(data)} bytes are no image that Pillow knows.") from None
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        raise ValueError(f"{name} cannot be decoded: {str(error).rstrip('.') or type(error).__name__}.") from error


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


_reading = threading.Lock()
_readers, _tolerant = 0, False  # threads inside `_whole_files_only`; Pillow's switch before the first came


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """Pillow's process-wide switch for half-read files is off while any thread is in here."""
    global _readers, _tolerant
    with _reading:
        if not _readers:
            _tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _readers += 1
    try:
        yield
    finally:
        with _reading:
            _readers -= 1
            if not _readers:
                ImageFile.LOAD_TRUNCATED_IMAGES = _tolerant


# --- rules -----------------------------------------------------------------------------------------------------------


def crop(image: Image.Image, rule: str, size: int) -> np.ndarray:
    """The square of side `size` that a rule of RULES makes of `image` -> (S,S,3) uint8.

    Any mode becomes RGB first; smaller images are enlarged, as in the originals.

    Raises: ValueError if there is no such rule or `size` is not positive.
    """
    if rule not in _SQUARES:
        raise ValueError(f"There is no crop rule '{rule}'. Choose one of {', '.join(RULES)}.")
    if size < 1:
        raise ValueError(f"The side of a cropped image is {size}; it must be at least 1 pixel.")
    return _SQUARES[rule](_rgb(image), size)


def _adm_imagenet(image: Image.Image, size: int) -> np.ndarray:
    """`center_crop_arr` of ADM's image_datasets.py; DiT and U-ViT have the same."""
    while min(image.size) >= 2 * size:
        image = _halve(image)
    return _bicubic_centre(image, *_short_side(image, size), size)


def _adm_lsun(image: Image.Image, size: int) -> np.ndarray:
    """`read_images` of ADM's lsun_bedroom.py."""
    width, height = _short_side(image, size)
    columns, rows = _centre(width, size), _centre(height, size)
    across = image.resize((width, image.height), Resampling.BOX).crop((columns.first, 0, columns.stop, image.height))
    return np.array(across.resize((size, height), Resampling.BOX).crop((0, rows.first, size, rows.stop)))


def _ldm(image: Image.Image, size: int) -> np.ndarray:
    """`LSUNBase` of LDM's lsun.py, at its default interpolation."""
    side = min(image.size)
    columns, rows = _centre(image.width, side), _centre(image.height, side)
    square = image.crop((columns.first, rows.first, columns.stop, rows.stop))
    return np.array(square.resize((size, side), Resampling.BICUBIC).resize((size, size), Resampling.BICUBIC))


_SQUARES: dict[str, Callable[[Image.Image, int], np.ndarray]] = {  # by the names of RULES
    "adm_imagenet": _adm_imagenet,
    "adm_lsun": _adm_lsun,
    "ldm": _ldm,
}


class Span(NamedTuple):
    """Pixels first, ..., stop - 1 of an axis."""

    first: int
    stop: int


def _centre(length: int, part: int) -> Span:
    first = (length - part) // 2
    return Span(first, first + part)


def _short_side(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height at which the short side is `size`; halves round to even."""
    scale = size / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _halve(image: Image.Image) -> Image.Image:
    """BOX resize to half the width and half the height, each rounded down.

    For an even length that is the mean of pairs, rounded half up; `reduce` takes the same several times faster.
    """
    width, height = image.width // 2, image.height // 2
    across = image.resize((width, image.height), Resampling.BOX) if image.width % 2 else image.reduce((2, 1))
    return across.resize((width, height), Resampling.BOX) if image.height % 2 else across.reduce((1, 2))


# --- the centre of a BICUBIC resize, in Pillow's own integers, without the rest --------------------------------------


class Weights(NamedTuple):
    """One pass of a resize along one axis, for a span of its result."""

    source: Span  # what that span depends on
    matrix: csr_array | None  # (pixels of the span, pixels of the source) int32; None = nothing changes


def _bicubic_centre(image: Image.Image, width: int, height: int, size: int) -> np.ndarray:
    """The square in the centre of `image` resized to width and height -> (S,S,3) uint8."""
    across, down = (
        _weights(image.width, width, _centre(width, size)),
        _weights(image.height, height, _centre(height, size)),
    )
    image = image.crop((across.source.first, down.source.first, across.source.stop, down.source.stop))
    if across.matrix is not None:
        turned = _weigh(across.matrix, np.asarray(image.transpose(Transpose.TRANSPOSE)))  # (S,H,3)
        image = Image.fromarray(turned).transpose(Transpose.TRANSPOSE)
    pixels = np.array(image)  # (H,S,3)
    return pixels if down.matrix is None else _weigh(down.matrix, pixels)


@lru_cache(maxsize=1024)  # about 15 kB each at 256 pixels; photographs share few sizes
def _weights(before: int, after: int, result: Span) -> Weights:
    """The weights by which Pillow resizes `before` pixels to `after`, for the pixels `result` of the outcome.

    Pillow computes them in double precision and keeps them to itself. But it also resizes 32-bit integers, and a row of
    zeros with a single 2^22 comes out as the weights of that one pixel, rounded just as they are for bytes. A row here
    asks for every `period`-th pixel at once: no pixel of the result reaches two of those.
    """
    if before == after:
        return Weights(result, None)
    scale = before / after
    reach = math.ceil(BICUBIC_SUPPORT * max(scale, 1)) + 1  # in source pixels, one to spare
    period = 2 * reach + 1
    comb = np.zeros((period, before), np.int32)
    comb[np.arange(before) % period, np.arange(before)] = 1 << WEIGHT_BITS
    resized = Image.fromarray(comb).resize((after, period), Resampling.BICUBIC)
    weights = np.asarray(resized)[
        :, result.first : result.stop
    ].T  # (n,period): of the source pixel with that remainder

    lowest = np.floor((np.arange(*result) + 0.5) * scale).astype(np.int32) - reach  # (n,) nothing below is reached
    pixel, remainder = weights.nonzero()
    source = lowest[pixel] + (remainder - lowest[pixel]) % period
    span = Span(int(source.min()), int(source.max()) + 1)
    starts = np.searchsorted(pixel, np.arange(len(weights) + 1))
    matrix = csr_array(
        (weights[pixel, remainder], source - span.first, starts), shape=(len(weights), span.stop - span.first)
    )
    return Weights(span, matrix)


def _weigh(matrix: csr_array, pixels: np.ndarray) -> np.ndarray:
    """Weighted sums of rows: (n_in,W,3) uint8 -> (n_out,W,3) uint8, rounded half up and clipped."""
    sums = matrix @ pixels.reshape(len(pixels), -1).astype(np.int32)  # as Pillow's, below 2^31
    sums += 1 << (WEIGHT_BITS - 1)
    sums >>= WEIGHT_BITS
    return np.clip(sums, 0, 255, out=sums).astype(np.uint8).reshape(-1, *pixels.shape[1:])
