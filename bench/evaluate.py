"""Runs: a run in, samples and rows of results.jsonl out, exact under any number of processes.

Sample i depends on (seed, i) alone. Samples and scores already on disk are not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import budget as budgets
from bench import metrics, registry
from bench.config import RunConfig, changed_settings, load_run
from bench.console import is_main_process, say, show
from bench.errors import UserError
from bench.prepare import Data, finished_caches, prepare_data, records_folder
from bench.scoring.passes import FeatureBlocks, measured, run_pass
from bench.scoring.samples import SampleFiles, Sampling, sampling_protocol
from bench.scoring.scorer import DataReference, Scorer, prepare_scorer, scorer_protocol
from bench.store import Result, ResultStore
from bench.tables import comparison as tables
from bench.training.checkpoints import checkpoint_path, load_weights, require_unchanged
from bench.training.plan import TrainingPlan, build_module, plan_training
from bench.training.run_record import read_state
from datamodules.cache import read_manifest
from datamodules.sources import keep_records
from models.autoencoder import TINY, Autoencoder, AutoencoderConfig, load_autoencoder
from models.base import DiffusionModule

QUANTISATION = "floor(clamp(127.5 x + 128, 0, 255))"  # float images in [-1, 1] to uint8, DiT's rule


def draw(
    module: DiffusionModule,
    autoencoder: Autoencoder,
    sampling: Sampling,
    indices: Sequence[int],
    labels: Tensor | None,
) -> Tensor:
    """The samples `indices` in one batch -> images (B,3,H,W) uint8."""
    latents = module.sample(
        indices,
        labels,
        sampler=sampling.sampler,
        cfg_scale=sampling.cfg_scale,
        cfg_channels=sampling.cfg_channels,
        seed=sampling.seed,
    )
    return autoencoder.decode(latents)


class SampledImages(torch.nn.Module):
    """The samples of a run, as a `Source` for scoring: what is on disk, or drawn now and kept."""

    def __init__(self, module: DiffusionModule, autoencoder: Autoencoder, files: SampleFiles) -> None:
        super().__init__()
        self.module, self.autoencoder, self.files = module, autoencoder, files
        self.num_samples, self.blocks = files.sampling.num_samples, files.sampling.blocks()

    def images(self, block: range) -> Tensor:
        stored = self.files.read(block)
        if stored is not None:
            return stored
        images = draw(self.module, self.autoencoder, self.files.sampling, block, self.labels(block))
        self.files.write(block, images)
        return images

    def labels(self, block: range) -> Tensor | None:
        return self.files.sampling.draw_labels(block, self.module.spec.num_classes)

    def finish(self) -> None:
        self.files.finish(self.module.spec.num_classes)


def load_trained(directory: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run directory, wherever it lies now; overrides may change how it is scored alone.

    Raises: UserError if it is no run directory, or an override would make it another run.
    """
    path = Path(directory) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{directory} is not a run directory (it has no config.yaml). Runs lie in runs/<run_id>.")
    trained, config = load_run(str(path)), load_run(str(path), overrides)
    require_unchanged(path.parent, trained)
    if config.run_id != trained.run_id:
        raise UserError(
            f"{directory}: {' '.join(overrides)} changes what is trained. Only eval.* may differ; train it first."
        )
    named = path.parent.name not in ("", "..")
    runs = str(path.parent.parent if named else path.parent.resolve().parent)
    if config.paths.runs not in (trained.paths.runs, runs):
        raise UserError(f"{directory} lies in {runs}, and its samples and scores go there. Leave out paths.runs.")
    return replace(config, paths=replace(config.paths, runs=runs))


def sample(config: RunConfig, step: int | None = None) -> SampleFiles:
    """Draw the samples of the protocol from the checkpoint at `step` (None: the last) -> their files."""
    plan = plan_training(config)
    step = plan.budget.steps if step is None else step
    if step:
        trained_checkpoint(config, step)  # before an autoencoder is made for nothing
    files = _sample_and_score(config, plan, step, load_decoder(config), scorer=None)[1]
    say(f"{config.eval.num_samples} samples: {files.path}, {files.grid}")
    return files


def evaluate_runs(configs: Sequence[RunConfig], step: int | None = None, fmt: str = "terminal") -> None:
    """Score several runs and print one table. Raises: UserError, as `evaluate`, before the first is scored."""
    for config in configs:
        _rows_of(config, plan_training(config).budget.steps if step is None else step)
    results = [evaluate(config, step) for config in configs]
    show(tables.render(tables.build(results), fmt).rstrip())


def evaluate(
    config: RunConfig,
    step: int | None = None,
    *,
    comparison: str = "",
    data: Data | None = None,
    scorer: Scorer | None = None,
) -> Result:
    """Score the EMA weights at `step` (None: the last checkpoint; 0: the untrained weights) -> the stored row.

    Raises: UserError if the run has no such checkpoint.
    """
    plan, state = plan_training(config), read_state(config.directory)
    step = plan.budget.steps if step is None else step
    stored = _rows_of(config, step)
    autoencoder = load_decoder(config) if data is None else data.autoencoder
    scorer = scorer or scorer_of(config)
    protocol = run_protocol(config, autoencoder, scorer)
    for result in stored:
        if result.protocol == protocol:  # scored before, perhaps for another comparison
            result = replace(result, comparison=comparison)
            if is_main_process():
                _store(config).append(result)
            return result
    world_size, files, kept, scores = _sample_and_score(config, plan, step, autoencoder, scorer)
    sampling = files.sampling
    images_seen = step * config.recipe.batch_size
    result = Result(
        run_id=config.run_id,
        comparison=comparison,
        model=config.use.model,
        title=registry.architecture(config.use.model).title,
        size=config.model.size,
        data=config.use.data,
        recipe=config.use.recipe,
        changed=changed_settings(config),
        weights="ema" if step else "untrained",
        seed=config.seed,
        steps=step,
        images_seen=images_seen,
        batch_size=config.recipe.batch_size,
        params_m=plan.cost.params_m,
        gflops=plan.cost.gflops,
        gflops_parts=plan.cost.parts,
        train_gflops=budgets.training_gflops(plan.cost.gflops, config.recipe.batch_size, step) if step else 0.0,
        train_gflops_papers=plan.cost.gflops * images_seen,
        sample_gflops=sampling.gflops(plan.cost.gflops, plan.spec.num_classes),
        train_seconds=state.get("train_seconds", 0.0) if step == plan.budget.steps else 0.0,
        protocol=protocol,
        checkpoint=str(checkpoint_path(config.directory, step).relative_to(config.paths.runs)) if step else "",
        samples=str(files.path.relative_to(config.paths.runs)),
        **measured(world_size, scores, config.trainer),
    )
    if is_main_process():
        _store(config).append(result)
        kept.remove()
    return result


def _store(config: RunConfig) -> ResultStore:
    return ResultStore(Path(config.paths.runs) / "results.jsonl")


def _rows_of(config: RunConfig, step: int) -> list[Result]:
    """The rows of the weights at `step`, by any protocol.

    Raises: UserError if there are neither rows nor weights, before an autoencoder or a reference is made for nothing.
    """
    rows = _store(config).load(run_id=config.run_id, steps=step)
    if step and not rows:
        trained_checkpoint(config, step)
    return rows


def trained_checkpoint(config: RunConfig, step: int) -> Path:
    """The checkpoint at `step`. Raises: UserError if the run has none."""
    checkpoint = checkpoint_path(config.directory, step)
    if not checkpoint.exists():
        there = sorted(path.name for path in checkpoint.parent.glob("step-*.ckpt"))
        raise UserError(
            f"{config.directory} has no checkpoint of step {step}; it has {', '.join(there) or 'none'}. "
            f"Train it with: python -m bench train {config.directory}/config.yaml"
        )
    return checkpoint


def trained_module(config: RunConfig, plan: TrainingPlan, step: int) -> DiffusionModule:
    """The module with the EMA weights at `step`; 0: the untrained weights.

    Raises: UserError if there are none, or they were trained with other settings.
    """
    checkpoint = trained_checkpoint(config, step) if step else None
    module = build_module(config, plan.spec)
    if checkpoint is not None:
        load_weights(module, checkpoint, config)
    return module


def load_decoder(config: RunConfig) -> Autoencoder:
    """The autoencoder of a run's samples; a run of imported weights needs neither images nor latents for it.

    Raises: UserError if it, or what it would be made from, is missing.
    """
    name, path = config.data.autoencoder, config.data.autoencoder_path
    if "imported" not in read_state(config.directory) or (name == TINY and path is None):
        return prepare_data(config).autoencoder
    try:
        return load_autoencoder(AutoencoderConfig(name, path))
    except ValueError as error:
        raise UserError(str(error)) from None


def scorer_of(config: RunConfig) -> Scorer:
    """The scorer of a run's protocol; where it names no reference, the real images of the run's data are it."""
    return prepare_scorer(config.eval, config.paths, _real_images(config) if config.eval.reference is None else None)


def _real_images(config: RunConfig) -> DataReference:
    """Those of data.root; where that is not given, those that the run's finished cache was made from."""
    keep_records(records_folder(config.paths))
    caches = finished_caches(config) if config.data.root is None else []
    if registry.dataset(config.use.data).raw is None or not caches:
        return DataReference.of_dataset(config.use.data, config.data)
    return DataReference.of_cache(config.use.data, config.data, read_manifest(caches[0]))


def run_protocol(config: RunConfig, autoencoder: Autoencoder, scorer: Scorer) -> dict[str, Any]:
    """Everything that changes a score and is not the trained weights, flat, as stored with each row."""
    return {
        **sampling_protocol(config),
        "decoder": autoencoder.name,
        "decoder_sha256": autoencoder.sha256[:16],
        "quantisation": QUANTISATION,
        **scorer_protocol(scorer),
    }


def score_line(result: Result) -> str:
    """'fid 12.3 ± 0.4, ...'"""
    return ", ".join(f"{name} {value:.4g} ± {result.ci95[name]:.2g}" for name, value in result.scores.items())


def _sample_and_score(
    config: RunConfig, plan: TrainingPlan, step: int, autoencoder: Autoencoder, scorer: Scorer | None
) -> tuple[int, SampleFiles, FeatureBlocks, dict[str, metrics.Score]]:
    """One pass over the samples -> (world size, sample files, features kept meanwhile, scores by column)."""
    module = trained_module(config, plan, step)
    sampling = Sampling.of(config)
    files = SampleFiles(sampling.directory(config.directory, step), sampling)
    kept = FeatureBlocks(files.directory, scorer)
    world_size, scores = run_pass(SampledImages(module, autoencoder, files), scorer, config.trainer, kept)
    return world_size, files, kept, scores
