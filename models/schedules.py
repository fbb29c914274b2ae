"""Noise schedules: betas, the timesteps a shorter sampler keeps, and continuous time for the solvers.

abar is the squared signal scale: the variance of the noise in x_t is 1 - abar; alpha = sqrt(abar).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


def linear_betas(count: int) -> Tensor:
    """1e-4 to 0.02 over 1000 steps, the ends scaled by 1000/count otherwise (DDPM, IDDPM) -> (count,) float64."""
    scale = 1000 / count
    return torch.linspace(scale * 1e-4, scale * 0.02, count, dtype=torch.float64)


def cosine_betas(count: int) -> Tensor:
    """abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), beta at most 0.999 (IDDPM eq. 17) -> (count,) float64."""
    u = torch.arange(count + 1, dtype=torch.float64) / count
    abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def kept_timesteps(count: int, spacing: str) -> list[int]:
    """The timesteps of `count` that a shorter sampler visits, ascending (IDDPM sec. 4, DDIM sec. 4.2).

    "n": n steps spread evenly from first to last; "ddimN": the constant integer stride that gives N steps; "a,b,c":
    the range in equal sections, with so many steps in each.

    Raises: ValueError if there is no such stride, or a section has fewer timesteps than are asked of it.
    """
    if spacing.startswith("ddim"):
        wanted = int(spacing.removeprefix("ddim"))
        for kept in (range(0, count, stride) for stride in range(1, count + 1)):
            if len(kept) == wanted:
                return list(kept)
        raise ValueError(
            f"No integer stride through {count} timesteps gives {wanted} steps. Use sampler.spacing: even."
        )
    sections = [int(part) for part in spacing.split(",")]
    steps: list[int] = []
    start = 0
    for i, wanted in enumerate(sections):
        size = count // len(sections) + (i < count % len(sections))
        if not 1 <= wanted <= size:
            raise ValueError(f"Cannot take {wanted} steps out of {size} timesteps. Set sampler.steps to 1 to {size}.")
        stride = (size - 1) / (wanted - 1) if wanted > 1 else 1.0
        position = 0.0
        for _ in range(wanted):
            steps.append(start + round(position))  # summed up and rounded half to even: the order of IDDPM's arithmetic
            position += stride
        start += size
    return steps


# --- continuous time ------------------------------------------------------------------------------------------------


class NoiseSchedule(Protocol):
    """Signal and noise over continuous time in (0, 1], in float32 as the published solvers compute it."""

    end: float  # time at which a solver stops

    def log_alpha(self, time: Tensor) -> Tensor: ...  # ln of the signal scale, 0.5 ln abar

    def time(self, half_log_snr: Tensor) -> Tensor: ...  # inverse of half_log_snr(log_alpha(time))


def half_log_snr(log_alpha: Tensor) -> Tensor:
    """lambda = ln(signal / noise) of DPM-Solver, from the logarithm of the signal scale.

    Kept in the form the published solver uses, in float32: near t = 0 its cancellation moves the last grid point, and
    an exact evaluation would change published samples by up to 0.3 % of their range at ten steps.
    """
    return log_alpha - 0.5 * torch.log(1 - torch.exp(2 * log_alpha))


def noise_scale(log_alpha: Tensor) -> Tensor:
    """sqrt(1 - abar)."""
    return torch.sqrt(1 - torch.exp(2 * log_alpha))


class LinearSchedule:
    """VP-SDE with beta(t) = 0.1 + 19.9 t on [0, 1] (Song et al. 2021, appendix C)."""

    beta_0, beta_1 = 0.1, 20.0
    end = 1e-4

    def beta(self, time: Tensor) -> Tensor:
        return self.beta_0 + (self.beta_1 - self.beta_0) * time

    def log_alpha(self, time: Tensor) -> Tensor:
        return -(time**2) * (self.beta_1 - self.beta_0) / 4 - time * self.beta_0 / 2

    def time(self, half_log_snr: Tensor) -> Tensor:
        slope = self.beta_1 - self.beta_0
        excess = 2 * slope * torch.logaddexp(-2 * half_log_snr, torch.zeros(()))  # -4 slope log_alpha
        return excess / (torch.sqrt(self.beta_0**2 + excess) + self.beta_0) / slope  # root without cancellation


class DiscreteSchedule:
    """betas (N,) of times 1/N, 2/N, ..., 1; in between and beyond, ln(alpha) is linear in time (DPM-Solver).

    Summed up in float32 like the published solver's table.
    """

    def __init__(self, betas: Tensor) -> None:
        self.end = 1 / len(betas)
        self.times = torch.arange(1, len(betas) + 1) / len(betas)
        self.log_alphas = 0.5 * torch.log(1 - betas.float()).cumsum(0)

    def log_alpha(self, time: Tensor) -> Tensor:
        return _interpolate(time, self.times, self.log_alphas)

    def time(self, half_log_snr: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.logaddexp(torch.zeros(()), -2 * half_log_snr)
        return _interpolate(log_alpha, self.log_alphas.flip(0), self.times.flip(0))


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs ascending; the outermost pieces go on beyond the ends."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    return ys[left] + (x - xs[left]) * (ys[right] - ys[left]) / (xs[right] - xs[left])
