"""What turns images into scores: an extractor, the reference they are held against, and the metrics.

cache/<data>/reference-<extractor>-<hash>.npz   made from the real images of a data set
cache/references/                               made from images or files that the user gives
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bench import metrics, registry
from bench.config import EvalConfig, PathsConfig, ScoringConfig
from bench.console import is_main_process, say
from bench.errors import UserError
from bench.files import short_digest
from bench.prepare import records_folder
from bench.scoring.features import FeatureExtractor, build_extractor
from bench.scoring.images import ImageSet, open_images
from bench.scoring.reference import Reference, build_reference, kept_images
from datamodules.base import DataConfig
from datamodules.sources import keep_records


@dataclass(frozen=True)
class Scorer:
    """What turns images into scores."""

    extractor: FeatureExtractor
    reference: Reference
    metrics: tuple[metrics.MetricSpec, ...]

    def __post_init__(self) -> None:
        """Raises: UserError for a metric that needs an output which the extractor does not have."""
        for spec in self.metrics:
            if spec.feature not in self.extractor.dims:
                raise UserError(
                    f"{spec.name} needs {spec.feature} features, extractor {self.extractor.name} has "
                    f"{', '.join(self.extractor.dims)} only. Leave it out of eval.metrics."
                )


def scorer_protocol(scorer: Scorer) -> dict[str, Any]:
    """Everything about extractor, reference and metrics that changes a score, as stored with each row."""
    extractor, reference = scorer.extractor, scorer.reference
    return {
        "precision": extractor.precision,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256[:16],
        "resize": extractor.resize,
        "reference": reference.name,
        "reference_n": reference.n,
        "reference_images": reference.image_rule,
        "reference_sha256": reference.sha256[:16],
        "metrics": ",".join(spec.name for spec in scorer.metrics),
    }


@dataclass(frozen=True)
class DataReference:
    """Real images as a reference is made from them."""

    name: str
    folder: str  # of the cache
    identity: str  # of the images, for the cache
    count: int
    image_rule: str
    read: Callable[[range], tuple[Tensor, Tensor | None]]  # uint8 (B,3,H,W), labels (B,) or None

    @staticmethod
    def of_dataset(name: str, settings: DataConfig) -> DataReference:
        """Raises: UserError for settings or images that do not fit."""
        dataset = registry.dataset(name)
        try:
            images, labels = dataset.images(settings)
            identity = dataset.identity(settings)
        except ValueError as error:
            raise UserError(str(error)) from None
        labelled = bool(labels.any())  # an unlabelled set has zeros

        def read(block: range) -> tuple[Tensor, Tensor | None]:
            rows = slice(block.start, block.stop)
            try:
                return images[rows], labels[rows] if labelled else None
            except ValueError as error:  # a picture that cannot be decoded
                raise UserError(str(error)) from None

        return DataReference(name, name, identity, len(images), dataset.rule(settings), read)

    @staticmethod
    def of_cache(name: str, settings: DataConfig, manifest: dict[str, Any]) -> DataReference:
        """The images that a finished cache was made from, while they are not here: a reference made before will do.

        Reading them raises: UserError, as data.root is missing.
        """
        dataset = registry.dataset(name)
        return DataReference(
            name,
            name,
            dataset.identity_of(settings, manifest["source_sha256"]),
            manifest["count"],
            dataset.rule(settings),
            lambda block: DataReference.of_dataset(name, settings).read(block),
        )

    @staticmethod
    def of_images(images: ImageSet) -> DataReference:
        rule = f"as in the {'folder' if images.path.is_dir() else 'file'}"
        return DataReference(
            images.path.stem, "references", images.sha256(), images.n, rule, lambda block: (images.read(block), None)
        )


def prepare_scorer(scored: EvalConfig, paths: PathsConfig, data: DataReference | None) -> Scorer:
    """Extractor, reference and metrics of a protocol.

    The reference is `scored.reference` where that is given, else `data`: the real images before the autoencoder.
    Raises: UserError for weights or a reference that are missing or do not fit each other.
    """
    if scored.reference is not None and not Path(scored.reference).exists():  # told before weights are asked for
        raise UserError(f"There is no reference {scored.reference}. Give an npz or a folder of real images.")
    specs = tuple(metrics.spec(name) for name in scored.metrics)
    extractor = _extractor(scored)
    if scored.reference is not None:
        needs_rows = any(spec.needs_rows for spec in specs)
        reference = _given_reference(Path(scored.reference), extractor, Path(paths.cache), needs_rows)
    elif data is not None:
        reference = prepare_reference(data, extractor, Path(paths.cache))
    else:
        raise UserError("Nothing to compare with: give --reference, an npz or a folder of real images.")
    return Scorer(extractor, reference, specs)


def write_reference(given: str, out: Path, config: ScoringConfig) -> None:
    """Make the reference of a data set, or of the images at a path, and write it with its images to `out`.

    Raises: UserError if `given` is neither, or `out` is no npz.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: a reference is an npz; end the name in .npz.")
    if given in registry.names("datamodules"):
        keep_records(records_folder(config.paths))
        data = DataReference.of_dataset(given, config.data)
    elif Path(given).exists():
        data = DataReference.of_images(open_images(Path(given)))
    else:
        raise UserError(
            f"'{given}' is neither a path nor a data set. {registry.nearest(given, registry.names('datamodules'))}"
        )
    extractor = _extractor(config.eval)
    reference = prepare_reference(data, extractor, Path(config.paths.cache))
    reference.save(out, kept_images(data.read, data.count))
    say(
        f"{out}: {reference.n} images of {reference.name} ({reference.image_rule}) through {extractor.name} "
        f"({extractor.sha256[:8]}); {len(reference.rows())} of them with their feature rows; "
        f"reference {reference.sha256[:8]}"
    )


def _extractor(scored: EvalConfig) -> FeatureExtractor:
    return build_extractor(
        scored.extractor,
        Path(scored.extractor_weights) if scored.extractor_weights else None,
        fetch=scored.fetch_weights,
        compiled=scored.compile,
        precision=scored.precision,
    )


def prepare_reference(data: DataReference, extractor: FeatureExtractor, cache: Path) -> Reference:
    """The reference of real images under `extractor`, from the cache or made now."""
    identity = json.dumps([data.identity, extractor.sha256, extractor.precision])
    path = cache / data.folder / f"reference-{extractor.name}-{short_digest(identity)}.npz"
    if path.exists():
        reference = Reference.load(path)
        reference.check(extractor)
        return reference
    say(f"reference: {data.count} images of {data.name} through {extractor.name}")
    partial = path.with_suffix(".partial") if is_main_process() else None
    reference = build_reference(data.name, data.read, data.count, extractor, data.image_rule, partial)
    if is_main_process():
        reference.save(path)
    return reference


def _given_reference(path: Path, extractor: FeatureExtractor, cache: Path, needs_rows: bool) -> Reference:
    """A reference file of ours or of ADM's, or images to make one from; features of its images are cached."""
    if path.is_dir() or not holds_moments(path):
        return prepare_reference(DataReference.of_images(open_images(path)), extractor, cache)
    reference = Reference.load(path)
    reference.check(extractor)
    if reference.pool_rows is not None or not needs_rows:
        return reference
    identity = json.dumps([reference.sha256, extractor.sha256, extractor.precision])
    kept = cache / "references" / f"{reference.name}-{short_digest(identity)}.npz"
    if not kept.exists():
        full = reference.with_rows(open_images(path), extractor)
        if not is_main_process():
            return full
        full.save(kept)
    return Reference.load(kept)


def holds_moments(path: Path) -> bool:
    """Whether a file has the moments of a reference; what is no npz is left to `Reference.load` to name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return True
