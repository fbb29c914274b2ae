"""Pieces that more than one backbone uses: blocks, timestep and label embedding, sin-cos positions, patches.

Shapes: B batch, C latent channels, H W latent size, P patch, L = HW/P^2 tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FREQUENCIES = 256  # width of the sinusoid before the timestep MLP (DiT, ADM)


class Block(nn.Module):
    """What a backbone repeats. With `recompute`, its activations are computed again for the gradients, not kept."""

    recompute = False

    def __call__(self, *inputs: Tensor) -> Any:
        if self.recompute and torch.is_grad_enabled():
            # A block draws no random numbers, so no generator's state has to be brought back.
            return checkpoint(super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False)
        return super().__call__(*inputs)


def timestep_features(t: Tensor, width: int) -> Tensor:
    """Sinusoid of t (B,), cosines first -> (B, width) float32; a zero column is appended if width is odd.

    t is cast to float32 before anything else: bfloat16 would turn 937 into 936. Base 10000, as in ADM and DiT.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # (B, width/2)
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(features, (0, width % 2))


def sincos_positions(width: int, height: int, columns: int) -> Tensor:
    """2-D sin-cos table (1, height*columns, width) float32, computed in float64; token index = row * columns + column.

    Each token's vector is [sin(c w) | cos(c w) | sin(r w) | cos(r w)], column before row as in DiT's released weights.
    """
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows = torch.arange(height, dtype=torch.float64)[:, None].expand(height, columns).reshape(-1, 1) * omega
    cols = torch.arange(columns, dtype=torch.float64).expand(height, columns).reshape(-1, 1) * omega
    return torch.cat([cols.sin(), cols.cos(), rows.sin(), rows.cos()], dim=-1)[None].float()


class TimestepEmbedder(nn.Module):
    """Timestep (B,) -> (B, D): 256-wide sinusoid, Linear, SiLU, Linear. Keys as in DiT (`mlp.0`, `mlp.2`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_features(t, FREQUENCIES))


class LabelEmbedder(nn.Module):
    """Label (B,) -> (B, D). The null label, if there is one, is the last row. Key as in DiT (`embedding_table`)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def initialize_embedders(t_embedder: TimestepEmbedder, y_embedder: LabelEmbedder | None) -> None:
    """N(0, 0.02) for the timestep MLP's weights and the label table (DiT's released code)."""
    for module in t_embedder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    if y_embedder is not None:
        nn.init.normal_(y_embedder.embedding_table.weight, std=0.02)


def zero_linears(linears: Iterable[nn.Linear]) -> None:
    """Weights and biases 0: adaLN-Zero makes every block start as the identity, the output as 0 (DiT, sec. 3.2)."""
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, D) * (1 + scale) + shift, with shift and scale (B, D) (DiT, adaLN)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def side_in_patches(latent_size: int, patch_size: int) -> int:
    """Patches per row and per column. Raises: ValueError if they do not fill the latent."""
    if latent_size % patch_size:
        raise ValueError(
            f"A latent size of {latent_size} does not divide into patches of {patch_size}. Choose a model.patch_size, "
            f"or a model.size that ends in one, that divides {latent_size}."
        )
    return latent_size // patch_size


def unpatchify(tokens: Tensor, patch_size: int, rows: int, columns: int) -> Tensor:
    """Tokens (B, rows*columns, P*P*C), inside a patch ordered (row, column, channel) -> (B, C, rows*P, columns*P)."""
    b, _, width = tokens.shape
    p, c = patch_size, width // patch_size**2
    x = tokens.view(b, rows, columns, p, p, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * p, columns * p)
