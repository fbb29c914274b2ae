"""What every backbone shares: its ends, its bundle, and the one training step.

`DiffusionModule.training_step` is the only training step of the project. Label dropout, noise and guidance live here
and in `samplers.py`, so a backbone is a pure function of (x, t, y).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from models.layers import Block
from models.noise import START, TRAIN, StepNoise, normal, streams, to_device
from models.process import build_process
from models.recipe import Recipe, SamplerConfig
from models.s4d import ssm_parameters
from models.samplers import guided, run_sampler


@dataclass(frozen=True)
class BackboneSpec:
    """The ends of a backbone: what comes in, what goes out, which labels exist."""

    in_channels: int = 4
    latent_size: int = 32  # H = W; image side / 8 behind the Stable Diffusion autoencoder
    num_classes: int = 1000  # 0 = unconditional
    learn_sigma: bool = False  # 2C output channels: eps, then the raw variance values
    null_label: bool = True  # the label table has one row more, index num_classes, for "no class"

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def label_rows(self) -> int:
        """Rows of the label table; 0 for an unconditional backbone."""
        return self.num_classes + self.null_label if self.num_classes else 0


class Backbone(Protocol):
    """x (B,C,H,W), t (B,), y (B,) or None if unconditional -> (B,C,H,W), or (B,2C,H,W) with learn_sigma."""

    spec: BackboneSpec

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor: ...


class Architecture(NamedTuple):
    """One file in `models/` ends in `ARCHITECTURE = Architecture(...)`; the file name is its name."""

    title: str  # as papers print it: DiT, U-ViT, DiffuSSM
    config: type  # frozen dataclass; its `size` fills every field left None
    backbone: type[nn.Module]  # backbone(config, spec)
    module: type[DiffusionModule]
    sizes: Mapping[str, tuple]


class MicroBatch(NamedTuple):
    """What one forward and backward of training saw, without its graph, for whoever watches the training."""

    positions: Tensor  # (B,) int64, as in the batch
    t: Tensor  # (B,) timesteps, of the process's own kind
    losses: dict[str, Tensor]  # (B,) each


class DiffusionModule(L.LightningModule):
    """A backbone with its process, trained by the one shared step.

    Draws of a training sample (timestep, noise, label drop) depend on (seed, position) alone, where position counts
    the samples consumed since step 0: any number of processes, and any resume, trains on the same numbers.
    """

    paper_recipe: ClassVar[Recipe]

    @classmethod
    def recipe_for(cls, config: Any) -> Recipe:
        """The published recipe of this architecture at this size; papers that change it by size override."""
        return cls.paper_recipe

    def __init__(self, backbone: nn.Module, recipe: Recipe, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec: BackboneSpec = backbone.spec  # type: ignore[assignment]
        self.recipe = recipe
        self.seed = seed
        self.process = build_process(recipe.process)
        self.seen: MicroBatch | None = None  # by the last training_step

    def recompute_activations(self) -> None:
        """From now on, compute the activations of blocks again for the gradients: a third more time, less memory.

        Raises: ValueError if the backbone has no blocks that could.
        """
        blocks = [block for block in self.backbone.modules() if isinstance(block, Block)]
        if not blocks:
            raise ValueError(
                f"{type(self.backbone).__name__} cannot recompute activations, for none of its layers is a "
                "models.layers.Block. Leave trainer.activation_checkpointing at false."
            )
        for block in blocks:
            block.recompute = True

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        denoiser, latents, t, eps = self.training_inputs(batch)
        losses = self.process.losses(denoiser, latents, t, eps)  # each (B,)
        self.seen = MicroBatch(batch.positions, t, {name: value.detach() for name, value in losses.items()})
        if self.trainer.loggers:  # those of somebody's own Trainer: three logged values take up to 2 ms of a step
            self.log_dict({f"train/{name}": value.mean() for name, value in self.seen.losses.items()})
        return losses["loss"].mean()

    def training_inputs(self, batch: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Batch -> (denoiser, latents (B,C,H,W), t (B,), eps (B,C,H,W)), labels dropped and bound to the denoiser."""
        device, positions = batch.latents.device, batch.positions.tolist()  # these are on the CPU, so nothing waits
        uniforms, eps = np.empty((len(positions), 2)), np.empty(batch.latents.shape, np.float32)
        for draw, row, generator in zip(uniforms, eps, streams(self.seed, positions, TRAIN), strict=True):
            generator.random(out=draw)
            generator.standard_normal(dtype=np.float32, out=row)
        u_t, u_drop = torch.from_numpy(uniforms).T  # (B,) each, float64
        noise = to_device(torch.from_numpy(eps), device)
        labels = batch.labels if self.spec.num_classes else None
        if labels is not None and self.spec.null_label:
            dropped = to_device(u_drop < self.recipe.label_dropout, device)
            labels = torch.where(dropped, self.spec.num_classes, labels)
        t = to_device(self.process.timesteps(u_t), device)
        return (lambda x, time: self.backbone(x, time, labels)), batch.latents, t, noise

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: the rest, then S4D's A, B, C, dt without weight decay and with their own lr.

        Source: s4 trains them so; DiT's and DiffuSSM's recipes (no decay, lr 1e-4) are unchanged by it.
        """
        optimizer = self.recipe.optimizer
        trainable = [p for p in self.backbone.parameters() if p.requires_grad]
        in_ssm = {id(p) for p in ssm_parameters(self.backbone)}
        ssm = [p for p in trainable if id(p) in in_ssm]
        rest = [p for p in trainable if id(p) not in in_ssm]
        groups = [{"params": rest, "lr": optimizer.lr, "weight_decay": optimizer.weight_decay}]
        if ssm:
            lr = optimizer.lr if optimizer.ssm_lr is None else optimizer.ssm_lr
            groups.append({"params": ssm, "lr": lr, "weight_decay": 0.0})
        return groups

    def configure_optimizers(self) -> Any:
        config = self.recipe.optimizer
        optimizer = torch.optim.AdamW(self.param_groups(), lr=config.lr, betas=config.betas, fused=True)
        warmup = config.warmup_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, k / warmup) if warmup else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- sampling -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        indices: Sequence[int],
        labels: Tensor | None,
        *,
        sampler: SamplerConfig,
        cfg_scale: float = 1.0,
        cfg_channels: str = "all",
        seed: int = 0,
    ) -> Tensor:
        """Latents (len(indices), C, H, W) of the samples `indices`; labels (len(indices),) or None if unconditional.

        Sample i depends on (seed, i) and its label alone. cfg_scale 1 is unguided: eps_u + cfg_scale (eps_c - eps_u).
        """
        shape = (self.spec.in_channels, self.spec.latent_size, self.spec.latent_size)
        x = to_device(normal(seed, indices, shape, START), self.device)
        labels = labels.to(self.device) if labels is not None else None
        denoiser = guided(cast(Backbone, self.backbone), labels, cfg_scale=cfg_scale, cfg_channels=cfg_channels)
        return run_sampler(sampler, self.process, denoiser, x, StepNoise(seed, indices, shape, self.device))
