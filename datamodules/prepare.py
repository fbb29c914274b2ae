"""Images -> latent cache: the autoencoder's posterior moments, written once and read in every epoch.

Shard k belongs to process k modulo their number. A shard depends on its images alone: shards and encoded batches have
the same borders whatever the number of processes and wherever an earlier attempt was cut off, so the files come out bit
for bit the same. The first process writes the manifest when all shards are there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.cache import (
    FORMAT,
    LABELS,
    MANIFEST,
    PIXELS,
    CacheMeta,
    card_of,
    file_sha256,
    latent_statistics,
    pack,
    read_manifest,
)  # fmt: skip
from datamodules.processes import Processes, show_life, wait_for

SHARD_ROWS, SHARD_BYTES = (32, 1024), 64 * 2**20  # least and most images of a shard; its bytes at most
SHARDS = 16  # at least so many, where the set is not too small: something to share out, little to lose
BATCH, BATCH_PIXELS = 256, 2**22  # images encoded at once at most, and pixels: 64 images at 256

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 (B,3,H,W) -> posterior (mean, logvar), (B,C,h,w) each


class ImageSource(Protocol):
    """Images by row; a uint8 tensor (N,3,H,W) is one, a folder read on demand another."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...  # -> uint8 (B,3,H,W)


def prepare_cache(
    images: ImageSource,
    labels: Tensor,
    encode: Encode,
    path: Path,
    meta: CacheMeta,
    *,
    about: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    shard_rows: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode `images` (uint8, (N,3,H,W) by slices) with `labels` (N,) into the cache folder `path` -> manifest.

    `encode` is not called in pixel space. `about` goes into the manifest as it is. A finished cache of the same meta is
    left as it is; of an unfinished one, or one that lost some, the shards that are there are kept. Every process
    returns when all and the manifest are there; progress shows on a terminal only.

    Raises: ValueError if `path` holds a cache made from something else, images and labels differ in number, the disk is
    or will be full, another process writes the same shard, or one has died.
    """
    if len(images) != len(labels):
        raise ValueError(f"{meta.data}: {len(images)} images but {len(labels)} labels; each image needs one label.")
    processes = processes or Processes()
    shard_rows = shard_rows or rows_of_a_shard(len(labels), meta.row_bytes)
    batch_size = batch_size or max(1, min(BATCH, BATCH_PIXELS // meta.resolution**2))
    identity = {**json.loads(json.dumps(asdict(meta))), "count": len(labels), "shard_rows": shard_rows}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode() + labels.numpy().tobytes()).hexdigest()
    finished = _same_cache(path, identity, fingerprint) if (path / MANIFEST).exists() else None

    path.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(labels), shard_rows)
    shards = {
        path / f"moments-{k:05d}.safetensors": range(start, min(start + shard_rows, len(labels)))
        for k, start in enumerate(starts)
    }
    missing = {file: rows for file, rows in shards.items() if not _made_by(file, fingerprint)}
    if finished and not missing:
        return finished
    _require_space(path, sum(map(len, missing.values())) * meta.row_bytes)
    mine = list(shards)[processes.rank :: processes.world_size]
    _encode_shards(
        images, labels, encode, {file: missing[file] for file in mine if file in missing}, meta, fingerprint,
        batch_size=batch_size, processes=processes, progress=progress,
    )  # fmt: skip
    others = {file for file in missing if file not in mine}
    wait_for(
        lambda: sum(not _made_by(file, fingerprint) for file in others), path, "wait for the other processes", "shard",
        progress=progress,
    )  # fmt: skip
    if processes.rank:
        wait_for(lambda: not (path / MANIFEST).exists(), path, "wait", "manifest", progress=False)
        return _same_cache(path, identity, fingerprint)
    return _finish(path, list(shards), labels, meta, {**identity, "fingerprint": fingerprint, **(about or {})})


def rows_of_a_shard(count: int, row_bytes: int) -> int:
    """A power of two, by the size of the set and of an image in the cache."""
    least, most = SHARD_ROWS
    wanted = min(max(count // SHARDS, least), most, max(SHARD_BYTES // row_bytes, least))
    return 1 << (wanted.bit_length() - 1)


def _same_cache(path: Path, identity: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    """The manifest of the finished cache at `path`. Raises: ValueError if it is of something else."""
    manifest = read_manifest(path)
    if manifest["fingerprint"] == fingerprint:
        return manifest
    differing = [_difference(key, manifest.get(key), now) for key, now in identity.items() if manifest.get(key) != now]
    raise ValueError(
        f"The latent cache {path} was made from other data: {'; '.join(differing) or 'the labels differ'}. "
        "Remove that folder, or give another paths.cache."
    )


def _difference(key: str, then: Any, now: Any) -> str:
    if key == "classes" and isinstance(then, list):
        differing = [(a, b) for a, b in zip(then, now, strict=False) if a != b]
        first = f", first {differing[0][0]}, now {differing[0][1]}" if differing else ""
        return f"classes {len(then)}, now {len(now)}{first}"
    return f"{key} {then!r}, now {now!r}"


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if needed > free:
        raise ValueError(
            f"{path} will take {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free. Make room there, or give "
            "another paths.cache."
        )


def _encode_shards(
    images: ImageSource,
    labels: Tensor,
    encode: Encode,
    shards: Mapping[Path, range],
    meta: CacheMeta,
    fingerprint: str,
    *,
    batch_size: int,
    processes: Processes,
    progress: bool,
) -> None:
    """Write the shards of one process. Images are read one batch ahead of the encoder, in a thread."""
    batches = {
        file: [slice(row, min(row + batch_size, rows.stop)) for row in range(rows.start, rows.stop, batch_size)]
        for file, rows in shards.items()
    }
    pictures = read_ahead(images, [batch for parts in batches.values() for batch in parts])
    share = f" ({processes.rank + 1} of {processes.world_size} processes)" if processes.world_size > 1 else ""
    total, written = sum(map(len, shards.values())), 0
    with tqdm(
        total=total, desc=f"encode {meta.data}{share}", unit="img", disable=None if progress else True, mininterval=0.5
    ) as bar:
        for file, rows in shards.items():
            with claimed(file) as stream:
                parts = []
                for _ in batches[file]:
                    parts.append(_encoded(next(pictures), encode, meta))
                    show_life(file.parent)
                    bar.update(len(parts[-1]))
                tensors = {meta.tensor: np.concatenate(parts), "labels": labels[rows.start : rows.stop].long().numpy()}
                content = pack(tensors, fingerprint)
                stream.write(content)
                written += len(content)
                bar.set_postfix_str(f"{written / 1e9:.2f} GB")


def _encoded(images: Tensor, encode: Encode, meta: CacheMeta) -> np.ndarray:
    """What a shard keeps of images (B,3,H,W): themselves, or moments (B,V,2,C,h,w).

    Raises: ValueError if a moment does not fit the type it is kept in.
    """
    if meta.dtype == PIXELS:
        return images.numpy()
    views = [images, images.flip(-1)] if meta.mirrors else [images]
    moments = torch.stack([torch.stack(encode(view), dim=1) for view in views], dim=1).cpu()
    with np.errstate(over="ignore"):
        stored = moments.numpy().astype(meta.dtype)
    for k, name in enumerate(("mean", "logvar")):
        if not np.isfinite(stored[:, :, k]).all():
            raise ValueError(
                f"{meta.data}: autoencoder {meta.autoencoder} gave a {name} that {meta.dtype} does not hold "
                f"({float(moments[:, :, k].abs().max()):.3g} at most). Check its weights, or set data.dtype=float32."
            )
    return stored


def read_ahead(images: ImageSource, batches: Sequence[slice]) -> Iterator[Tensor]:
    """The images of each batch in order; the next one is read in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(images.__getitem__, batch) for batch in batches[:2]]
        for k in range(len(batches)):
            yield ahead.pop(0).result()
            if k + 2 < len(batches):
                ahead.append(reader.submit(images.__getitem__, batches[k + 2]))


def _finish(
    path: Path, shards: Sequence[Path], labels: Tensor, meta: CacheMeta, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Labels, then the manifest. Each shard says its own hash and sums, so none is read again."""
    cards = [card_of(file) for file in shards]
    with claimed(path / LABELS) as stream:
        np.save(stream, labels.numpy().astype(np.int64))
    manifest = {
        "format": FORMAT,
        **known,
        "latents": latent_statistics([card["statistics"] for card in cards], meta.scale, meta.shift),
        "class_histogram": np.bincount(labels.numpy(), minlength=meta.num_classes).tolist() if meta.num_classes else [],
        "labels_sha256": file_sha256(path / LABELS),
        "shards": [
            {"file": file.name, "bytes": file.stat().st_size, "sha256": card["sha256"]}
            for file, card in zip(shards, cards, strict=True)
        ],
        "versions": {name: version(name) for name in ("torch", "numpy", "pillow", "safetensors")},
    }
    with claimed(path / MANIFEST) as stream:
        stream.write(json.dumps(manifest, indent=1).encode())
    return manifest


def _made_by(file: Path, fingerprint: str) -> bool:
    """Whether a shard is there, has the length it says, and belongs to this preparation."""
    try:
        card = card_of(file)
    except ValueError:
        return False
    return (card.get("format"), card.get("fingerprint")) == (FORMAT, fingerprint)


@contextmanager
def claimed(file: Path) -> Iterator[IO[bytes]]:
    """A stream into a temporary file, which becomes `file` at the end of the block: readers see all of it or nothing.

    The temporary file is locked meanwhile. The lock goes with the process, however it ends, and the next one writes
    over what was left.

    Raises: ValueError if another process writes the same file, or the disk is full.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("ab") as lock:
            _lock(lock, temporary, file)
            try:
                lock.truncate(0)
                content = io.BytesIO()
                yield content
                lock.write(content.getbuffer())
                lock.flush()
                os.fsync(lock.fileno())
                temporary.replace(file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"The disk of {file.parent} is full: {file.name} was not written. Make room and run the same command "
                "again; the files that are there are kept."
            ) from None
        raise


def _lock(stream: IO[bytes], temporary: Path, file: Path) -> None:
    free = True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = temporary.exists() and os.fstat(stream.fileno()).st_ino == temporary.stat().st_ino
    except BlockingIOError:
        free = False
    except OSError:  # a file system without locks
        return
    if not free:
        raise ValueError(
            f"Another process is writing {file}. Several processes share the shards if torchrun, srun or "
            "trainer.devices starts them; commands of their own must wait for each other."
        )
