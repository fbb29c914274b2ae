"""Scores of anybody's images: npz or folders of PNG files in, one table out, a line of sample_sets.jsonl each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bench.config import ScoringConfig
from bench.console import is_main_process
from bench.errors import UserError
from bench.files import short_digest
from bench.scoring.images import ImageSet, open_images
from bench.scoring.passes import FeatureBlocks, measured, run_pass
from bench.scoring.reference import extractor_of
from bench.scoring.scorer import Scorer, holds_moments, prepare_scorer, scorer_protocol
from bench.store import RowStore, SampleSetScore
from bench.tables import comparison as tables


class StoredImages:
    """The first `num_samples` of a set of images, as a `Source` for scoring."""

    def __init__(self, images: ImageSet, num_samples: int, batch_size: int) -> None:
        self._set, self.num_samples = images, num_samples
        starts = range(0, num_samples, batch_size)
        self.blocks = [range(start, min(start + batch_size, num_samples)) for start in starts]

    def images(self, block: range) -> Tensor:
        return self._set.read(block)

    def labels(self, block: range) -> None:
        return None

    def finish(self) -> None:
        pass


def score_sets(paths: Sequence[Path], config: ScoringConfig, fmt: str = "terminal") -> None:
    """Score every set against `config.eval.reference` and print one table; what is stored is not computed again.

    Raises: UserError, before anything is computed, for images, counts or a reference that do not fit.
    """
    sets = [open_images(_samples_of(path)) for path in paths]
    n = _common_count(sets, config.num_samples)
    scorer = prepare_scorer(replace(config.eval, extractor=_extractor(config)), config.paths, None)
    results = [_score(path, images, n, scorer, config) for path, images in zip(paths, sets, strict=True)]
    if is_main_process():
        print(tables.render(tables.build_sets(results), fmt).rstrip())


def _score(path: Path, images: ImageSet, n: int, scorer: Scorer, config: ScoringConfig) -> SampleSetScore:
    sha256 = images.sha256()
    protocol = {"num_samples": n, "images": "as given", "size": "x".join(map(str, images.size[::-1]))}
    protocol |= scorer_protocol(scorer)
    store = RowStore(Path(config.paths.runs) / "sample_sets.jsonl", SampleSetScore)
    for stored in store.load(samples=str(path), sha256=sha256):
        if stored.protocol == protocol:
            return stored
    source = StoredImages(images, n, config.eval.batch_size)
    meanwhile = Path(config.paths.cache) / "passes" / short_digest(f"{sha256} {n} {config.eval.batch_size}")
    kept = FeatureBlocks(meanwhile, scorer)
    world_size, scores = run_pass(source, scorer, config.trainer, kept)
    result = SampleSetScore(
        samples=str(path),
        sha256=sha256,
        protocol=protocol,
        **measured(world_size, scores, config.trainer),
    )
    if is_main_process():
        store.append(result)
        kept.remove()
    return result


def _samples_of(path: Path) -> Path:
    """The npz of a run directory that was sampled by one protocol; any other path as it is."""
    if not (path / "config.yaml").is_file():
        return path
    found = sorted(path.glob("samples/*/samples.npz"))
    if len(found) != 1:
        listed = ", ".join(str(file) for file in found) or "none"
        raise UserError(f"{path} is a run with {len(found)} sample sets ({listed}). Give the npz of one of them.")
    return found[0]


def _common_count(sets: Sequence[ImageSet], wanted: int | None) -> int:
    """How many images of each set are scored: as many as asked for, or as all sets have."""
    counts = {str(images.path): images.n for images in sets}
    if wanted is None and len(set(counts.values())) > 1:
        listed = ", ".join(f"{path} {n}" for path, n in counts.items())
        raise UserError(
            f"The sets differ in number ({listed}), and a Frechet distance depends on it. "
            f"Score the first images of each with eval.num_samples={min(counts.values())}."
        )
    n = min(counts.values()) if wanted is None else wanted
    for path, there in counts.items():
        if there < n:
            raise UserError(f"{path} holds {there} images, eval.num_samples asks for {n}.")
    return n


def _extractor(config: ScoringConfig) -> str:
    """The extractor asked for, else that of the reference file, else Inception."""
    if config.extractor is not None:
        return config.extractor
    path = Path(config.eval.reference or "")
    return extractor_of(path) if path.is_file() and holds_moments(path) else config.eval.extractor
