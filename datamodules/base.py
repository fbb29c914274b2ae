"""What every data set shares: the batch, the bundle, and the one order of training.

A position counts the samples consumed since step 0. It alone decides which image is seen (epoch position // n, row
permutation(seed, epoch)[position % n]), whether it is mirrored, and which posterior noise it gets. Batches run over
epoch borders: nothing is dropped, none is short. Any number of processes, and any resume, therefore trains on the same
samples.

Shapes: B batch, C latent channels, H W latent size, n images of the set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.cache import LatentCache
from datamodules.crops import RULES
from datamodules.prepare import ImageSource
from datamodules.raw import EncodedImages, compare_classes

# Top word of the Philox counter; the streams of models/noise.py lie below 16.
POSTERIOR, ORDER, MIRROR = 16, 17, 18
MACHINE_FIELDS = ("root", "autoencoder_path", "num_workers")  # of DataConfig: change nothing that is learned


class Batch(NamedTuple):
    """One process's share of a global batch."""

    latents: Tensor  # (B,C,H,W) float32, scaled
    labels: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64, global samples consumed before this one; stays on the CPU


@dataclass(frozen=True)
class DataConfig:
    """Which images are seen, through which autoencoder, and where both lie on this machine."""

    root: str | None = None  # folder, or archive, of the raw images on this machine; digits bring their own
    resolution: int | None = None  # image side in pixels; None = the set's own
    crop: str | None = None  # adm_imagenet | adm_lsun | ldm; None = the set's own
    classes: tuple[str, ...] | None = None  # only these classes, by name; None = all
    subset: int | None = None  # so many images, drawn once without regard to the seed; None = all
    conditional: bool = True  # false: the labels are not given to the model
    on_error: str = "stop"  # at a picture that cannot be decoded: stop, or skip it and list it in the manifest
    mirrors: bool | None = None  # train on horizontal mirrors too, half of the time; None = as the set's papers do
    dtype: str | None = None  # of cached latents: float32 | float16; None = the set's own
    autoencoder: str = "tiny-digits"  # or identity, or one of the Stable Diffusion autoencoders
    autoencoder_path: str | None = None  # its weights: folder or file; tiny-digits has a folder in the cache
    num_workers: int = 0  # loader processes; latents need none (handing a batch over costs more than reading it)

    def __post_init__(self) -> None:
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"data.subset is {self.subset}; it must be at least 1, or null for all images.")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"data.resolution is {self.resolution}; it must be at least 1 pixel.")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}; it must be 0 or more.")
        for key, allowed in (
            ("crop", (None, *RULES)),
            ("on_error", ("stop", "skip")),
            ("dtype", (None, "float32", "float16")),
        ):
            if (value := getattr(self, key)) not in allowed:
                choices = ", ".join("null" if choice is None else choice for choice in allowed)
                raise ValueError(f"data.{key} is {value!r}. Choose one of {choices}.")
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))
            if not self.classes or len(set(self.classes)) < len(self.classes):
                raise ValueError(f"data.classes is {list(self.classes)}; name at least one class, each once.")

    def require_defaults(self, title: str, *keys: str) -> None:
        """Raises: ValueError if one of the settings `keys` is given, which the set `title` does not have."""
        for field in fields(self):
            if field.name in keys and getattr(self, field.name) != field.default:
                raise ValueError(f"data.{field.name} is given, but {title} have no such choice. Leave it out.")


@dataclass(frozen=True)
class DataSet:
    """One file in `datamodules/` ends in `DATASET = DataSet(...)`; the file name is its name."""

    title: str
    image_size: int  # side in pixels
    num_classes: int  # 0 = unlabelled, or not known before the images are there
    image_rule: str  # how a stored picture becomes the square image that is trained on and scored against
    module: type[LatentDataModule]
    images: Callable[[DataConfig], tuple[ImageSource, Tensor]]  # -> uint8 (n,3,H,W), labels (n,) int64
    raw: Callable[[DataConfig], EncodedImages] | None = None  # the pictures on the user's disk; None = brings its own
    crop: str | None = None  # name of `image_rule` in crops.RULES, for pictures of the user
    mirrors: bool = False
    dtype: str = "float32"

    def side(self, settings: DataConfig) -> int:
        """Of the images, in pixels."""
        return settings.resolution or self.image_size

    def rule(self, settings: DataConfig) -> str:
        """`image_rule` under these settings."""
        return RULES[settings.crop] if settings.crop else self.image_rule

    def with_mirrors(self, settings: DataConfig) -> bool:
        return self.mirrors if settings.mirrors is None else settings.mirrors

    def identity(self, settings: DataConfig) -> str:
        """What decides the images: equal for equal images, wherever they lie."""
        if self.raw is None:
            return json.dumps([self.image_rule, settings.resolution, settings.subset])
        images: Any = self.images(settings)[0]
        return self.identity_of(settings, images.fingerprint)

    def identity_of(self, settings: DataConfig, fingerprint: str) -> str:
        """`identity` of pictures of the user with that fingerprint, which need not be here."""
        return json.dumps([settings.crop or self.crop, self.side(settings), fingerprint])


def subset_rows(count: int, subset: int | None) -> Tensor:
    """Rows of the images kept, ascending; a random draw, as sets are often sorted by class.

    Raises: ValueError if there are fewer than `subset`.
    """
    if subset is None:
        return torch.arange(count)
    if subset > count:
        raise ValueError(f"data.subset is {subset}, but the set has {count} images.")
    return torch.from_numpy(np.sort(permutation(0, 0, count)[:subset]))


@lru_cache(maxsize=4)  # a batch at an epoch's border reads two
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of epoch `epoch` -> (count,) int64, a function of (seed, epoch) alone."""
    order = np.random.Generator(np.random.Philox(key=(seed, epoch), counter=(0, 0, 0, ORDER))).permutation(count)
    order.setflags(write=False)
    return order


def rows_at(positions: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Row of the set seen at each position (B,) -> (B,) int64."""
    epochs, within = np.divmod(positions, count)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permutation(seed, int(epoch), count)[within[here]]
    return rows


def streams(seed: int, positions: np.ndarray, stream: int) -> Iterator[np.random.Generator]:
    """The generator of each position in turn, to be drawn from before the next one is taken.

    It is one generator, set to the beginning of each stream (seed, position): a new one each would cost more.
    """
    bits = np.random.Philox(key=(seed, 0), counter=(0, 0, 0, stream))
    generator, state = np.random.Generator(bits), bits.state
    for position in positions.tolist():
        state["state"]["key"][1] = position
        bits.state = state
        yield generator


def posterior_eps(seed: int, positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal draws of the Philox streams (seed, position) -> (B, *shape) float32."""
    eps = np.empty((len(positions), *shape), np.float32)
    for row, generator in zip(eps, streams(seed, positions, POSTERIOR), strict=True):
        generator.standard_normal(dtype=np.float32, out=row)
    return eps


def mirror_bits(seed: int, positions: np.ndarray) -> np.ndarray:
    """Which samples are seen mirrored (B,) bool: a fair coin of the Philox streams (seed, position)."""
    draws = (generator.bit_generator.random_raw() >> 63 for generator in streams(seed, positions, MIRROR))
    return np.fromiter(draws, bool, len(positions))


def float32(moments: np.ndarray) -> np.ndarray:
    """By torch, which is 7 times faster at it than numpy."""
    return torch.from_numpy(moments).float().numpy()


class LatentStream(IterableDataset[Batch]):
    """The batches of one process, without end, from a given position on."""

    def __init__(
        self, cache: LatentCache, seed: int, batch_size: int, rank: int, world_size: int, accumulate: int, start: int
    ) -> None:
        self.cache, self.seed, self.batch_size = cache, seed, batch_size
        self.rank, self.world_size, self.accumulate, self.start = rank, world_size, accumulate, start

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)  # the loader reads its workers in turn
        share = np.arange(self.rank, self.batch_size, self.world_size).reshape(self.accumulate, -1)  # (accumulate, B)
        for index in count(first, stride):
            step, part = divmod(index, self.accumulate)
            yield self.batch(self.start + step * self.batch_size + share[part])

    def batch(self, positions: np.ndarray) -> Batch:
        """Positions (B,) int64 -> latents (posterior sample - shift) * scale, with their labels."""
        cache = self.cache
        rows = rows_at(positions, self.seed, cache.count)
        mirrored = mirror_bits(self.seed, positions) if cache.mirrors else None
        if cache.pixels:
            latents = cache.images(rows, mirrored)  # (B,3,H,W)
        else:
            mean, logvar = float32(cache.moments(rows, mirrored)).swapaxes(0, 1)  # (B,C,H,W) each
            latents = posterior_eps(self.seed, positions, cache.latent_shape)
            logvar *= 0.5  # in place, here and below: fresh memory costs as much as the arithmetic
            latents *= np.exp(logvar, out=logvar)
            latents += mean
        latents -= cache.shift
        latents *= cache.scale
        return Batch(torch.from_numpy(latents), cache.labels[torch.from_numpy(rows)], torch.from_numpy(positions))


class LatentDataModule(L.LightningDataModule):
    """Training batches out of a latent cache; stop by `max_steps`, the loader never ends.

    `batch_size` is global, per optimizer step: process r of W takes positions r, r + W, ... of each batch, cut into
    `accumulate_grad_batches` parts. Use `Trainer(use_distributed_sampler=False)`.

    Raises: ValueError if the cache is not there, damaged, or of a set that this module is not for.
    """

    holds: ClassVar[tuple[str, ...]] = ()  # names of the sets whose caches it reads; none = any

    def __init__(self, cache: Path, *, batch_size: int, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        self.cache = LatentCache(cache)
        if self.holds and (data := self.cache.manifest["data"]) not in self.holds:
            raise ValueError(f"{cache} holds {data}; {type(self).__name__} reads {' or '.join(self.holds)}.")
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers

    @property
    def num_classes(self) -> int:
        return self.cache.num_classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in label order, where they have some."""
        return self.cache.classes

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W)"""
        return self.cache.latent_shape

    @property
    def labels(self) -> Tensor:
        """Labels of all images in row order (n,) int64."""
        return self.cache.labels

    def train_dataloader(self) -> DataLoader:
        trainer = self._trainer()
        return self.loader(
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            start=self.samples_consumed,
        )

    def loader(self, *, rank: int = 0, world_size: int = 1, accumulate: int = 1, start: int = 0) -> DataLoader:
        """The endless loader of process `rank`, from position `start` on.

        Raises: ValueError if the global batch cannot be shared evenly.
        """
        parts = world_size * accumulate
        if self.batch_size < 1 or self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} is global and must be a multiple of processes x accumulation = "
                f"{world_size} x {accumulate} = {parts}."
            )
        stream = LatentStream(self.cache, self.seed, self.batch_size, rank, world_size, accumulate, start)
        return DataLoader(stream, batch_size=None, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Latents and labels, without a wait for a CUDA device; positions are read on the CPU."""
        ahead = device.type == "cuda"
        return batch._replace(
            latents=batch.latents.to(device, non_blocking=ahead), labels=batch.labels.to(device, non_blocking=ahead)
        )

    # --- resume: the trainer's step says where to go on, the checkpoint says what the order was made from ----------

    @property
    def samples_consumed(self) -> int:
        """By finished optimizer steps of all processes; loaders may have read ahead. A resumed trainer restores its
        step before it asks for the loader.
        """
        return self._trainer().global_step * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"samples_consumed": self.samples_consumed, "classes": list(self.classes), **self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: ValueError if this checkpoint's samples came in another order or from other latents."""
        if difference := compare_classes(self.classes, state_dict.get("classes", self.classes)):
            raise ValueError(f"The checkpoint was trained on other classes. {difference}")
        for key, now in self._order().items():
            if state_dict[key] != now:
                raise ValueError(
                    f"The checkpoint was trained with {key} {state_dict[key]}, this run has {now}. Resume with the "
                    "same data, seed and batch size, or start a new run."
                )

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise ValueError("This data module has no trainer yet: pass it to Trainer.fit, or use its loader().")
        return self.trainer

    def _order(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "seed": self.seed, "latents": self.cache.fingerprint}
