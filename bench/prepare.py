"""What runs share, made once and kept in the cache: autoencoder and latents.

cache/<data>/
  autoencoder/               weights of the small autoencoder trained on the images, where the data set uses one
  latents-<hash>/            posterior moments of all images, by autoencoder and data settings
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import registry
from bench.config import RunConfig
from bench.console import is_main_process, say
from bench.errors import UserError
from bench.files import short_digest
from datamodules.base import DataSet, LatentDataModule
from datamodules.prepare import CacheMeta, prepare_cache
from models.autoencoder import CARD, SD_NAMES, Autoencoder, AutoencoderConfig, load_autoencoder


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
        latents = cache / f"latents-{short_digest(identity)}"
        prepare_cache(images, labels, autoencoder.moments, latents, meta, progress=is_main_process())
    except ValueError as error:
        raise UserError(str(error)) from None
    return Data(dataset, autoencoder, latents)
