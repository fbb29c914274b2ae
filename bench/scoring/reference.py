"""The real images that generated ones are held against: their moments, some feature rows, and where they come from.

A reference file is an npz with the keys of ADM's evaluator (mu, sigma, mu_s, sigma_s, and arr_0 where images are kept)
beside our own, so either program reads the other's file.
"""

from __future__ import annotations

import hashlib
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from bench.console import progress
from bench.errors import UserError
from bench.files import atomic_write
from bench.metrics.frechet import Moments, MomentSums
from bench.metrics.precision_recall import squared_radii
from bench.scoring.features import INCEPTION_CLASSES, INCEPTION_SHA256, FeatureExtractor
from bench.scoring.images import ImageSet, not_an_npz, write_npz

MAX_ROWS = 10_000  # feature rows kept for precision, recall and class accuracy: as many as ADM's files hold images
BATCH = 64
SAVE_SECONDS = 60  # what a crash loses at most


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of `n` real images under one extractor.

    `pool_rows` (m, D) float32 are the pooled features of m of them, evenly spread, with `labels` (m,) int64 where the
    images have classes. Both are None for a file of ADM's until `with_rows` reads its images.
    """

    name: str
    n: int  # images behind the moments; 0 where an ADM file does not say
    extractor: str
    extractor_sha256: str
    image_rule: str  # how the images became uint8, e.g. "centre crop 256"
    num_logits: int
    sha256: str  # of the images, labels, extractor and rule, not of rounded features: equal on every machine
    pool: Moments
    spatial: Moments | None  # None where the extractor has no spatial output
    pool_rows: Tensor | None
    labels: Tensor | None

    def rows(self) -> Tensor:
        """`pool_rows`. Raises: UserError where the file brought none."""
        if self.pool_rows is None:
            raise UserError(
                f"Reference {self.name} holds no feature rows, which precision, recall and class_accuracy need. "
                "Read its images with Reference.with_rows, or leave these metrics out."
            )
        return self.pool_rows

    def spatial_moments(self) -> Moments:
        """`spatial`. Raises: UserError where the file brought none."""
        if self.spatial is None:
            raise UserError(f"Reference {self.name} holds no spatial moments (mu_s, sigma_s); leave sfid out.")
        return self.spatial

    def row_labels(self) -> Tensor:
        """`labels`. Raises: UserError where the images have none."""
        if self.labels is None:
            raise UserError(
                f"Reference {self.name} holds no labels, so it gives no class_accuracy; leave that metric out."
            )
        return self.labels

    @cached_property
    def radii(self) -> Tensor:
        """Squared radius of each row's ball (m,) float64, for precision."""
        return squared_radii(self.rows())

    def check(self, extractor: FeatureExtractor) -> None:
        """Raises: UserError unless `extractor` is the one these statistics were made with."""
        given, own = (extractor.name, extractor.sha256[:8]), (self.extractor, self.extractor_sha256[:8])
        if given != own:
            raise UserError(
                f"Reference {self.name} was made with {own[0]} ({own[1]}), the samples go through {given[0]} "
                f"({given[1]}). Use the same extractor, or make the reference again."
            )

    def with_rows(self, images: ImageSet, extractor: FeatureExtractor) -> Reference:
        """The same reference with the pooled features of `images` as its rows."""
        self.check(extractor)
        rows = []
        with progress(total=images.n, desc=f"rows of {self.name}", unit="image") as bar:
            for start in range(0, images.n, BATCH):
                block = range(start, min(start + BATCH, images.n))
                rows.append(extractor(images.read(block), indices=block)["pool"].cpu())
                bar.update(len(block))
        return replace(self, pool_rows=torch.cat(rows), labels=None)

    def save(self, path: Path, images: Iterable[Tensor] | None = None) -> None:
        """Write the npz. `images`, in batches (B, 3, H, W) uint8, one for each of `pool_rows`, become arr_0, from
        which ADM's evaluator takes precision and recall."""
        arrays: dict[str, Any] = {
            "mu": self.pool.mu.numpy(),
            "sigma": self.pool.sigma.numpy(),
            **{key: np.array(getattr(self, key)) for key in _PLAIN},
        }
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mu.numpy(), "sigma_s": self.spatial.sigma.numpy()}
        if self.pool_rows is not None:
            arrays |= {"pool_rows": self.pool_rows.numpy(), "radii": self.radii.numpy()}
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        with atomic_write(path, "wb") as file:
            if images is None:
                np.savez(file, **arrays)
            else:
                write_npz(file, len(self.rows()), (batch.permute(0, 2, 3, 1).numpy() for batch in images), arrays)

    @staticmethod
    def load(path: Path) -> Reference:
        """Read our file or one of ADM's. Raises: UserError if it is missing or holds no moments."""
        if not path.is_file():
            raise UserError(f"There is no reference file {path}.")
        with _open(path) as file:
            held = list(file.files)
            arrays = {key: file[key] for key in held if key != "arr_0"}
        missing = [key for key in ("mu", "sigma") if key not in arrays]
        if missing:
            raise UserError(f"{path} is no reference file: it has no {', '.join(missing)}. It holds {', '.join(held)}.")
        plain = {key: arrays[key].item() for key in _PLAIN} if "extractor" in arrays else _adm(path)
        reference = Reference(
            **plain,
            pool=_moments(arrays, "mu", "sigma"),
            spatial=_moments(arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None,
            pool_rows=torch.from_numpy(arrays["pool_rows"]) if "pool_rows" in arrays else None,
            labels=torch.from_numpy(arrays["labels"]) if "labels" in arrays else None,
        )
        if "radii" in arrays:
            reference.__dict__["radii"] = torch.from_numpy(arrays["radii"])  # fills the cached property
        return reference


def extractor_of(path: Path) -> str:
    """The extractor a reference file was made with."""
    with _open(path) as file:
        return file["extractor"].item() if "extractor" in file else "inception"


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise not_an_npz(path, error) from None


_PLAIN = ("name", "n", "extractor", "extractor_sha256", "image_rule", "num_logits", "sha256")


def build_reference(
    name: str,
    read: Callable[[range], tuple[Tensor, Tensor | None]],
    total: int,
    extractor: FeatureExtractor,
    image_rule: str,
    partial: Path | None = None,
) -> Reference:
    """Statistics of `total` images; `read` gives those of a range as (uint8 (B, 3, H, W), labels (B,) or None).

    Feature rows are kept for all images, or for MAX_ROWS of them spread evenly. What is done is written to `partial`
    once a minute; killed and called again, it goes on from there and ends with the same bits.
    """
    sums = _Sums.load(partial) if partial is not None and partial.exists() else _Sums.empty(extractor)
    saved = time.monotonic()
    with progress(total=total, initial=sums.pool.n, desc=f"reference {name}", unit="image") as bar:
        while sums.pool.n < total:
            block = range(sums.pool.n, min(sums.pool.n + BATCH, total))
            images, labels = read(block)
            sums.add(images, labels, extractor(images, indices=block), _is_kept(torch.tensor(block), total))
            bar.update(len(block))
            if partial is not None and time.monotonic() - saved > SAVE_SECONDS:
                sums.save(partial)
                saved = time.monotonic()
    if partial is not None:
        partial.unlink(missing_ok=True)
    rules = (extractor.name, extractor.sha256, extractor.resize, image_rule, sums.digest.hex())
    return Reference(
        name=name,
        n=total,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        image_rule=image_rule,
        num_logits=extractor.dims.get("logits", 0),
        sha256=hashlib.sha256("\n".join(rules).encode()).hexdigest(),
        pool=sums.pool.moments(),
        spatial=sums.spatial.moments() if sums.spatial is not None else None,
        pool_rows=torch.cat(sums.rows),
        labels=torch.cat(sums.labels) if sums.labels else None,
    )


@dataclass
class _Sums:
    """A reference in the making."""

    pool: MomentSums
    spatial: MomentSums | None
    rows: list[Tensor]
    labels: list[Tensor]
    digest: bytes  # chained over images and labels, one by one, so that it does not depend on batches

    @staticmethod
    def empty(extractor: FeatureExtractor) -> _Sums:
        spatial = MomentSums(extractor.dims["spatial"]) if "spatial" in extractor.dims else None
        return _Sums(MomentSums(extractor.dims["pool"]), spatial, [], [], b"")

    def add(self, images: Tensor, labels: Tensor | None, features: dict[str, Tensor], kept: Tensor) -> None:
        self.pool.add(features["pool"].cpu())
        if self.spatial is not None:
            self.spatial.add(features["spatial"].cpu())
        self.rows.append(features["pool"].cpu()[kept])
        if labels is not None:
            self.labels.append(labels.cpu().long()[kept])
        classes = [b""] * len(images) if labels is None else [str(label).encode() for label in labels.tolist()]
        for image, label in zip(images.cpu().numpy(), classes, strict=True):
            self.digest = hashlib.sha256(self.digest + hashlib.sha256(image.tobytes()).digest() + label).digest()

    def save(self, path: Path) -> None:
        tensors = {"pool.total": self.pool.total, "pool.outer": self.pool.outer, "rows": torch.cat(self.rows)}
        if self.spatial is not None:
            tensors |= {"spatial.total": self.spatial.total, "spatial.outer": self.spatial.outer}
        if self.labels:
            tensors["labels"] = torch.cat(self.labels)
        with atomic_write(path, "wb") as file:
            file.write(safetensors.torch.save(tensors, {"n": str(self.pool.n), "digest": self.digest.hex()}))

    @staticmethod
    def load(path: Path) -> _Sums:
        with safetensors.safe_open(path, "pt") as file:
            tensors, plain = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        sums = {}
        for kind in ("pool", "spatial"):
            if f"{kind}.total" in tensors:
                sums[kind] = MomentSums(len(tensors[f"{kind}.total"]))
                sums[kind].n = int(plain["n"])
                sums[kind].total, sums[kind].outer = tensors[f"{kind}.total"], tensors[f"{kind}.outer"]
        labels = [tensors["labels"]] if "labels" in tensors else []
        return _Sums(sums["pool"], sums.get("spatial"), [tensors["rows"]], labels, bytes.fromhex(plain["digest"]))


def kept_images(read: Callable[[range], tuple[Tensor, Any]], total: int) -> Iterator[Tensor]:
    """The images whose rows a reference of `total` images keeps, in batches."""
    for start in range(0, total, BATCH):
        block = range(start, min(start + BATCH, total))
        kept = _is_kept(torch.tensor(block), total)
        if kept.any():
            yield read(block)[0][kept]


def _moments(arrays: dict[str, np.ndarray], mu: str, sigma: str) -> Moments:
    return Moments(*(torch.from_numpy(arrays[key].astype(np.float64)) for key in (mu, sigma)))


def _is_kept(positions: Tensor, total: int) -> Tensor:
    """True for the positions whose rows are kept: all, or MAX_ROWS spread evenly over 0 .. total - 1."""
    if total <= MAX_ROWS:
        return torch.ones_like(positions, dtype=torch.bool)
    return (positions + 1) * MAX_ROWS // total > positions * MAX_ROWS // total


def _adm(path: Path) -> dict[str, object]:
    """What an ADM file leaves out: it was always made with the Inception network of 2015-12-05."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {
        "name": path.stem,
        "n": 0,
        "extractor": "inception",
        "extractor_sha256": INCEPTION_SHA256,
        "image_rule": "as in the file",
        "num_logits": INCEPTION_CLASSES,
        "sha256": digest.hexdigest(),
    }
