"""Scores: a run in, rows of results.jsonl out, exact under any number of processes.

Rank r takes blocks r, r + world size, ... of the sample indices; nothing is padded or repeated, no collective runs
outside `compute`, and sample i depends on (seed, i) alone. Samples and scores already on disk are not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench import budget as budgets
from bench import metrics, registry, tables
from bench.config import RunConfig, load_run
from bench.console import is_main_process, progress, quiet_lightning, say
from bench.errors import UserError
from bench.prepare import Data, Scorer, prepare_data, prepare_scorer
from bench.samples import SampleFiles, Sampling
from bench.store import Result, ResultStore, provenance
from bench.train import build_module, checkpoint_path, device_name, load_weights, plan, read_state
from models.base import DiffusionModule

QUANTISATION = "floor(clamp(127.5 x + 128, 0, 255))"  # float images in [-1, 1] to uint8, DiT's rule


class EvaluationModule(L.LightningModule):
    """Samples, decodes and scores block after block; each metric is reduced over processes once."""

    def __init__(self, module: DiffusionModule, data: Data, files: SampleFiles, scorer: Scorer | None) -> None:
        """scorer None: only draw the samples."""
        super().__init__()
        self.module, self.autoencoder, self.files = module, data.autoencoder, files
        self.extractor: Any = scorer.extractor if scorer else None
        self.specs = scorer.metrics if scorer else ()
        n = files.sampling.num_samples
        self.metrics = torch.nn.ModuleList(spec.build(scorer.reference, n) for spec in self.specs) if scorer else ()
        self.scores: dict[str, metrics.Score] = {}

    def test_dataloader(self) -> DataLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        sampling = self.files.sampling
        blocks = sampling.blocks()
        if len(blocks) < world:
            raise UserError(
                f"{sampling.num_samples} samples in blocks of {sampling.batch_size} are {len(blocks)} blocks, fewer "
                f"than the {world} processes. Lower eval.batch_size or trainer.devices."
            )
        return DataLoader(blocks[rank::world], batch_size=None, collate_fn=lambda block: block)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: range, device: torch.device, dataloader_idx: int) -> range:
        return batch

    def on_test_start(self) -> None:
        self._bar = progress(total=self.files.sampling.num_samples, unit="image", desc="sampling and scoring")

    def test_step(self, block: range, batch_idx: int) -> None:
        labels = self.files.sampling.draw_labels(block, self.module.spec.num_classes)
        images = self._images(block, labels)
        if self.extractor is not None:
            features = self.extractor(images)
            for spec, metric in zip(self.specs, self.metrics, strict=True):
                metric.update(features[spec.feature], torch.tensor(block), labels)  # type: ignore[operator]
        self._bar.update(len(block) * self.trainer.world_size)

    def on_test_epoch_end(self) -> None:
        self._bar.close()
        for spec, metric in zip(self.specs, self.metrics, strict=True):
            self.scores[metrics.column(spec.name, self.extractor.name)] = metric.compute()  # type: ignore[operator]
        self.trainer.strategy.barrier("samples")  # every block of every process is on disk
        if self.trainer.is_global_zero:
            self.files.finish(self.module.spec.num_classes)

    def _images(self, block: range, labels: Tensor | None) -> Tensor:
        """(B,3,H,W) uint8 on this device: what is on disk, or sampled now and kept."""
        stored = self.files.read(block)
        if stored is not None:
            return stored.to(self.device)
        s = self.files.sampling
        latents = self.module.sample(
            block, labels, sampler=s.sampler, cfg_scale=s.cfg_scale, cfg_channels=s.cfg_channels, seed=s.seed
        )
        images = self.autoencoder.decode(latents)
        self.files.write(block, images)
        return images


def load_trained(directory: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run directory; overrides may change how it is scored, not what was trained.

    Raises: UserError if it is no run directory, or an override would make it another run.
    """
    path = Path(directory) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{directory} is not a run directory (it has no config.yaml). Runs lie in runs/<run_id>.")
    trained, config = load_run(str(path)), load_run(str(path), overrides)
    if config.run_id != trained.run_id:
        raise UserError(
            f"{directory}: {' '.join(overrides)} changes what is trained. Only eval.* may differ; train it first."
        )
    return config


def sample(config: RunConfig, step: int | None = None) -> SampleFiles:
    """Draw the samples of the protocol from the checkpoint at `step` (None: the last) -> their files."""
    data = prepare_data(config)
    files = _run(config, step, data, scorer=None)[1]
    say(f"{config.eval.num_samples} samples: {files.path}, {files.grid}")
    return files


def evaluate_runs(configs: Sequence[RunConfig], step: int | None = None) -> None:
    """Score several runs and print one table."""
    results = [evaluate(config, step) for config in configs]
    say(tables.terminal(tables.build(results)))


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
    data = data or prepare_data(config)
    scorer = scorer or prepare_scorer(config, data)
    run, state = plan(config), read_state(config.directory)
    step = run.budget.steps if step is None else step
    protocol = describe_protocol(config, data, scorer)
    store = ResultStore(Path(config.paths.runs) / "results.jsonl")
    for result in store.load(run_id=config.run_id, steps=step):
        if result.protocol == protocol:  # scored before, perhaps for another comparison
            result = replace(result, comparison=comparison)
            if is_main_process():
                store.append(result)
            return result
    world_size, files, scores = _run(config, step, data, scorer)
    sampling = files.sampling
    guided = sampling.cfg_scale != 1 and run.spec.num_classes > 0
    images_seen = step * config.recipe.batch_size
    result = Result(
        run_id=config.run_id,
        comparison=comparison,
        model=config.use.model,
        title=registry.architecture(config.use.model).title,
        size=config.model.size,
        data=config.use.data,
        recipe=config.use.recipe,
        weights="ema" if step else "untrained",
        seed=config.seed,
        steps=step,
        images_seen=images_seen,
        batch_size=config.recipe.batch_size,
        params_m=run.cost.params_m,
        gflops=run.cost.gflops,
        gflops_parts=run.cost.parts,
        train_gflops=budgets.training_gflops(run.cost.gflops, config.recipe.batch_size, step) if step else 0.0,
        train_gflops_papers=run.cost.gflops * images_seen,
        sample_gflops=budgets.sample_gflops(run.cost.gflops, sampling.sampler.steps, guided),
        train_seconds=state.get("train_seconds", 0.0) if step == run.budget.steps else 0.0,
        protocol=protocol,
        scores={column: score.value for column, score in scores.items()},
        ci95={column: score.ci95 for column, score in scores.items()},
        checkpoint=str(checkpoint_path(config.directory, step).relative_to(config.paths.runs)) if step else "",
        samples=str(files.path.relative_to(config.paths.runs)),
        world_size=world_size,
        device=device_name(),
        **provenance(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if is_main_process():
        store.append(result)
    return result


def describe_protocol(config: RunConfig, data: Data, scorer: Scorer) -> dict[str, Any]:
    """Everything that changes a score and is not the trained weights, flat, as stored with each row."""
    s = Sampling.of(config)
    return {
        "name": config.eval.name,
        "version": config.eval.version,
        "num_samples": s.num_samples,
        "labels": s.labels,
        "seed": s.seed,
        "cfg_scale": s.cfg_scale,
        "cfg_channels": s.cfg_channels,
        **{f"sampler{'' if key == 'name' else '_' + key}": value for key, value in asdict(s.sampler).items()},
        "batch_size": s.batch_size,
        "decoder": data.autoencoder.name,
        "decoder_sha256": data.autoencoder.sha256[:16],
        "quantisation": QUANTISATION,
        "precision": "float32",
        "extractor": scorer.extractor.name,
        "extractor_sha256": scorer.extractor.sha256[:16],
        "resize": scorer.extractor.resize,
        "reference": scorer.reference.name,
        "reference_n": scorer.reference.n,
        "reference_sha256": scorer.reference.sha256[:16],
        "metrics": ",".join(spec.name for spec in scorer.metrics),
    }


def _run(
    config: RunConfig, step: int | None, data: Data, scorer: Scorer | None
) -> tuple[int, SampleFiles, dict[str, metrics.Score]]:
    """One pass over the samples -> (world size, sample files, scores by column)."""
    run = plan(config)
    step = run.budget.steps if step is None else step
    module = build_module(config, run.spec)
    if step:
        checkpoint = checkpoint_path(config.directory, step)
        if not checkpoint.exists():
            there = sorted(path.name for path in checkpoint.parent.glob("step-*.ckpt"))
            raise UserError(
                f"{config.directory} has no checkpoint of step {step}; it has {', '.join(there) or 'none'}. "
                f"Train it with: python -m bench train {config.directory}/config.yaml"
            )
        load_weights(module, checkpoint)
    sampling = Sampling.of(config)
    files = SampleFiles(sampling.directory(config.directory, step), sampling)
    evaluation = EvaluationModule(module, data, files, scorer)
    quiet_lightning()
    trainer = L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy="ddp" if config.trainer.devices * config.trainer.num_nodes > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=config.directory,
    )
    try:
        trainer.test(evaluation, verbose=False)
    except SystemExit:  # Lightning's answer to Ctrl-C and SIGTERM
        raise KeyboardInterrupt from None
    return trainer.world_size, files, evaluation.scores
