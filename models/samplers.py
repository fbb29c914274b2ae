"""Samplers and guidance: from noise to latents with a trained backbone.

`step_noise()` is called once per step that adds noise, and in DDPM's last step, which adds none.
Scalars of a schedule stay on the CPU; only x and the network's time live on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.process import IDDPM, VP, Denoiser, DiffusionProcess, Prediction
from models.recipe import SamplerConfig
from models.schedules import NoiseSchedule, half_log_snr, noise_scale

if TYPE_CHECKING:
    from models.base import Backbone

StepNoise = Callable[[], Tensor]  # -> (B,C,H,W), the next step's noise

EULER_LAST_TIME = 1e-3  # the last Euler step leads from here to 0 (U-ViT)


def guided(backbone: Backbone, labels: Tensor | None, *, cfg_scale: float, cfg_channels: str) -> Denoiser:
    """Classifier-free guidance: eps_u + cfg_scale (eps_c - eps_u), both halves in one forward of 2B samples.

    cfg_channels "3" guides the first three eps channels, as DiT's published samples are made; "all" guides every eps
    channel. The rest, and the variance channels, keep the conditional half. labels (B,) or None if unconditional.
    Scale 1 (U-ViT's 0), or no labels: one plain forward.

    Raises: ValueError for a negative scale, or if the backbone has no null label to guide away from.
    """
    if cfg_scale < 0:
        raise ValueError(f"cfg_scale is {cfg_scale}; it must be at least 0. 1 is unguided.")
    if cfg_channels not in ("3", "all"):
        raise ValueError(f"cfg_channels {cfg_channels!r} is not known. Choose 3 or all.")
    if cfg_scale == 1 or labels is None:
        return lambda x, t: backbone(x, t, labels)
    spec = backbone.spec
    if not (spec.num_classes and spec.null_label):
        raise ValueError(
            f"cfg_scale {cfg_scale} needs a backbone with a null label, and this one has none. Use cfg_scale 1, "
            "or train with recipe.label_dropout above 0."
        )
    if cfg_scale < 1:
        warnings.warn(f"cfg_scale {cfg_scale} weakens the condition: 1 = unguided here.", UserWarning, stacklevel=2)
    both = torch.cat([labels, torch.full_like(labels, spec.num_classes)])  # (2B,)
    channels = spec.in_channels if cfg_channels == "all" else min(3, spec.in_channels)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        conditional, null = backbone(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        eps = null[:, :channels] + cfg_scale * (conditional[:, :channels] - null[:, :channels])
        return torch.cat([eps, conditional[:, channels:]], dim=1)

    return denoiser


@torch.no_grad()
def run_sampler(
    config: SamplerConfig, process: DiffusionProcess, denoiser: Denoiser, x_T: Tensor, step_noise: StepNoise
) -> Tensor:
    """Latents (B,C,H,W) from x_T (B,C,H,W) standard normal.

    Raises: ValueError if the sampler is not defined for the process, or its steps do not fit into the timesteps.
    """
    config.require_process(process.name)
    if isinstance(process, IDDPM) and config.name in ("ddpm", "ddim"):
        short = process.respaced(f"ddim{config.steps}" if config.spacing == "ddim" else str(config.steps))
        return (ddpm if config.name == "ddpm" else ddim)(config, short, denoiser, x_T, step_noise)
    if isinstance(process, VP) and config.name == "euler_maruyama":
        return euler(config, process, denoiser, x_T, step_noise)
    if isinstance(process, VP) and config.name == "euler_ode":
        return euler(config, process, denoiser, x_T, None)
    return (dpm_solver_pp if config.name == "dpm_solver_pp" else dpm_solver)(config, process, denoiser, x_T)


# --- IDDPM: one backbone evaluation per kept timestep ----------------------------------------------------------------


def ddpm(config: SamplerConfig, process: IDDPM, denoiser: Denoiser, x: Tensor, step_noise: StepNoise) -> Tensor:
    """Ancestral sampling (DDPM, algorithm 2), with the process's variance; no noise on the last step."""
    for k in reversed(range(process.num_timesteps)):
        p = _predict(process, denoiser, x, k, config.clip_denoised)
        noise = step_noise()
        x = p.mean + torch.exp(0.5 * p.log_variance) * noise if k > 0 else p.mean
    return x


def ddim(config: SamplerConfig, process: IDDPM, denoiser: Denoiser, x: Tensor, step_noise: StepNoise) -> Tensor:
    """DDIM with noise level eta: 0 deterministic, 1 DDPM-like (DDIM eq. 12 and 16)."""
    for k in reversed(range(process.num_timesteps)):
        noise = step_noise() if config.eta else 0.0
        x = ddim_step(process, denoiser, x, k, k - 1, config.eta, noise, config.clip_denoised)
    return x


def ddim_step(
    process: IDDPM,
    denoiser: Denoiser,
    x: Tensor,
    k: int,
    target: int,
    eta: float = 0.0,
    noise: Tensor | float = 0.0,
    clip_denoised: bool = False,
) -> Tensor:
    """x at timestep k -> x at `target`: k - 1 denoises (-1 is clean); k + 1 encodes, with eta 0."""
    abar, abar_to = _abar(process, k), _abar(process, target)
    latents = _predict(process, denoiser, x, k, clip_denoised).latents
    eps = (x - abar**0.5 * latents) / (1 - abar) ** 0.5  # again, because the latents may have been clipped
    sigma = eta * ((1 - abar_to) / (1 - abar) * (1 - abar / abar_to)) ** 0.5 if eta else 0.0
    return abar_to**0.5 * latents + (1 - abar_to - sigma**2) ** 0.5 * eps + sigma * noise


def _predict(process: IDDPM, denoiser: Denoiser, x: Tensor, k: int, clip_denoised: bool) -> Prediction:
    t = torch.full((len(x),), k, device=x.device)  # (B,)
    output = denoiser(x, process.coefficients(t).network_time.flatten()).float()
    return process.predict(output, x, t, clip_denoised)


def _abar(process: IDDPM, k: int) -> float:
    """abar of timestep k; -1 is clean, one past the last is pure noise."""
    if k < 0:
        return 1.0
    return float(process.abar[k]) if k < process.num_timesteps else 0.0


# --- DPM-Solver: single steps of order 1 to 3 on continuous time ----------------------------------------------------


def solver_orders(steps: int) -> list[int]:
    """Orders of the single steps that together take `steps` evaluations (DPM-Solver, appendix; its "fast" variant)."""
    threes, rest = divmod(steps, 3)
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    return [3] * threes + [rest]


def dpm_solver(config: SamplerConfig, process: DiffusionProcess, denoiser: Denoiser, x: Tensor) -> Tensor:
    """DPM-Solver (Lu et al. 2022): noise prediction, steps uniform in log-SNR, from time 1 to the schedule's end."""
    schedule = process.schedule
    orders = solver_orders(config.steps)
    first, last = (half_log_snr(schedule.log_alpha(torch.tensor(end))) for end in (1.0, schedule.end))
    times = schedule.time(torch.linspace(float(first), float(last), len(orders) + 1))
    fractions: dict[int, tuple[float, ...]] = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}

    def eps(x: Tensor, time: Tensor) -> Tensor:
        return process.eps_at(denoiser, x, time)

    for order, (start, stop) in zip(orders, pairwise(times), strict=True):
        x = _single_step(eps, schedule, x, start, stop, fractions[order], sign=1)
    return x


def dpm_solver_pp(config: SamplerConfig, process: DiffusionProcess, denoiser: Denoiser, x: Tensor) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022b): data prediction, grid uniform in time, a step of order k spans k intervals."""
    schedule = process.schedule
    grid = torch.linspace(1, schedule.end, config.steps + 1)
    half_log_snrs = half_log_snr(schedule.log_alpha(grid))

    def latents(x: Tensor, time: Tensor) -> Tensor:
        log_alpha = schedule.log_alpha(time)
        return (x - noise_scale(log_alpha) * process.eps_at(denoiser, x, time)) / torch.exp(log_alpha)

    start = 0
    for order in solver_orders(config.steps):
        inner = half_log_snrs[start : start + order + 1]
        fractions = ((inner[1:-1] - inner[0]) / (inner[-1] - inner[0])).unbind()
        x = _single_step(latents, schedule, x, grid[start], grid[start + order], fractions, sign=-1)
        start += order
    return x


def _single_step(
    estimate: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x: Tensor,
    start: Tensor,
    stop: Tensor,
    fractions: Sequence[float | Tensor],
    sign: int,
) -> Tensor:
    """x at time `start` -> x at `stop`, of order len(fractions) + 1.

    fractions: where between the two half-log-SNRs `estimate` is also taken. sign +1: it is the noise (DPM-Solver,
    algorithms 1 and 2); -1: the data (DPM-Solver++, the same with signal and noise exchanged).
    """
    log_alpha_start = schedule.log_alpha(start)
    lambda_start = half_log_snr(log_alpha_start)
    h = half_log_snr(schedule.log_alpha(stop)) - lambda_start

    def advance(time: Tensor, fraction: float | Tensor, held: Tensor, slope: Tensor | None = None) -> Tensor:
        """x at `time`: the exact solution for an estimate `held`, growing by `slope` per step in log-SNR."""
        log_alpha = schedule.log_alpha(time)
        m = torch.expm1(sign * fraction * h)
        if sign > 0:
            decay, weight = torch.exp(log_alpha - log_alpha_start), noise_scale(log_alpha)
        else:
            decay, weight = noise_scale(log_alpha) / noise_scale(log_alpha_start), torch.exp(log_alpha)
        out = decay * x - weight * m * held
        return out if slope is None else out - sign * weight * (m / (fraction * h) - sign) * slope

    first = estimate(x, start)
    if not fractions:
        return advance(stop, 1.0, first)
    r1 = fractions[0]
    time1 = schedule.time(lambda_start + r1 * h)
    change = estimate(advance(time1, r1, first), time1) - first
    if len(fractions) == 1:
        return advance(stop, 1.0, first + change / (2 * r1))
    r2 = fractions[1]
    time2 = schedule.time(lambda_start + r2 * h)
    x2 = advance(time2, r2, first, (r2 / r1) * change)
    return advance(stop, 1.0, first, (estimate(x2, time2) - first) / r2)


# --- Euler on the VP-SDE --------------------------------------------------------------------------------------------


def euler(config: SamplerConfig, process: VP, denoiser: Denoiser, x: Tensor, step_noise: StepNoise | None) -> Tensor:
    """Euler-Maruyama on the reverse SDE (Song et al. 2021, eq. 6), or without noise Euler on its ODE (eq. 13).

    Times go evenly from 1 to 1e-3, then to 0; that last step adds no noise.
    """
    schedule = process.schedule
    times = torch.cat([torch.linspace(1, EULER_LAST_TIME, config.steps), torch.zeros(1)])
    for k, (start, stop) in enumerate(pairwise(times)):
        beta = schedule.beta(start)
        score = -process.eps_at(denoiser, x, start) / noise_scale(schedule.log_alpha(start))
        drift = -beta * (0.5 * x + (0.5 if step_noise is None else 1.0) * score)
        x = x + drift * (stop - start)
        if step_noise is not None and k < config.steps - 1:
            x = x + torch.sqrt(beta * (start - stop)) * step_noise()
    return x
