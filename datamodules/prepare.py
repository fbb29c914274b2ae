"""Images -> latent cache: the autoencoder's posterior moments, written once and read in every epoch.

A cache is a folder: `moments-00000.safetensors`, ... (mean, logvar (N,C,H,W); labels (N,)) and `manifest.json`, written
last. Shards already there are kept, so an interrupted preparation goes on where it stopped. The posterior is stored,
not a sample of it: each epoch sees fresh posterior noise, as with the autoencoder in the loop (DiT, U-ViT).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

MANIFEST = "manifest.json"
SHARD_ROWS = 8192  # images per shard: 134 MB at 4x32x32 in float16
READ_WHOLE = 256 * 2**20  # bytes; smaller caches are read into memory, larger ones memory-mapped


class ImageSource(Protocol):
    """Images by row; a uint8 tensor (N,3,H,W) is one, a folder read on demand another."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...  # -> uint8 (B,3,H,W)


@dataclass(frozen=True)
class CacheMeta:
    """What the numbers of a cache depend on; two caches with equal meta and images hold the same latents."""

    data: str  # name of the data set
    num_classes: int  # 0 = unlabelled
    resolution: int  # image side in pixels
    image_rule: str  # how an image of the source becomes a square of that side
    autoencoder: str
    autoencoder_sha256: str
    scale: tuple[float, ...]  # latents = (posterior sample - shift) * scale, one value per channel
    shift: tuple[float, ...]
    dtype: str = "float32"  # of the stored moments: float32 | float16
    mirrors: str = "none"  # horizontal mirrors stored beside the images

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"Latents are cached as float32 or float16, not {self.dtype!r}.")


def prepare_cache(
    images: ImageSource,
    labels: Tensor,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    path: Path,
    meta: CacheMeta,
    *,
    shard_rows: int = SHARD_ROWS,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode `images` (uint8, (N,3,H,W) by slices) with `labels` (N,) into the cache folder `path` -> manifest.

    `encode` maps uint8 (B,3,H,W) to posterior (mean, logvar), each (B,C,h,w) float. A finished cache of the same meta
    is left as it is. One process writes; progress shows on a terminal only.

    Raises: ValueError if `path` holds a cache made from something else, or images and labels differ in number.
    """
    if len(images) != len(labels):
        raise ValueError(f"{meta.data}: {len(images)} images but {len(labels)} labels; each image needs one label.")
    identity = {**json.loads(json.dumps(asdict(meta))), "count": len(labels), "shard_rows": shard_rows}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode() + labels.numpy().tobytes()).hexdigest()
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        if manifest["fingerprint"] != fingerprint:
            differing = [f"{k} {manifest.get(k)!r}, now {v!r}" for k, v in identity.items() if manifest.get(k) != v]
            raise ValueError(
                f"The latent cache {path} was made from other data: {'; '.join(differing) or 'the labels differ'}. "
                "Remove that folder, or give another paths.cache."
            )
        return manifest

    path.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(labels), shard_rows)
    files = [path / f"moments-{k:05d}.safetensors" for k in range(len(starts))]
    with tqdm(total=len(labels), desc=f"encode {meta.data}", unit="img", disable=None if progress else True) as bar:
        for start, file in zip(starts, files, strict=True):
            stop = min(start + shard_rows, len(labels))
            if not _made_by(file, fingerprint):
                moments = []
                for row in range(start, stop, batch_size):
                    end = min(row + batch_size, stop)
                    moments.append(encode(images[row:end]))
                    bar.update(end - row)
                mean, logvar = (torch.cat(part).cpu().numpy().astype(meta.dtype) for part in zip(*moments, strict=True))
                tensors = {"mean": mean, "logvar": logvar, "labels": labels[start:stop].numpy().astype(np.int64)}
                _replace(file, safetensors.numpy.save(tensors, {"fingerprint": fingerprint}))
            else:
                bar.update(stop - start)

    with safe_open(files[0], "numpy") as first:
        latent_shape = first.get_slice("mean").get_shape()[1:]
    manifest = {
        **identity,
        "latent_shape": latent_shape,
        "fingerprint": fingerprint,
        "shards": [{"file": f.name, "bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files],
        "versions": {name: version(name) for name in ("torch", "numpy", "safetensors")},
    }
    _replace(path / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


class LatentCache:
    """Posterior moments by row, out of a folder written by `prepare_cache`.

    Small caches are read whole (and checked against their hashes), large ones memory-mapped.

    Raises: ValueError if the folder holds no finished cache, or a shard is missing, cut short or altered.
    """

    def __init__(self, path: Path, read_whole: int = READ_WHOLE) -> None:
        self.path, self.read_whole = Path(path), read_whole
        manifest = self.manifest = read_manifest(self.path)
        self.count: int = manifest["count"]
        self.num_classes: int = manifest["num_classes"]
        self.latent_shape: tuple[int, ...] = tuple(manifest["latent_shape"])
        self.fingerprint: str = manifest["fingerprint"]
        self.scale, self.shift = (
            np.array(manifest[key], np.float32)[:, None, None] for key in ("scale", "shift")
        )  # (C,1,1) each

        whole = sum(shard["bytes"] for shard in manifest["shards"]) <= read_whole
        shards = []
        for shard in manifest["shards"]:
            file = self.path / shard["file"]
            intact = file.exists() and file.stat().st_size == shard["bytes"]
            if not intact or (whole and file_sha256(file) != shard["sha256"]):
                raise ValueError(f"{file} is missing or damaged. Remove {self.path} and prepare the data again.")
            shards.append(safetensors.numpy.load_file(file) if whole else map_safetensors(file))
        self.labels = torch.from_numpy(np.concatenate([shard["labels"] for shard in shards]))  # (N,) int64
        self._shards = [(shard["mean"], shard["logvar"]) for shard in shards]

    def __reduce__(self) -> tuple:
        """Another process opens the files itself; a pickled memory map would carry all its bytes."""
        return LatentCache, (self.path, self.read_whole)

    def moments(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Posterior (mean, logvar) of `rows` (B,) int64 -> each (B,C,H,W) float32."""
        mean, logvar = (np.empty((len(rows), *self.latent_shape), np.float32) for _ in range(2))
        shard_of, row_in = np.divmod(rows, self.manifest["shard_rows"])
        for shard in np.unique(shard_of):
            here = shard_of == shard
            mean[here], logvar[here] = (part[row_in[here]] for part in self._shards[shard])
        return mean, logvar


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises: ValueError if `path` holds no finished cache."""
    file = Path(path) / MANIFEST
    if not file.exists():
        raise ValueError(f"{path} holds no latent cache ({MANIFEST} is missing). Prepare the data first.")
    return json.loads(file.read_text())


def map_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as read-only memory maps: an 8-byte header length, a JSON header, the data."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    dtypes = {"F16": np.float16, "F32": np.float32, "I64": np.int64}
    return {
        name: np.memmap(file, dtypes[e["dtype"]], "r", 8 + length + e["data_offsets"][0], tuple(e["shape"]))
        for name, e in header.items()
        if name != "__metadata__"
    }


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _made_by(file: Path, fingerprint: str) -> bool:
    """Whether a shard is there and belongs to this preparation; shards are renamed into place, so it is complete."""
    if not file.exists():
        return False
    with safe_open(file, "numpy") as shard:
        return (shard.metadata() or {}).get("fingerprint") == fingerprint


def _replace(file: Path, content: bytes) -> None:
    """Write beside the target, then rename: a crash leaves the old file or none."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
