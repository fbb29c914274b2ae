"""Forward processes: how latents are noised, what the backbone sees as time, and the loss.

Three of them: IDDPM (Nichol and Dhariwal 2021; DiT trains with it), the continuous VP-SDE (Song et al. 2021; U-ViT's
pixel and latent L models) and Stable Diffusion's discrete betas (U-ViT's latent H models). A process is a plain object
without parameters, so nothing of it enters a checkpoint. Schedules are float64 on the CPU; coefficients are looked up
and used as float32.

Shapes: B batch, C latent channels, H W latent size, T timesteps. abar is the squared signal scale: the variance of the
noise in x_t is 1 - abar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.recipe import ProcessConfig
from models.schedules import BETAS, DiscreteSchedule, LinearSchedule, NoiseSchedule, kept_timesteps, noise_scale

Denoiser = Callable[[Tensor, Tensor], Tensor]  # x (B,C,H,W), time as the network sees it (B,) -> (B, C or 2C, H, W)

DECODER_HALF_BIN = 1 / 255  # half of an 8-bit level on [-1, 1]; IDDPM and DiT use it on latents as well
DECODER_EDGE = 0.999  # beyond it the outermost bins reach to infinity
CLAMP = 1e-12  # smallest probability whose logarithm is taken


class DiffusionProcess(Protocol):
    """What training and samplers need of a process; `t` (B,) is its own kind of timestep."""

    name: str
    num_timesteps: int
    learn_sigma: bool

    @property
    def schedule(self) -> NoiseSchedule:
        """Its signal and noise over continuous time."""

    def timesteps(self, u: Tensor) -> Tensor:
        """u (B,) float64, uniform in [0, 1) -> t (B,)."""

    def q_sample(self, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t (B,C,H,W): the latents with noise eps (B,C,H,W) at timestep t."""

    def losses(self, denoiser: Denoiser, latents: Tensor, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Per sample (B,); "loss" is the one to optimize, the others are its parts."""

    def eps_at(self, denoiser: Denoiser, x: Tensor, time: Tensor) -> Tensor:
        """Predicted noise (B,C,H,W) at one continuous time in (0, 1], a scalar on the CPU."""


def build_process(config: ProcessConfig) -> DiffusionProcess:
    """Raises: ValueError if a setting that only iddpm reads is changed for another process."""
    if config.name == "iddpm":
        return IDDPM(config)
    if config != ProcessConfig(name=config.name, num_timesteps=config.num_timesteps):
        raise ValueError(
            f"recipe.process.name {config.name!r} has fixed betas and predicts eps with an unweighted loss. "
            "Leave betas, prediction, variance and loss at their defaults, or choose iddpm."
        )
    return VP(config.num_timesteps) if config.name == "vp" else SDDiscrete(config.num_timesteps)


class _Lookup:
    """Rows of K float64 tables (T,): t (B,) -> K float32 tensors (B,1,1,1) on the device of t."""

    def __init__(self, *tables: Tensor) -> None:
        self.tables = torch.stack(tables).float()  # (K, T)
        self.copies: dict[torch.device, Tensor] = {}

    def __call__(self, t: Tensor) -> tuple[Tensor, ...]:
        if t.device not in self.copies:
            self.copies[t.device] = self.tables.to(t.device)
        return self.copies[t.device][:, t][..., None, None, None].unbind(0)


# --- IDDPM ----------------------------------------------------------------------------------------------------------


class Coefficients(NamedTuple):
    """What the formulas need of a timestep: whole tables (T,) float64, or looked up (B,1,1,1) float32."""

    network_time: Tensor
    signal: Tensor  # sqrt(abar)
    noise: Tensor  # sqrt(1 - abar)
    recip_signal: Tensor  # sqrt(1 / abar)
    recip_noise: Tensor  # sqrt(1 / abar - 1)
    mean_latents: Tensor  # weights of latents and x_t in the posterior mean, IDDPM eq. 11
    mean_x: Tensor
    log_variance_small: Tensor  # posterior variance; entry 0 repeats entry 1, for its own would be ln 0
    log_variance_large: Tensor  # beta; entry 0 as above
    log_beta: Tensor


class Prediction(NamedTuple):
    """The backbone's p(x_{t-1} | x_t)."""

    mean: Tensor  # (B,C,H,W)
    log_variance: Tensor  # (B,C,H,W), or (B,1,1,1) if fixed
    latents: Tensor  # (B,C,H,W), estimate of the clean latents


class IDDPM:
    """Discrete process, t in 0..T-1; with `spacing` a shorter one whose network still sees the original timestep."""

    name = "iddpm"

    def __init__(self, config: ProcessConfig, spacing: str = "") -> None:
        self.config = config
        self.learn_sigma = config.learn_sigma
        betas = BETAS[config.betas](config.num_timesteps)
        kept = kept_timesteps(len(betas), spacing) if spacing else list(range(len(betas)))
        if spacing:
            abar = torch.cumprod(1 - betas, 0)[kept]
            betas = 1 - abar / _previous(abar)
        self.num_timesteps = len(betas)
        self.betas, self.abar = betas, torch.cumprod(1 - betas, 0)  # (T,) float64, as are all tables
        self.abar_previous = _previous(self.abar)
        self.posterior_variance = betas * (1 - self.abar_previous) / (1 - self.abar)  # IDDPM eq. 10
        first = self.posterior_variance[1:2] if len(betas) > 1 else self.posterior_variance
        self.tables = Coefficients(
            network_time=torch.tensor(kept, dtype=torch.float64),
            signal=self.abar.sqrt(),
            noise=(1 - self.abar).sqrt(),
            recip_signal=(1 / self.abar).sqrt(),
            recip_noise=(1 / self.abar - 1).sqrt(),
            mean_latents=betas * self.abar_previous.sqrt() / (1 - self.abar),
            mean_x=(1 - self.abar_previous) * (1 - betas).sqrt() / (1 - self.abar),
            log_variance_small=torch.cat([first, self.posterior_variance[1:]]).log(),
            log_variance_large=torch.cat([first, betas[1:]]).log(),
            log_beta=betas.log(),
        )
        self.lookup = _Lookup(*self.tables)
        self.schedule = DiscreteSchedule(betas)

    def respaced(self, spacing: str) -> IDDPM:
        """The same process on fewer timesteps; `spacing` as in `kept_timesteps`."""
        return IDDPM(self.config, spacing)

    def timesteps(self, u: Tensor) -> Tensor:
        return (u * self.num_timesteps).long()

    def coefficients(self, t: Tensor) -> Coefficients:
        return Coefficients(*self.lookup(t))

    def q_sample(self, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        c = self.coefficients(t)
        return c.signal * latents + c.noise * eps

    def posterior(self, latents: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """q(x_{t-1} | x_t, latents): mean (B,C,H,W), log-variance (B,1,1,1)."""
        c = self.coefficients(t)
        return c.mean_latents * latents + c.mean_x * x, c.log_variance_small

    def predict(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool = False) -> Prediction:
        """What the backbone's output (B, C or 2C, H, W) at x_t = x says about x_{t-1}; sampling and loss share it."""
        c = self.coefficients(t)
        value = output[:, : x.shape[1]]
        latents = c.recip_signal * x - c.recip_noise * value if self.config.prediction == "eps" else value
        if clip_denoised:
            latents = latents.clamp(-1, 1)
        if self.learn_sigma:
            fraction = (output[:, x.shape[1] :] + 1) / 2  # unbounded; IDDPM eq. 15
            log_variance = fraction * c.log_beta + (1 - fraction) * c.log_variance_small
        else:
            log_variance = c.log_variance_small if self.config.variance == "fixed_small" else c.log_variance_large
        return Prediction(c.mean_latents * latents + c.mean_x * x, log_variance, latents)

    def losses(self, denoiser: Denoiser, latents: Tensor, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """L_simple, plus the variational bound of the learned variance (IDDPM eq. 16, weight 1 as in DiT).

        rescaled_mse weighs the bound with T/1000 instead, rescaled_kl is T times the bound alone.
        """
        x = self.q_sample(latents, t, eps)
        output = denoiser(x, self.coefficients(t).network_time.flatten()).float()
        if self.config.loss == "rescaled_kl":
            return {"loss": self.num_timesteps * self.bound(output, latents, x, t)}
        channels = latents.shape[1]
        target = eps if self.config.prediction == "eps" else latents
        mse = _mean_flat((target - output[:, :channels]) ** 2)
        if not self.learn_sigma:
            return {"loss": mse, "mse": mse}
        frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1)  # the bound trains no mean
        vb = self.bound(frozen, latents, x, t)
        if self.config.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def bound(self, output: Tensor, latents: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """One term of the variational bound in bits per dimension (B,): KL for t > 0, decoder likelihood for t = 0."""
        true_mean, true_log_variance = self.posterior(latents, x, t)
        p = self.predict(output, x, t)
        kl = 0.5 * (
            -1
            + p.log_variance
            - true_log_variance
            + torch.exp(true_log_variance - p.log_variance)
            + (true_mean - p.mean) ** 2 * torch.exp(-p.log_variance)
        )
        nll = -_decoder_log_likelihood(latents, p.mean, 0.5 * p.log_variance)
        return torch.where(t == 0, _mean_flat(nll), _mean_flat(kl)) / math.log(2)

    def eps_at(self, denoiser: Denoiser, x: Tensor, time: Tensor) -> Tensor:
        """Timestep t lies at time (t + 1) / T; between timesteps the network sees a fractional one."""
        value = denoiser(x, _fill(x, time * self.num_timesteps - 1)).float()[:, : x.shape[1]]
        if self.config.prediction == "eps":
            return value
        log_alpha = self.schedule.log_alpha(time)
        return (x - torch.exp(log_alpha) * value) / noise_scale(log_alpha)


def _previous(abar: Tensor) -> Tensor:
    return torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])


def _mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _fill(x: Tensor, value: Tensor) -> Tensor:
    return torch.full((len(x),), float(value), device=x.device)


def _decoder_log_likelihood(latents: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """ln of the probability a Gaussian gives to the 8-bit bin around each element (DDPM eq. 13), elementwise."""
    centred, inverse = latents - mean, torch.exp(-log_scale)
    below = _normal_cdf(inverse * (centred + DECODER_HALF_BIN))
    above = _normal_cdf(inverse * (centred - DECODER_HALF_BIN))
    inside = torch.where(latents > DECODER_EDGE, 1 - above, below - above)
    return torch.where(latents < -DECODER_EDGE, below, inside).clamp(min=CLAMP).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation IDDPM uses; at most 2e-4 off."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# --- processes of U-ViT ---------------------------------------------------------------------------------------------


class VP:
    """Continuous VP-SDE, t in [0, 1]; the network sees t * (T - 1), that is 999 t."""

    name = "vp"
    learn_sigma = False

    def __init__(self, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        self.schedule = LinearSchedule()

    def timesteps(self, u: Tensor) -> Tensor:
        return u.float()

    def q_sample(self, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        abar = torch.exp(2 * self.schedule.log_alpha(t))[:, None, None, None]
        return abar.sqrt() * latents + (1 - abar).sqrt() * eps

    def losses(self, denoiser: Denoiser, latents: Tensor, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        output = denoiser(self.q_sample(latents, t, eps), t * (self.num_timesteps - 1)).float()
        return {"loss": _mean_flat((eps - output) ** 2)}

    def eps_at(self, denoiser: Denoiser, x: Tensor, time: Tensor) -> Tensor:
        return denoiser(x, _fill(x, time * (self.num_timesteps - 1))).float()


class SDDiscrete:
    """Stable Diffusion's betas, t in 1..T (0 would be clean); the network sees t itself, and T * time in a solver."""

    name = "sd_discrete"
    learn_sigma = False

    def __init__(self, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        self.betas = torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64) ** 2  # of t = 1..T
        self.abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - self.betas, 0)])  # of t = 0..T
        self.lookup = _Lookup(self.abar.sqrt(), (1 - self.abar).sqrt())
        self.schedule = DiscreteSchedule(self.betas)

    def timesteps(self, u: Tensor) -> Tensor:
        return (u * self.num_timesteps).long() + 1

    def q_sample(self, latents: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        signal, noise = self.lookup(t)
        return signal * latents + noise * eps

    def losses(self, denoiser: Denoiser, latents: Tensor, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        output = denoiser(self.q_sample(latents, t, eps), t.float()).float()
        return {"loss": _mean_flat((eps - output) ** 2)}

    def eps_at(self, denoiser: Denoiser, x: Tensor, time: Tensor) -> Tensor:
        return denoiser(x, _fill(x, time * self.num_timesteps)).float()
