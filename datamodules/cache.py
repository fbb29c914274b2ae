"""The latent cache as it lies on disk, and reading it at memory speed.

A cache is a folder: shards `moments-00000.safetensors`, ..., `labels.npy` (N,) and `manifest.json`, written last. A
shard holds `moments` (n,V,2,C,H,W): the autoencoder's posterior mean and log variance of each image and, with V = 2, of
its horizontal mirror. What a sample needs lies together and is one read. In pixel space it holds `images` (n,3,H,W)
uint8, whose mirrors need no storing. The posterior is stored, not a sample of it: each epoch sees fresh posterior
noise, as with the autoencoder in the loop (DiT, U-ViT).

Shapes: B batch, C latent channels, H W latent size, N images of the set, n images of a shard, V views of an image.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from datamodules.mapping import MappedRows

MANIFEST, LABELS = "manifest.json", "labels.npy"
CARD = "isodiff"  # the entry of a shard's header
FORMAT = 2  # of shards; 1 kept mean and log variance in tensors of their own
READ_WHOLE = 256 * 2**20  # bytes; smaller caches are read into memory, larger ones memory-mapped
PIXELS = "uint8"  # dtype of a cache in pixel space
DTYPES = {"float16": "F16", "float32": "F32", "uint8": "U8"}  # -> safetensors' names


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
    def tensor(self) -> str:
        """Name of what a shard holds beside the labels."""
        return _layout(self.dtype, self.mirrors, self.latent_shape)[0]

    @property
    def row_bytes(self) -> int:
        """Of one image in a shard, with its label."""
        _, shape = _layout(self.dtype, self.mirrors, self.latent_shape)
        return math.prod(shape) * np.dtype(self.dtype).itemsize + 8


def _layout(dtype: str, mirrors: bool, latent_shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Name of a shard's tensor, and its shape for one image: images (3,H,W), or moments (V,2,C,H,W)."""
    return ("images", tuple(latent_shape)) if dtype == PIXELS else ("moments", (1 + mirrors, 2, *latent_shape))


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
        for file in lost_shards(self.path, manifest):
            raise damaged(file)
        labels = self.path / LABELS
        if not (labels.exists() and file_sha256(labels) == manifest["labels_sha256"]):
            raise damaged(labels)
        self.labels = torch.from_numpy(np.load(labels))  # (N,) int64
        name, shape = _layout(manifest["dtype"], self.mirrors, self.latent_shape)
        self._views, self._shape = (1, shape) if self.pixels else (shape[0], shape[1:])  # of a view
        view_bytes = math.prod(self._shape) * np.dtype(manifest["dtype"]).itemsize
        self._stored: np.ndarray | MappedRows  # views as void of `view_bytes`: those of row 0, of row 1, ...
        if sum(shard["bytes"] for shard in manifest["shards"]) <= read_whole:
            parts = [read_shard(self.path, manifest, k)[name] for k in range(len(files))]
            self._stored = np.concatenate(parts).reshape(-1).view(f"V{view_bytes}")
        else:
            self._stored = MappedRows(
                files,
                [shard["bytes"] for shard in manifest["shards"]],
                count=self.count * self._views,
                file_rows=manifest["shard_rows"] * self._views,
                row_bytes=view_bytes,
                begin=partial(begin_of_shard, self.path, manifest),
            )

    def __reduce__(self) -> tuple:
        """Another process opens the files itself; a pickled memory map would carry all its bytes."""
        return LatentCache, (self.path, self.read_whole)

    def moments(self, rows: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """Posterior mean and log variance of `rows` (B,) int64; of the mirror where `mirrored` (B,) bool.

        -> (B,2,C,H,W) in the type they are cached in: making float32 of float16 takes longer than reading it.
        """
        views = rows * self._views if self._views > 1 else rows
        return self._gather(views if mirrored is None else views + mirrored)

    def images(self, rows: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """Images of a cache in pixel space (B,) -> (B,3,H,W) float32 in [-1, 1]; turned round where `mirrored`."""
        pixels = self._gather(rows).astype(np.float32) / np.float32(127.5) - 1
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        return pixels

    def _gather(self, views: np.ndarray) -> np.ndarray:
        """Views by number -> (B, *shape) as cached."""
        return self._stored.take(views).view(self.manifest["dtype"]).reshape(-1, *self._shape)


class OtherFormat(ValueError):
    """A cache of another version of this program."""


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises: ValueError if `path` holds no finished cache; OtherFormat for one in another format."""
    file = Path(path) / MANIFEST
    if not file.exists():
        raise ValueError(f"{path} holds no latent cache ({MANIFEST} is missing). Prepare the data first.")
    try:
        manifest = json.loads(file.read_text())
    except ValueError:
        raise damaged(file) from None
    if not isinstance(manifest, dict):
        raise damaged(file)
    if (written := manifest.get("format", 1)) != FORMAT:
        raise OtherFormat(
            f"The latent cache {path} is in format {written}; this version reads format {FORMAT}. Remove that folder "
            "and prepare the data again."
        )
    return manifest


def lost_shards(path: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Shards that are missing or have another size than the manifest says; `prepare_cache` makes them again."""
    for shard in manifest["shards"]:
        file = path / shard["file"]
        if not (file.exists() and file.stat().st_size == shard["bytes"]):
            yield file


def damaged(file: Path) -> ValueError:
    return ValueError(f"{file} is missing or damaged. Remove {file.parent} and prepare the data again.")


# --- shards: safetensors files that carry their own hash and statistics ---------------------------------------------


def pack(tensors: Mapping[str, np.ndarray], fingerprint: str) -> bytes:
    """A shard's file; its header says which preparation it belongs to, the hash of its data and their statistics."""
    tensors = dict(tensors)
    data = safetensors.numpy.save(tensors)
    sha256 = hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    card = {"format": FORMAT, "fingerprint": fingerprint, "sha256": sha256, "statistics": statistics(tensors)}
    return safetensors.numpy.save(tensors, {CARD: json.dumps(card)})  # several entries would come in random order


def card_of(file: Path) -> dict[str, Any]:
    """What `pack` wrote into the header: format, fingerprint, sha256, statistics; {} if nothing.

    Raises: ValueError if the file is damaged.
    """
    header, _ = _header(file)
    return json.loads(header.get("__metadata__", {}).get(CARD, "{}"))


def read_shard(path: Path, manifest: Mapping[str, Any], shard: int) -> dict[str, np.ndarray]:
    """The tensors of a shard. Raises: ValueError if it is not as the manifest says, or its data have another hash."""
    begin_of_shard(path, manifest, shard)
    file = path / manifest["shards"][shard]["file"]
    _, start = _header(file)
    with file.open("rb") as stream:
        stream.seek(start)
        if hashlib.file_digest(stream, "sha256").hexdigest() != manifest["shards"][shard]["sha256"]:
            raise damaged(file)
    return safetensors.numpy.load_file(file)


def begin_of_shard(path: Path, manifest: Mapping[str, Any], shard: int) -> int:
    """Where in its file a shard's moments, or images, begin. Raises: ValueError if it is not as the manifest says."""
    name, shape = _layout(manifest["dtype"], manifest["mirrors"], manifest["latent_shape"])
    file, size = path / manifest["shards"][shard]["file"], manifest["shards"][shard]["bytes"]
    wanted = [min(manifest["shard_rows"], manifest["count"] - shard * manifest["shard_rows"]), *shape]
    header, start = _header(file)
    try:
        first, stop = header[name]["data_offsets"]
        right = (header[name]["dtype"], header[name]["shape"]) == (DTYPES[manifest["dtype"]], wanted)
    except (KeyError, TypeError, ValueError):
        raise damaged(file) from None
    length = math.prod(wanted) * np.dtype(manifest["dtype"]).itemsize
    if not (right and stop - first == length and size == file.stat().st_size):
        raise damaged(file)
    return start + first


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Of a safetensors file: an 8-byte header length, a JSON header, the data -> the header, where the data begin.

    Raises: ValueError if there is no such file, none of that format, or one that does not end where its data do.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        whole = 8 + length + end == size
    except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError):
        raise damaged(file) from None
    if not whole:
        raise damaged(file)
    return header, 8 + length


def statistics(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sums over posterior samples z, or pixels in [-1, 1], per channel: of z, of z squared, and how many there are.

    In closed form over the posterior noise: E z = mean, E z^2 = mean^2 + variance.
    """
    if "images" in tensors:
        return _pixel_statistics(tensors["images"])
    moments = tensors["moments"].reshape(-1, *tensors["moments"].shape[2:]).astype(np.float64)  # (n V,2,C,H,W)
    mean, variance = moments[:, 0], np.exp(moments[:, 1])
    return {
        "sum": mean.sum((0, 2, 3)).tolist(),
        "square": (mean**2 + variance).sum((0, 2, 3)).tolist(),
        "count": mean[:, 0].size,
    }


def _pixel_statistics(images: np.ndarray) -> dict[str, Any]:
    """Of images (n,3,H,W), by how often each byte b occurs: z = (2 b - 255) / 255, so the sums are whole numbers."""
    counts = np.zeros((images.shape[1], 256), np.int64)
    for image in images:
        for channel, plane in enumerate(image):
            counts[channel] += np.bincount(plane.reshape(-1), minlength=256)
    odd = 2 * np.arange(256) - 255
    return {
        "sum": (counts @ odd / 255).tolist(),
        "square": (counts @ odd**2 / 255**2).tolist(),
        "count": int(counts[0].sum()),
    }


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
