"""How an architecture is trained and sampled: plain dataclasses, no torch.

A `Recipe` is complete: two runs with equal recipe, data, seed and budget train alike. Each architecture owns the
recipe of its paper (`paper_recipe`); `configs/recipe/shared.yaml` gives one to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROCESSES = ("iddpm", "vp", "sd_discrete")
SAMPLERS = {  # sampler -> processes it is defined for
    "ddpm": ("iddpm",),
    "ddim": ("iddpm",),
    "dpm_solver": ("iddpm", "vp", "sd_discrete"),
    "dpm_solver_pp": ("iddpm", "vp", "sd_discrete"),
    "euler_maruyama": ("vp",),  # reverse SDE
    "euler_ode": ("vp",),  # probability-flow ODE
}


def require(value: object, allowed: tuple, key: str) -> None:
    """Raises: ValueError naming the key, the value given and the values allowed."""
    if value not in allowed:
        raise ValueError(f"{key} {value!r} is not known. Choose one of {', '.join(map(str, allowed))}.")


def require_size(size: str, sizes: Mapping[str, Any], title: str) -> None:
    """Raises: ValueError if an architecture has no such named size."""
    if size not in sizes:
        raise ValueError(f"model.size {size!r} is not a {title} size. Choose one of {', '.join(sizes)}.")


def fill_parts(config: Any, named: Mapping[str, Any]) -> None:
    """Give the parts of a frozen `config` that are None the values that its size names."""
    for part, value in named.items():
        if getattr(config, part) is None:
            object.__setattr__(config, part, value)


def require_positive(value: float, key: str) -> None:
    """Raises: ValueError if `value` is not above zero."""
    if not value > 0:
        raise ValueError(f"{key} is {value}; it must be above 0.")


@dataclass(frozen=True)
class ProcessConfig:
    """The forward process, what the backbone predicts, and the loss."""

    name: str = "iddpm"  # iddpm (DiT), vp (U-ViT L: continuous VP-SDE), sd_discrete (U-ViT H: Stable Diffusion betas)
    betas: str = "linear"  # linear | cosine; iddpm only
    num_timesteps: int = 1000
    prediction: str = "eps"  # eps | x0; iddpm only
    variance: str = "learned_range"  # learned_range | fixed_small | fixed_large; iddpm only
    loss: str = "mse"  # mse | rescaled_mse | rescaled_kl; iddpm only

    def __post_init__(self) -> None:
        require(self.name, PROCESSES, "recipe.process.name")
        require(self.betas, ("linear", "cosine"), "recipe.process.betas")
        require(self.prediction, ("eps", "x0"), "recipe.process.prediction")
        require(self.variance, ("learned_range", "fixed_small", "fixed_large"), "recipe.process.variance")
        require(self.loss, ("mse", "rescaled_mse", "rescaled_kl"), "recipe.process.loss")
        require_positive(self.num_timesteps, "recipe.process.num_timesteps")
        if self.name == "iddpm" and self.betas == "linear" and self.num_timesteps <= 20:
            # beta is a share of variance: the noise at 1 leaves no signal, and beyond it the tables are not finite.
            raise ValueError(
                f"recipe.process.num_timesteps is {self.num_timesteps}; with linear betas, whose last is "
                "20 / num_timesteps, it must be above 20 (cosine betas can have fewer)."
            )

    @property
    def learn_sigma(self) -> bool:
        """The backbone also predicts the variance (2C output channels); only IDDPM's loss trains it."""
        return self.name == "iddpm" and self.variance == "learned_range"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the learning rate is constant after a linear warm-up from 0 and never rescaled."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # optimizer steps
    ssm_lr: float | None = None  # own learning rate of S4D's A, B, C, dt; None = lr. S4 suggests at most 1e-3
    grad_clip: float | None = None  # global gradient norm; None = no clipping, as in all three papers

    def __post_init__(self) -> None:
        require_positive(self.lr, "recipe.optimizer.lr")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"recipe.optimizer.betas is {list(self.betas)}; both must lie in [0, 1).")
        for key in ("weight_decay", "warmup_steps"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"recipe.optimizer.{key} is {getattr(self, key)}; it must be at least 0.")
        for key, without in (("ssm_lr", "for that of lr"), ("grad_clip", "for no clipping")):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"recipe.optimizer.{key} is {value}; it must be above 0, or null {without}.")


@dataclass(frozen=True)
class SamplerConfig:
    """How latents are drawn from a trained backbone."""

    name: str = "ddpm"
    steps: int = 250  # backbone evaluations (one guided evaluation counts once here)
    eta: float = 0.0  # ddim only: 0 = deterministic, 1 = DDPM-like noise
    spacing: str = "even"  # ddpm and ddim only. even: IDDPM's "250"; ddim: IDDPM's "ddim250" (constant integer stride)
    clip_denoised: bool = False  # ddpm and ddim only: clip the data estimate to [-1, 1]; never for latents

    def __post_init__(self) -> None:
        require(self.name, tuple(SAMPLERS), "sampler.name")
        require(self.spacing, ("even", "ddim"), "sampler.spacing")
        require_positive(self.steps, "sampler.steps")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta is {self.eta}; it must lie in [0, 1].")
        ancestral = self.name in ("ddpm", "ddim")
        for key, ignored, readers in (
            ("eta", self.eta != 0 and self.name != "ddim", "ddim"),
            ("spacing", self.spacing != "even" and not ancestral, "ddpm and ddim"),
            ("clip_denoised", self.clip_denoised and not ancestral, "ddpm and ddim"),
        ):
            if ignored:
                raise ValueError(f"sampler.{key} is {getattr(self, key)}, but {self.name} ignores it; use {readers}.")

    def require_process(self, process: str) -> None:
        """Raises: ValueError if this sampler is not defined for the process of that name."""
        if process not in SAMPLERS[self.name]:
            allowed = ", ".join(name for name, processes in SAMPLERS.items() if process in processes)
            raise ValueError(
                f"sampler.name {self.name!r} cannot serve the process {process!r}. Choose one of {allowed}."
            )


@dataclass(frozen=True)
class Recipe:
    """Everything about training and sampling that is not backbone, data, seed or budget."""

    process: ProcessConfig = field(default_factory=ProcessConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch_size: int = 256  # global, images per optimizer step
    ema_decay: float = 0.9999  # per optimizer step
    ema_warmup: bool = False  # decay min(ema_decay, (1 + step) / (10 + step)); for runs of a few thousand steps
    label_dropout: float = 0.1  # probability of the null label in training
    cfg_channels: str = "all"  # latent channels that guidance acts on: 3 (DiT, as published) | all

    def __post_init__(self) -> None:
        require(self.cfg_channels, ("3", "all"), "recipe.cfg_channels")
        require_positive(self.batch_size, "recipe.batch_size")
        for key in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"recipe.{key} is {getattr(self, key)}; it must lie in [0, 1).")
