"""What runs share, made once and kept in the cache: autoencoder and latents.

cache/<data>/
  autoencoder[-<hash>]/      weights of the small autoencoder trained on the images, where a run asks for it
  latents-<hash>/            posterior moments, or images, of a whole set, by autoencoder and data settings
cache/raw/                   which pictures of a raw set cannot be decoded, where data.on_error=skip leaves them out

A finished cache serves without the raw images: on another machine, `data.root` may stay away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import registry
from bench.config import PathsConfig, RunConfig, TrainerConfig, load_run
from bench.console import is_main_process, say
from bench.device import require_device
from bench.errors import UserError
from bench.files import atomic_write, short_digest
from datamodules.base import DataSet, LatentDataModule
from datamodules.cache import FORMAT, MANIFEST, PIXELS, CacheMeta, OtherFormat, lost_shards, read_manifest
from datamodules.prepare import ImageSource, prepare_cache
from datamodules.processes import Processes, require_launched, wait_for
from datamodules.raw import some
from datamodules.sources import keep_records, skipped_of
from models.autoencoder import (
    CARD,
    SD_NAMES,
    Autoencoder,
    AutoencoderConfig,
    latent_shape,
    load_autoencoder,
)

PIXEL_AUTOENCODER = "identity"
SD_FAMILY = "sd-vae"  # fine-tuned decoders of one encoder, whose latents are the same
# What a manifest must say to be found.
ABOUT = {"request", "root", "skipped", "autoencoder_folder", "encoder_sha256", "source_sha256"}
TRAINED_ON = 5000  # images of a set, evenly spread, that the small autoencoder is trained on at most


@dataclass(frozen=True)
class Data:
    """A data set behind its autoencoder."""

    dataset: DataSet
    autoencoder: Autoencoder
    latents: Path

    @property
    def fingerprint(self) -> str:
        """Of the latents, equal on every machine."""
        return read_manifest(self.latents)["fingerprint"]

    def module(self, config: RunConfig) -> LatentDataModule:
        """The data module of one run: its batch size and seed decide the order of training.

        Raises: UserError if the latents are damaged.
        """
        batch_size, workers = config.recipe.batch_size, config.data.num_workers
        try:
            return self.dataset.module(self.latents, batch_size=batch_size, seed=config.seed, num_workers=workers)
        except ValueError as error:
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class DataEnds:
    """What a backbone must know of its data."""

    channels: int
    side: int  # of the latents
    num_classes: int  # 0 = unconditional


def load_data(name: str, overrides: Sequence[str]) -> RunConfig:
    """The settings under which runs see the data set `name`; what is not about data is of no account here.

    Raises: UserError, as `load_run`.
    """
    registry.dataset(name)  # must exist
    return load_run("digits", [f"use.data={name}", *overrides])


def prepare(name: str, overrides: Sequence[str]) -> None:
    """Make the cache of a data set, with `trainer.devices` processes, and say where it lies.

    Pictures at data.root are gone through even if there is a cache of them: they may have changed since.
    """
    config = load_data(name, overrides)
    if config.trainer.devices * config.trainer.num_nodes > 1:
        import lightning as L

        machine = config.trainer
        require_processes(machine)
        accelerator = "cpu" if machine.accelerator == "auto" and not torch.cuda.is_available() else machine.accelerator
        L.Fabric(accelerator=accelerator, strategy="ddp", devices=machine.devices, num_nodes=machine.num_nodes).launch()
    data = prepare_data(config, look=True)
    manifest = read_manifest(data.latents)
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e9
    say(f"{data.latents}: {manifest['count']:,} images in {len(manifest['shards'])} shards, {size:.2f} GB")
    for sentence in manifest["skipped"]:
        say(f"  left out: {sentence}")


def require_processes(machine: TrainerConfig) -> None:
    """Raises: UserError if the processes that `machine` asks for are not those that were started, or lack a GPU."""
    require_device(machine.accelerator)
    try:
        require_launched(machine.devices, machine.num_nodes)
    except ValueError as error:
        raise UserError(str(error)) from None


def prepare_data(config: RunConfig, *, look: bool = False) -> Data:
    """Autoencoder and latents of a run's data, from the cache or made now.

    A finished cache serves without a look at the pictures, unless `look` is set and they are here.
    Raises: UserError for what is missing.
    """
    root = config.data.root
    keep_records(records_folder(config.paths))
    try:
        if look and root is not None and Path(root).expanduser().exists():
            return _prepared(config)
        return _finished(config) or _prepared(config)
    except ValueError as error:
        raise UserError(str(error)) from None


def data_ends(config: RunConfig) -> DataEnds:
    """Channels, side and classes of a run's data, without preparing it. Raises: UserError for settings that do not fit.

    Classes that are not given are those of a finished cache, else those found below data.root, else the published ones.
    """
    dataset, settings = registry.dataset(config.use.data), config.data
    try:
        channels, side = latent_shape(settings.autoencoder, dataset.side(settings))
        if not settings.conditional:
            classes = 0
        elif dataset.raw is None:
            classes = dataset.num_classes
        elif settings.classes is not None:
            classes = len(settings.classes)
        elif caches := finished_caches(config):
            classes = read_manifest(caches[0])["num_classes"]
        else:
            classes = len(dataset.raw(settings).classes) if settings.root is not None else dataset.num_classes
    except ValueError as error:
        raise UserError(str(error)) from None
    return DataEnds(channels, side, classes)


def finished_caches(config: RunConfig) -> list[Path]:
    """Caches made by these settings, of the raw images at data.root, or of any where that is not given.

    Of several states of one folder, under one encoder, it is the cache that was prepared last.
    """
    root = _root(config)
    found = {
        (manifest["root"], manifest["encoder_sha256"]): path
        for path, manifest in _asked_for(config)
        if root in (None, manifest["root"])
    }
    return sorted(found.values())


def caches_of(config: RunConfig, source_sha256: str) -> list[Path]:
    """Caches made by these settings of the raw images with that fingerprint, wherever those lay."""
    return sorted(path for path, manifest in _asked_for(config) if manifest["source_sha256"] == source_sha256)


def _asked_for(config: RunConfig) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Caches made by these settings with their manifests, the one prepared last at the end."""
    for file in sorted(_manifests(config), key=lambda file: file.stat().st_mtime_ns):
        with suppress(OtherFormat):  # which stands in nobody's way: a new one has another folder
            manifest = _manifest(file)
            if not _differences(config, manifest):
                yield file.parent, manifest


def require_raw(config: RunConfig) -> None:
    """Raises: ValueError if there is no data.root, but caches of other settings, which it names."""
    others = []
    for file in _manifests(config):
        try:
            differing = ", ".join(_differences(config, _manifest(file)))
        except OtherFormat:
            differing = "of another version of this program"
        others.append(f"{file.parent.name} ({differing})")
    if config.data.root is None and others:
        raise ValueError(
            f"{_folder(config)} has no latents of these settings, only: {'; '.join(others)}. Ask for those, or give "
            "data.root to encode the images anew."
        )


def _differences(config: RunConfig, manifest: dict[str, Any]) -> list[str]:
    """How a cache differs from what these settings ask for; on_error counts where pictures were left out."""
    made, asked = manifest["request"], request(config)
    found = [f"{key} {made.get(key)}, not {asked[key]}" for key in asked if made.get(key) != asked[key]]
    return found + ["on_error skip, not stop"] * bool(manifest["skipped"] and config.data.on_error == "stop")


def _manifest(file: Path) -> dict[str, Any]:
    """Raises: ValueError if it is not that of a cache made here; OtherFormat as `read_manifest`."""
    manifest = read_manifest(file.parent)
    if missing := ABOUT - manifest.keys():
        raise ValueError(
            f"{file} does not say {some(sorted(missing))}: it is damaged, or of another program. Remove {file.parent} "
            "and prepare the data again."
        )
    return manifest


def _manifests(config: RunConfig) -> list[Path]:
    return sorted(_folder(config).glob(f"latents-*/{MANIFEST}"))


def request(config: RunConfig) -> dict[str, Any]:
    """The settings that a cache depends on, with every default filled in."""
    dataset, settings = registry.dataset(config.use.data), config.data
    pixels = settings.autoencoder == PIXEL_AUTOENCODER
    if pixels and settings.dtype is not None:
        raise ValueError(f"data.dtype is {settings.dtype}, but pixels (autoencoder identity) are kept as bytes.")
    return {
        "resolution": dataset.side(settings),
        "crop": settings.crop or dataset.crop,
        "classes": list(settings.classes) if settings.classes is not None else None,
        "subset": settings.subset,
        "autoencoder": SD_FAMILY if settings.autoencoder in SD_NAMES else settings.autoencoder,
        "dtype": PIXELS if pixels else settings.dtype or dataset.dtype,
        "mirrors": dataset.with_mirrors(settings),
    }


def _finished(config: RunConfig) -> Data | None:
    """The cache of a set of the user's pictures, without looking at them; None if there is none of these settings.

    Raises: ValueError if there are several, or it was made by another autoencoder and data.root is not given.
    """
    dataset = registry.dataset(config.use.data)
    if dataset.raw is None:
        return None
    caches = finished_caches(config)
    if not caches:
        require_raw(config)
        return None
    if len(caches) > 1 and config.data.root is None:
        roots = ", ".join(f"{path.name} of {read_manifest(path)['root']}" for path in caches)
        raise ValueError(f"{_folder(config)} has several caches of these settings ({roots}). Say which by data.root.")
    foreign = []
    for path in caches:
        manifest = read_manifest(path)
        if config.data.root is not None and any(lost_shards(path, manifest)):
            return None  # what is lost is made again
        autoencoder = _load(config, manifest["autoencoder_folder"])
        if autoencoder.encoder_sha256 == manifest["encoder_sha256"]:
            return Data(dataset, autoencoder, path)
        foreign.append(f"{path} by encoder {manifest['encoder_sha256'][:8]}, not {autoencoder.encoder_sha256[:8]}")
    if config.data.root is None:
        raise ValueError(
            f"The latents were made with another autoencoder: {'; '.join(foreign)}. Give its weights as "
            "data.autoencoder_path, or data.root to encode the images anew."
        )
    return None


def _prepared(config: RunConfig) -> Data:
    dataset, settings = registry.dataset(config.use.data), config.data
    images, labels = dataset.images(settings)
    raw = getattr(images, "raw", None)
    if raw is not None:
        say(f"{config.use.data}: {raw.description}")
        for warning in raw.warnings:
            say(f"  {warning}")
    autoencoder = autoencoder_of(config, images)
    asked = request(config)
    meta = CacheMeta(
        data=config.use.data,
        num_classes=dataset.num_classes if raw is None else len(raw.classes),
        resolution=asked["resolution"],
        image_rule=dataset.rule(settings),
        autoencoder=asked["autoencoder"],
        encoder_sha256=autoencoder.encoder_sha256,
        latent_shape=_latent_shape(autoencoder, asked["resolution"]),
        scale=autoencoder.scale,
        shift=autoencoder.shift,
        dtype=asked["dtype"],
        mirrors=asked["mirrors"],
        source_sha256="" if raw is None else images.fingerprint,
        classes=() if raw is None else raw.classes,
    )
    about = {
        "request": asked,
        "root": _root(config),
        "source": dataset.title if raw is None else raw.description,
        "warnings": [] if raw is None else list(raw.warnings),
        "skipped": list(skipped_of(images)),
        "autoencoder_name": autoencoder.name,
        "autoencoder_sha256": autoencoder.sha256,
        "autoencoder_folder": _own_folder(config, images),
        "input_range": [-1, 1],  # of the pixels that the encoder sees
    }
    path = (
        _folder(config) / f"latents-{short_digest(json.dumps([FORMAT, asdict(meta), settings.subset], sort_keys=True))}"
    )
    autoencoder.to(_device(config))
    progress = is_main_process()
    manifest = prepare_cache(
        images, labels, autoencoder.moments, path, meta, about=about, processes=Processes.here(), progress=progress
    )
    if raw is not None and is_main_process() and path not in finished_caches(config):
        # Made before, of the same pictures elsewhere or of a state that this folder has again: now it is the last one.
        with suppress(PermissionError), atomic_write(path / MANIFEST) as file:  # it may be there for reading only
            json.dump(manifest | {"root": about["root"]}, file, indent=1)
    return Data(dataset, autoencoder.to("cpu"), path)


def autoencoder_of(config: RunConfig, images: ImageSource) -> Autoencoder:
    """The autoencoder of these images; a small one that is not there yet is trained on them.

    Raises: ValueError if its weights are missing, or the cache folder cannot be made.
    """
    folder = _folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"paths.cache: the folder {folder} cannot be made: {error.strerror}.") from None
    return _load(config, _own_folder(config, images), images)


def _own_folder(config: RunConfig, images: ImageSource) -> str:
    """Name in the cache of the small autoencoder that is trained on these images."""
    dataset, fingerprint = registry.dataset(config.use.data), getattr(images, "fingerprint", None)
    if fingerprint is None:  # the set brings its images
        return "autoencoder"
    return f"autoencoder-{short_digest(dataset.identity_of(config.data, fingerprint))}"


def _load(config: RunConfig, own_folder: str, images: ImageSource | None = None) -> Autoencoder:
    """The autoencoder asked for.

    A small one lies at data.autoencoder_path, or in `own_folder` of the cache; it is trained on `images` where it is
    not there yet.
    """
    name, path = config.data.autoencoder, config.data.autoencoder_path
    folder = _folder(config) / own_folder if path is None else Path(path)
    if name in SD_NAMES or name == PIXEL_AUTOENCODER:
        return load_autoencoder(AutoencoderConfig(name, path))
    if images is None:
        return load_autoencoder(AutoencoderConfig(name, str(folder)))
    if not (folder / CARD).exists() and not is_main_process():
        wait_for(lambda: not (folder / CARD).exists(), folder.parent, "wait", "autoencoder", progress=False)
    source, step = images, -(-len(images) // TRAINED_ON)
    if not (folder / CARD).exists():
        say(f"autoencoder: training it on {-(-len(images) // step)} images of {config.use.data}, once")
    return load_autoencoder(
        AutoencoderConfig(name, str(folder)), images=lambda: source[::step], progress=is_main_process()
    )


def _latent_shape(autoencoder: Autoencoder, side: int) -> tuple[int, int, int]:
    channels, latent_side = latent_shape(autoencoder.name, side)
    return channels, latent_side, latent_side


def records_folder(paths: PathsConfig) -> Path:
    """Of lists of unreadable pictures, for all data sets: sizes of one set have the same pictures."""
    return Path(paths.cache) / "raw"


def _folder(config: RunConfig) -> Path:
    return Path(config.paths.cache) / config.use.data


def _root(config: RunConfig) -> str | None:
    root = config.data.root
    return None if root is None else str(Path(root).expanduser().resolve())


def _device(config: RunConfig) -> torch.device:
    """Where this process encodes."""
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", Processes.here().local_rank % torch.cuda.device_count())
