"""Looking at data: is a cache, or a raw set, as it should be; what do its images look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import registry
from bench.config import RunConfig
from bench.console import is_main_process, progress, say
from bench.errors import UserError
from bench.files import atomic_write
from bench.prepare import autoencoder_of, caches_of, finished_caches, records_folder, require_raw
from datamodules.cache import LABELS, card_of, file_sha256, latent_statistics, read_manifest, read_shard, statistics
from datamodules.crops import decode
from datamodules.sources import CroppedImages, keep_records, skipped_of, unreadable

COLUMNS = 10  # images shown


def check(config: RunConfig) -> None:
    """Verify the cache of these settings, and the raw images where data.root is given; print what was found.

    Raises: UserError for what is wrong, or if there is neither.
    """
    dataset = registry.dataset(config.use.data)
    keep_records(records_folder(config.paths))
    try:
        caches = finished_caches(config)
        faults = [fault for path in caches for fault in check_cache(path)]
        if dataset.raw is not None and (config.data.root is not None or not caches):
            if not caches:
                require_raw(config)
            faults += _check_raw(config, caches)
        elif not caches:
            images, labels = dataset.images(config.data)
            say(f"{dataset.title}: {len(images):,} images at {images.shape[-1]}x{images.shape[-1]}, no cache yet")
            _say_classes(np.bincount(labels.numpy()), ())
    except ValueError as error:
        raise UserError(str(error)) from None
    if faults:
        raise UserError("\n  ".join([f"{config.use.data} is not as it should be:", *faults]))
    say("as it should be")


def check_cache(path: Path) -> list[str]:
    """Read all of a finished cache and compare it with its manifest -> a sentence for each difference."""
    manifest = read_manifest(path)
    say(f"{path}: {manifest['count']:,} images, {manifest['dtype']} {tuple(manifest['latent_shape'])}")
    say(f"  source: {manifest['source']}; autoencoder {manifest['autoencoder_name']}; mirrors {manifest['mirrors']}")
    faults, sums, labels = [], [], []
    for k, shard in enumerate(progress(manifest["shards"], desc="check", unit="shard")):
        file = path / shard["file"]
        if not file.exists() or file.stat().st_size != shard["bytes"]:
            faults.append(f"{file} is missing or cut short.")
            continue
        try:
            tensors, card = read_shard(path, manifest, k), card_of(file)
        except ValueError:
            faults.append(f"{file} was altered: its header or the hash of its data are not those of the manifest.")
            continue
        if card.get("fingerprint") != manifest["fingerprint"]:
            faults.append(f"{file} belongs to another preparation.")
        sums.append(statistics(tensors))
        labels.append(tensors["labels"])
    if faults:
        return [*faults, f"Remove {path} and prepare the data again."]
    if not (path / LABELS).exists():
        return [f"{path / LABELS} is missing.", f"Remove {path} and prepare the data again."]
    if file_sha256(path / LABELS) != manifest["labels_sha256"] or not np.array_equal(
        np.load(path / LABELS), np.concatenate(labels)
    ):
        faults.append(f"{path / LABELS} was altered: its labels are not those of the shards.")
    if (count := sum(map(len, labels))) != manifest["count"]:
        faults.append(f"{path} holds {count} images, its manifest says {manifest['count']}.")
    found = latent_statistics(sums, manifest["scale"], manifest["shift"])
    for key, name in (("mean", "mean"), ("std", "standard deviation")):
        say(f"  latent {name} per channel: " + ", ".join(f"{value:.4f}" for value in found[key]))
        if not np.allclose(found[key], manifest["latents"][key], rtol=1e-9, atol=1e-9):
            faults.append(f"{path}: the {name} of the latents is not that of the manifest, {manifest['latents'][key]}.")
    histogram = np.bincount(np.concatenate(labels), minlength=manifest["num_classes"])
    if manifest["num_classes"]:
        _say_classes(histogram, manifest["classes"])
        if histogram.tolist() != manifest["class_histogram"]:
            faults.append(f"{path}: the class histogram is not that of the manifest.")
    if manifest["skipped"]:
        say(f"  left out: {len(manifest['skipped'])} pictures, first: {manifest['skipped'][0]}")
    return faults


def _check_raw(config: RunConfig, caches: list[Path]) -> list[str]:
    dataset = registry.dataset(config.use.data)
    raw = dataset.raw(config.data)
    say(raw.description)
    for warning in raw.warnings:
        say(f"  {warning}")
    if raw.classes:
        _say_classes(np.bincount(raw.labels, minlength=len(raw.classes)), raw.classes)
    images, _ = dataset.images(config.data)
    here = caches_of(config, images.fingerprint)
    faults = [
        f"{path} was made from another state of {config.data.root}. `prepare` makes one of this state."
        for path in caches
        if path not in here
    ]
    for path in here:
        if path not in caches:  # made of the same pictures elsewhere: it serves here, too
            faults += check_cache(path)
    left_out = skipped_of(images)
    for sentence in left_out:
        say(f"  left out: {sentence}")
    sentences = [str(error) for _, error in unreadable(raw, progress=is_main_process())]
    return [*faults, *(sentence for sentence in sentences if sentence not in left_out)]


def _say_classes(histogram: np.ndarray, names: Any) -> None:
    def label(k: int) -> str:
        return str(names[k]) if len(names) else str(k)

    least, most = int(histogram.argmin()), int(histogram.argmax())
    say(
        f"  classes: {len(histogram)}, of {histogram[least]:,} ({label(least)}) to {histogram[most]:,} ({label(most)}) "
        f"images"
    )
    if len(histogram) <= COLUMNS:
        say("  " + ", ".join(f"{label(k)} {count:,}" for k, count in enumerate(histogram.tolist())))


def show(config: RunConfig, out: Path) -> None:
    """Write a PNG of images spread over the set: raw (fitted into a square), cropped, decoded; one column an image.

    Raises: UserError for what is missing, or if `out` is no PNG.
    """
    if out.suffix != ".png":
        raise UserError(f"--out {out}: give a name that ends in .png.")
    keep_records(records_folder(config.paths))
    try:
        images, _ = registry.dataset(config.use.data).images(config.data)
        autoencoder = autoencoder_of(config, images)
        rows = np.linspace(0, len(images) - 1, min(COLUMNS, len(images))).round().astype(int).tolist()
        cropped = torch.cat([images[row : row + 1] for row in rows])  # (n,3,S,S)
    except ValueError as error:
        raise UserError(str(error)) from None
    mean, _ = autoencoder.moments(cropped)  # of z; decode takes latents
    scale, shift = (torch.tensor(part)[:, None, None] for part in (autoencoder.scale, autoencoder.shift))
    lines = [cropped, autoencoder.decode((mean - shift) * scale)]
    if isinstance(images, CroppedImages):
        lines.insert(0, torch.stack([_fitted(images, row) for row in rows]))
    grid = torch.cat([torch.cat(list(line), dim=-1) for line in lines], dim=-2)  # (3, lines S, n S)
    with atomic_write(out, "wb") as file:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, format="PNG")
    say(f"{out}: {len(rows)} images; lines: {'raw, ' * (len(lines) - 2)}cropped, decoded by {autoencoder.name}")


def _fitted(images: CroppedImages, row: int) -> torch.Tensor:
    """A picture as it is stored, made to fit into the square on white -> (3,S,S) uint8."""
    picture = decode(images.raw.read(row), images.raw.name(row))
    picture.thumbnail((images.size, images.size))
    square = Image.new("RGB", (images.size, images.size), "white")
    square.paste(picture, ((images.size - picture.width) // 2, (images.size - picture.height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
