"""How far the EMA weights are while they train: grids of samples and quick scores, which change nothing of the run.

Both are drawn as the run's protocol says, grids always from the same noise. Quick scores stand in metrics.jsonl alone.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from bench.config import RunConfig
from bench.console import say
from bench.errors import UserError
from bench.evaluate import SampledImages, draw, scorer_of
from bench.files import atomic_write
from bench.prepare import Data
from bench.scoring.looking import grid
from bench.scoring.passes import FeatureBlocks, require_enough_blocks, run_pass
from bench.scoring.samples import SampleFiles, Sampling
from bench.tracking import Mirror
from bench.training.callbacks import EMA, StepCallback, TrainingLog
from models.base import BackboneSpec, DiffusionModule

GRID_CLASSES = 8  # shown, evenly spread over those of the data
GRID_COUNT = 4  # samples of each


class Watch(StepCallback):
    """Every `trainer.grid_every` steps a grid in grids/, every `trainer.score_every` a quick score.

    Scores share their samples out over processes, by the code of `evaluate`. A grid is drawn by the first process
    alone; the others wait for it in the next step.
    """

    def __init__(
        self, config: RunConfig, spec: BackboneSpec, data: Data, ema: EMA, log: TrainingLog, mirror: Mirror
    ) -> None:
        """Raises: UserError, before any training, for a protocol under which this run cannot be sampled or scored."""
        self.config, self.data, self.ema, self.lines, self.mirror = config, data, ema, log, mirror
        machine = config.trainer
        self.sampling = Sampling.of(replace(config, eval=replace(config.eval, num_samples=machine.score_samples)))
        if spec.num_classes and not spec.null_label and self.sampling.cfg_scale != 1:
            raise UserError(
                f"eval.cfg_scale is {self.sampling.cfg_scale:g}, but without recipe.label_dropout there is no null "
                "label to guide by. Set eval.cfg_scale=1, or trainer.grid_every=0 and trainer.score_every=0."
            )
        self.scorer = None
        if machine.score_every:
            require_enough_blocks(self.sampling.blocks(), machine.score_samples, machine.devices * machine.num_nodes)
            self.scorer = scorer_of(config)

    def on_step_end(self, trainer: L.Trainer, step: int) -> None:
        machine = self.config.trainer
        if self.lines.guard.signum or self.lines.guard.late:  # the checkpoint that was asked for comes first
            return
        wants_grid = machine.grid_every and step % machine.grid_every == 0 and trainer.is_global_zero
        wants_score = machine.score_every and step % machine.score_every == 0
        if wants_grid or wants_score:
            with self.lines.paused(), isolate_rng():
                module = deepcopy(self.ema.average).eval()  # the pass takes it along, to the CPU in the end
                if wants_grid:
                    self._grid(module, step)
                if wants_score:
                    self._score(module, step)

    def _grid(self, module: DiffusionModule, step: int) -> None:
        """Rows of classes, or of any samples; column c of all classes starts from the noise of sample c."""
        classes, device = module.spec.num_classes, module.device
        if classes:
            shown = min(GRID_CLASSES, classes)
            labels = torch.tensor([k * classes // shown for k in range(shown)]).repeat_interleave(GRID_COUNT)
            indices = list(range(GRID_COUNT)) * shown
        else:
            labels, indices = None, list(range(GRID_CLASSES * GRID_COUNT))
        self.data.autoencoder.to(device)
        images = draw(module, self.data.autoencoder, self.sampling, indices, labels).cpu()
        path = self.config.directory / "grids" / f"step-{step:08d}.png"
        with atomic_write(path, "wb") as file:
            grid(list(images), GRID_COUNT).save(file, format="PNG")
        self.mirror.log_image("grid", path, step=step)

    def _score(self, module: DiffusionModule, step: int) -> None:
        """As `evaluate` does, with samples and features that are kept only while they are needed."""
        directory = self.config.directory / "quick" / f"step-{step:08d}"
        source = SampledImages(module, self.data.autoencoder, SampleFiles(directory, self.sampling))
        _, scores = run_pass(source, self.scorer, self.config.trainer, FeatureBlocks(directory, self.scorer))
        self.lines.record(step, {f"quick/{column}": score.value for column, score in scores.items()})
        say(f"  step {step}: " + ", ".join(f"{name} {s.value:.4g} ± {s.ci95:.2g}" for name, s in scores.items()))
        if self.lines.writes:
            shutil.rmtree(directory.parent, ignore_errors=True)
