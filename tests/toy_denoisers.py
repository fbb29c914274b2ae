"""The denoisers behind the golden losses and samples, and one that is optimal for Gaussian latents."""

from __future__ import annotations

import torch
from torch import Tensor


def toy_eps(x: Tensor, t: Tensor) -> Tensor:
    """x (B,C,H,W), t (B,) as the network sees it -> (B,C,H,W)."""
    return 0.6 * x + 0.3 * torch.sin(2 * x + t.float()[:, None, None, None] / 250)


def toy_eps_and_variance(x: Tensor, t: Tensor) -> Tensor:
    """-> (B,2C,H,W): noise, then raw variance values."""
    return torch.cat([toy_eps(x, t), torch.cos(1.5 * x - t.float()[:, None, None, None] / 400)], dim=1)


def gaussian_eps(x: Tensor, abar: Tensor | float, mean: float, std: float) -> Tensor:
    """E[eps | x_t = x] for latents N(mean, std^2) per element; abar broadcasts against x."""
    abar = torch.as_tensor(abar, dtype=torch.float64)
    variance = abar * std**2 + 1 - abar
    return ((1 - abar).sqrt() * (x.double() - abar.sqrt() * mean) / variance).float()
