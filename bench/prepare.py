"""What runs share, made once and kept in the cache: autoencoder, latents, reference of the evaluation.

cache/<data>/
  autoencoder/               weights of the small autoencoder trained on the images, where the data set uses one
  latents-<hash>/            posterior moments of all images, by autoencoder and data settings
  reference-<extractor>-<hash>.npz  moments and feature rows of the real images
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from bench import metrics, registry
from bench.config import RunConfig
from bench.console import is_main_process, say
from bench.errors import UserError
from bench.features import FeatureExtractor, build_extractor
from bench.reference import Reference, build_reference
from datamodules.base import DataSet, LatentDataModule
from datamodules.prepare import CacheMeta, prepare_cache
from models.autoencoder import CARD, SD_NAMES, Autoencoder, AutoencoderConfig, load_autoencoder

REFERENCE_BATCH = 100  # images per forward of the extractor


@dataclass(frozen=True)
class Data:
    """A data set behind its autoencoder."""

    dataset: DataSet
    autoencoder: Autoencoder
    latents: Path

    def module(self, config: RunConfig) -> LatentDataModule:
        """The data module of one run: its batch size and seed decide the order of training."""
        return self.dataset.module(
            self.latents, batch_size=config.recipe.batch_size, seed=config.seed, num_workers=config.data.num_workers
        )


@dataclass(frozen=True)
class Scorer:
    """What turns images into scores."""

    extractor: FeatureExtractor
    reference: Reference
    metrics: tuple[metrics.MetricSpec, ...]


def prepare_data(config: RunConfig) -> Data:
    """Autoencoder and latents of a run's data, from the cache or made now. Raises: UserError for what is missing."""
    dataset, settings = registry.dataset(config.use.data), config.data
    cache = Path(config.paths.cache) / config.use.data
    images, labels = dataset.images(settings)
    name = settings.autoencoder
    trained_here = name not in SD_NAMES and name != "identity"
    path = str(cache / "autoencoder") if trained_here else settings.autoencoder_path
    if trained_here and not (cache / "autoencoder" / CARD).exists():
        say(f"autoencoder: training it on {len(images)} images of {config.use.data}, once")
    try:
        autoencoder = load_autoencoder(
            AutoencoderConfig(name, path), images=lambda: images[:], progress=is_main_process()
        )
        meta = CacheMeta(
            data=config.use.data,
            num_classes=dataset.num_classes,
            resolution=settings.resolution or dataset.image_size,
            image_rule=dataset.image_rule,
            autoencoder=autoencoder.name,
            autoencoder_sha256=autoencoder.sha256,
            scale=autoencoder.scale,
            shift=autoencoder.shift,
        )
        identity = json.dumps([asdict(meta), settings.subset], sort_keys=True)
        latents = cache / f"latents-{_digest(identity)}"
        prepare_cache(images, labels, autoencoder.moments, latents, meta, progress=is_main_process())
    except ValueError as error:
        raise UserError(str(error)) from None
    return Data(dataset, autoencoder, latents)


def prepare_scorer(config: RunConfig, data: Data) -> Scorer:
    """Extractor, reference and metrics of a run's protocol; the reference is the real images before the autoencoder."""
    specs = tuple(metrics.spec(name) for name in config.eval.metrics)
    weights = config.eval.extractor_weights
    extractor = build_extractor(config.eval.extractor, Path(weights) if weights else None)
    identity = json.dumps([data.dataset.image_rule, config.data.resolution, config.data.subset, extractor.sha256])
    name = f"reference-{extractor.name}-{_digest(identity)}.npz"
    path = Path(config.paths.cache) / config.use.data / name
    if path.exists():
        reference = Reference.load(path)
        reference.check(extractor)
        return Scorer(extractor, reference, specs)
    images, labels = data.dataset.images(config.data)
    say(f"reference: {len(images)} images of {config.use.data} through {extractor.name}")

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, len(images), REFERENCE_BATCH):
            rows = slice(start, start + REFERENCE_BATCH)
            yield images[rows], labels[rows] if data.dataset.num_classes else None

    reference = build_reference(config.use.data, batches(), len(images), extractor, data.dataset.image_rule)
    if is_main_process():
        reference.save(path)
    return Scorer(extractor, reference, specs)


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:8]
