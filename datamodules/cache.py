"""The latent cache as it lies on disk, and reading it at memory speed.

A cache is a folder: shards `moments-00000.safetensors`, ..., `labels.npy` (N,) and `manifest.json`, written last. A
shard holds the autoencoder's posterior `mean` and `logvar` (n,C,H,W) of its images and `mirror_mean`, `mirror_logvar`
of their horizontal mirrors; in pixel space it holds `images` (n,3,H,W) uint8, whose mirrors need no storing. The
posterior is stored, not a sample of it: each epoch sees fresh posterior noise, as with the autoencoder in the loop
(DiT, U-ViT).

Shapes: B batch, C latent channels, H W latent size, N images of the set, n images of a shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

MANIFEST, LABELS = "manifest.json", "labels.npy"
CARD = "isodiff"  # the entry of a shard's header
READ_WHOLE = 256 * 2**20  # bytes; smaller caches are read into memory, larger ones memory-mapped
PIXELS = "uint8"  # dtype of a cache in pixel space
DTYPES = {"F16": np.float16, "F32": np.float32, "I64": np.int64, "U8": np.uint8}  # by safetensors' names


@dataclass(frozen=True)
class CacheMeta:
    """What the numbers of a cache depend on; two caches with equal meta and images hold the same latents."""

    data: str  # name of the data set
    num_classes: int  # 0 = unlabelled
    resolution: int  # image side in pixels
    image_rule: str  # how an image of the source becomes a square of that side
    autoencoder: str
    encoder_sha256: str  # of its encoder: decoders may differ
    latent_shape: tuple[int, ...]  # (C, H, W)
    scale: tuple[float, ...]  # latents = (posterior sample - shift) * scale, one value per channel
    shift: tuple[float, ...]
    dtype: str = "float32"  # of the stored moments: float32 | float16, or uint8: the images themselves
    mirrors: bool = False  # the horizontal mirrors are in the cache, too
    source_sha256: str = ""  # of the raw set: names, sizes and labels
    classes: tuple[str, ...] = ()  # names in label order, where they have some

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16", PIXELS):
            raise ValueError(f"Latents are cached as float32 or float16, not {self.dtype!r}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors of a shard that hold a value of `latent_shape` per image."""
        if self.dtype == PIXELS:
            return ("images",)
        return ("mean", "logvar", "mirror_mean", "mirror_logvar") if self.mirrors else ("mean", "logvar")

    @property
    def row_bytes(self) -> int:
        """Of one image in a shard, with its label."""
        return len(self.names) * int(np.prod(self.latent_shape)) * np.dtype(self.dtype).itemsize + 8


class LatentCache:
    """Posterior moments, or images, by row, out of a folder written by `prepare_cache`.

    Small caches are read whole (and checked against their hashes); of large ones only the sizes are checked, and shards
    are memory-mapped when they are first asked for. `python -m bench data check` verifies those.

    Raises: ValueError if the folder holds no finished cache, or a file is missing, cut short or altered.
    """

    def __init__(self, path: Path, read_whole: int = READ_WHOLE) -> None:
        self.path, self.read_whole = Path(path), read_whole
        manifest = self.manifest = read_manifest(self.path)
        self.count: int = manifest["count"]
        self.num_classes: int = manifest["num_classes"]
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.latent_shape: tuple[int, ...] = tuple(manifest["latent_shape"])
        self.fingerprint: str = manifest["fingerprint"]
        self.pixels: bool = manifest["dtype"] == PIXELS
        self.mirrors: bool = manifest["mirrors"]
        self.scale, self.shift = (
            np.array(manifest[key], np.float32)[:, None, None] for key in ("scale", "shift")
        )  # (C,1,1) each

        files = [self.path / shard["file"] for shard in manifest["shards"]]
        for file, shard in zip(files, manifest["shards"], strict=True):
            if not (file.exists() and file.stat().st_size == shard["bytes"]):
                raise damaged(file)
        labels = self.path / LABELS
        if not (labels.exists() and file_sha256(labels) == manifest["labels_sha256"]):
            raise damaged(labels)
        self.labels = torch.from_numpy(np.load(labels))  # (N,) int64
        self._shards: list[dict[str, memoryview] | None] = [None] * len(files)
        self._whole: dict[str, np.ndarray] | None = None
        if sum(shard["bytes"] for shard in manifest["shards"]) <= read_whole:
            parts = [verified(file, shard["sha256"]) for file, shard in zip(files, manifest["shards"], strict=True)]
            self._whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def __reduce__(self) -> tuple:
        """Another process opens the files itself; a pickled memory map would carry all its bytes."""
        return LatentCache, (self.path, self.read_whole)

    def moments(self, rows: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Posterior (mean, logvar) of `rows` (B,) int64; of the mirror where `mirrored`.

        -> each (B,C,H,W), in the type they are cached in: making float32 of float16 takes longer than reading it.
        """
        if mirrored is None:
            return self._gather("mean", rows), self._gather("logvar", rows)
        mean, logvar = (np.empty((len(rows), *self.latent_shape), self.manifest["dtype"]) for _ in range(2))
        for prefix, here in (("", ~mirrored), ("mirror_", mirrored)):
            if here.any():
                mean[here], logvar[here] = (self._gather(prefix + name, rows[here]) for name in ("mean", "logvar"))
        return mean, logvar

    def images(self, rows: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """Images of a cache in pixel space (B,) -> (B,3,H,W) float32 in [-1, 1]; turned round where `mirrored`."""
        pixels = self._gather("images", rows).astype(np.float32) / np.float32(127.5) - 1
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        return pixels

    def _gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """-> (B,C,H,W) as cached."""
        if self._whole is not None:
            return self._whole[name].take(rows, axis=0)
        dtype, opened = np.dtype(self.manifest["dtype"]), self._shards
        size = dtype.itemsize * math.prod(self.latent_shape)
        shards, within = np.divmod(rows, self.manifest["shard_rows"])
        parts = [
            (opened[shard] or self._open(shard))[name][start : start + size]
            for shard, start in zip(shards.tolist(), (within * size).tolist(), strict=True)
        ]
        return np.frombuffer(bytearray().join(parts), dtype).reshape(-1, *self.latent_shape)

    def _open(self, shard: int) -> dict[str, memoryview]:
        tensors = map_safetensors(self.path / self.manifest["shards"][shard]["file"])
        self._shards[shard] = views = {name: as_bytes(tensor) for name, tensor in tensors.items()}
        return views


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in memory; rows are copied out of them in half the time that indexing an array takes."""
    return array.reshape(-1).view(np.uint8).data


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises: ValueError if `path` holds no finished cache."""
    file = Path(path) / MANIFEST
    if not file.exists():
        raise ValueError(f"{path} holds no latent cache ({MANIFEST} is missing). Prepare the data first.")
    return json.loads(file.read_text())


def damaged(file: Path) -> ValueError:
    return ValueError(f"{file} is missing or damaged. Remove {file.parent} and prepare the data again.")


# --- shards: safetensors files that carry their own hash and statistics ---------------------------------------------


def pack(tensors: Mapping[str, np.ndarray], fingerprint: str) -> bytes:
    """A shard's file; its header says which preparation it belongs to, the hash of its data and their statistics."""
    tensors = dict(tensors)
    data = safetensors.numpy.save(tensors)
    sha256 = hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    card = {"fingerprint": fingerprint, "sha256": sha256, "statistics": statistics(tensors)}
    return safetensors.numpy.save(tensors, {CARD: json.dumps(card)})  # several entries would come in random order


def card_of(file: Path) -> dict[str, Any]:
    """What `pack` wrote into the header: fingerprint, sha256, statistics. Raises: ValueError if the file is damaged."""
    header, _ = _header(file)
    return json.loads(header.get("__metadata__", {}).get(CARD, "{}"))


def verified(file: Path, sha256: str) -> dict[str, np.ndarray]:
    """The tensors of a shard, read whole. Raises: ValueError if its data have another hash."""
    _, start = _header(file)
    with file.open("rb") as stream:
        stream.seek(start)
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            raise damaged(file)
    return safetensors.numpy.load_file(file)


def map_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only memory maps: an 8-byte header length, a JSON header, the data.

    Training reads rows at random, so the system is told not to read around them: 100 times faster on a cold disk.
    """
    header, start = _header(file)
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    block = np.frombuffer(mapped, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, stop = (start + offset for offset in entry["data_offsets"])
            tensors[name] = block[first:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header and where the data begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            return json.loads(stream.read(min(length, file.stat().st_size))), 8 + length
        except ValueError:
            raise damaged(file) from None


def statistics(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sums over posterior samples z, or pixels in [-1, 1], per channel: of z, of z squared, and how many there are.

    In closed form over the posterior noise: E z = mean, E z^2 = mean^2 + variance.
    """
    total: Any = 0.0
    square: Any = 0.0
    count = 0
    for name in ("mean", "mirror_mean", "images"):
        if name in tensors:
            mean = tensors[name].astype(np.float64)
            if name == "images":
                mean, variance = mean / 127.5 - 1, np.zeros(1)
            else:
                variance = np.exp(tensors[name.replace("mean", "logvar")].astype(np.float64))
            total = total + mean.sum((0, 2, 3))
            square = square + (mean**2 + variance).sum((0, 2, 3))
            count += mean[:, 0].size
    return {"sum": np.asarray(total).tolist(), "square": np.asarray(square).tolist(), "count": count}


def latent_statistics(shards: Sequence[dict[str, Any]], scale: Sequence[float], shift: Sequence[float]) -> dict:
    """Mean and standard deviation per channel of the scaled latents, out of the sums of all shards."""
    total, square = (np.sum([shard[key] for shard in shards], axis=0) for key in ("sum", "square"))  # (C,) each
    count = sum(shard["count"] for shard in shards)
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    return {"mean": ((mean - np.array(shift)) * np.array(scale)).tolist(), "std": (std * np.array(scale)).tolist()}


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
