"""The real images that generated ones are held against: their moments, some feature rows, and where they come from.

A reference file is an npz with the keys of ADM's evaluator (mu, sigma, mu_s, sigma_s, and arr_0 where images are kept)
beside our own, so either program reads the other's file.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.console import progress
from bench.errors import UserError
from bench.features import INCEPTION_CLASSES, INCEPTION_SHA256, FeatureExtractor
from bench.files import atomic_write
from bench.metrics.frechet import Moments, MomentSums
from bench.metrics.precision_recall import squared_radii

MAX_ROWS = 10_000  # feature rows kept for precision, recall and class accuracy: as many as ADM's files hold images
BATCH = 64


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
    spatial: Moments
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

    def with_rows(self, batches: Iterable[Tensor], extractor: FeatureExtractor) -> Reference:
        """The same reference with the pooled features of `batches`, uint8 (B, 3, H, W) each, as its rows."""
        self.check(extractor)
        rows = [extractor(images)["pool"].cpu() for images in progress(batches, desc="reference rows", unit="batch")]
        return replace(self, pool_rows=torch.cat(rows), labels=None)

    def save(self, path: Path, images: Tensor | None = None) -> None:
        """Write the npz. `images`, uint8 (m, 3, H, W), go in as ADM's arr_0, which its evaluator wants."""
        arrays: dict[str, Any] = {
            "mu": self.pool.mu.numpy(),
            "sigma": self.pool.sigma.numpy(),
            "mu_s": self.spatial.mu.numpy(),
            "sigma_s": self.spatial.sigma.numpy(),
            **{key: np.array(getattr(self, key)) for key in _PLAIN},
        }
        if self.pool_rows is not None:
            arrays |= {"pool_rows": self.pool_rows.numpy(), "radii": self.radii.numpy()}
        if self.labels is not None:
            arrays["labels"] = self.labels.numpy()
        if images is not None:
            arrays["arr_0"] = images.permute(0, 2, 3, 1).numpy()
        with atomic_write(path, "wb") as file:
            np.savez(file, **arrays)

    @staticmethod
    def load(path: Path) -> Reference:
        """Read our file or one of ADM's. Raises: UserError if it is missing or holds no moments."""
        if not path.is_file():
            raise UserError(f"There is no reference file {path}.")
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ("mu", "sigma", "mu_s", "sigma_s") if key not in file]
            if missing:
                raise UserError(
                    f"{path} is no reference file: it has no {', '.join(missing)}. It holds {', '.join(file)}."
                )
            arrays = {key: file[key] for key in file.files if key != "arr_0"}
        moments = {key: torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma", "mu_s", "sigma_s")}
        plain = {key: arrays[key].item() for key in _PLAIN} if "extractor" in arrays else _adm(path, arrays)
        reference = Reference(
            **plain,
            pool=Moments(moments["mu"], moments["sigma"]),
            spatial=Moments(moments["mu_s"], moments["sigma_s"]),
            pool_rows=torch.from_numpy(arrays["pool_rows"]) if "pool_rows" in arrays else None,
            labels=torch.from_numpy(arrays["labels"]) if "labels" in arrays else None,
        )
        if "radii" in arrays:
            reference.__dict__["radii"] = torch.from_numpy(arrays["radii"])  # fills the cached property
        return reference


_PLAIN = ("name", "n", "extractor", "extractor_sha256", "image_rule", "num_logits", "sha256")


def build_reference(
    name: str,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    total: int,
    extractor: FeatureExtractor,
    image_rule: str,
) -> Reference:
    """Statistics of `total` images that come as (uint8 (B, 3, H, W), labels (B,) or None), in a fixed order.

    Rows are kept for all images, or for MAX_ROWS of them spread evenly.
    Raises: UserError if the number of images is not `total`.
    """
    pool, spatial = MomentSums(extractor.dims["pool"]), MomentSums(extractor.dims["spatial"])
    seen_images, seen_labels = hashlib.sha256(), hashlib.sha256()
    rows, row_labels = [], []
    with progress(total=total, desc=f"reference {name}", unit="image") as bar:
        for images, labels in batches:
            seen_images.update(images.cpu().contiguous().numpy().tobytes())
            features = extractor(images)
            kept = _is_kept(torch.arange(pool.n, pool.n + len(images)), total)
            pool.add(features["pool"].cpu())
            spatial.add(features["spatial"].cpu())
            rows.append(features["pool"].cpu()[kept])
            if labels is not None:
                seen_labels.update(labels.cpu().long().numpy().tobytes())
                row_labels.append(labels.cpu().long()[kept])
            bar.update(len(images))
    if pool.n != total:
        raise UserError(f"Reference {name} should have {total} images, the data gave {pool.n}.")
    rules = (extractor.name, extractor.sha256, extractor.resize, image_rule)
    identity = "\n".join((*rules, seen_images.hexdigest(), seen_labels.hexdigest()))
    return Reference(
        name=name,
        n=total,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        image_rule=image_rule,
        num_logits=extractor.dims["logits"],
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        pool=pool.moments(),
        spatial=spatial.moments(),
        pool_rows=torch.cat(rows),
        labels=torch.cat(row_labels) if row_labels else None,
    )


def adm_images(path: Path) -> Iterator[Tensor]:
    """The images arr_0 of an ADM npz in batches, uint8 (B, 3, H, W), read from the zip without unpacking it whole.

    Raises: UserError if there is no arr_0 of uint8 images.
    """
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise UserError(f"{path} holds no images (arr_0).")
        with archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read_header(file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
                raise UserError(f"{path}: arr_0 should be uint8 images (N, H, W, 3), it is {dtype} {shape}.")
            for start in range(0, shape[0], BATCH):
                size = (min(BATCH, shape[0] - start), *shape[1:])
                images = np.frombuffer(file.read(int(np.prod(size))), np.uint8).reshape(size)
                yield torch.from_numpy(images.copy()).permute(0, 3, 1, 2)


def _is_kept(positions: Tensor, total: int) -> Tensor:
    """True for the positions whose rows are kept: all, or MAX_ROWS spread evenly over 0 .. total - 1."""
    if total <= MAX_ROWS:
        return torch.ones_like(positions, dtype=torch.bool)
    return (positions + 1) * MAX_ROWS // total > positions * MAX_ROWS // total


def _adm(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, object]:
    """What an ADM file leaves out: it was always made with the Inception network of 2015-12-05."""
    digest = hashlib.sha256(b"".join(arrays[key].tobytes() for key in ("mu", "sigma", "mu_s", "sigma_s")))
    return {
        "name": path.stem,
        "n": 0,
        "extractor": "inception",
        "extractor_sha256": INCEPTION_SHA256,
        "image_rule": "as in the file",
        "num_logits": INCEPTION_CLASSES,
        "sha256": digest.hexdigest(),
    }
