"""The training loss by timestep: one number hides that little is learnt near the data and much near the noise."""

from __future__ import annotations

import torch
from torch import Tensor

from models.base import MicroBatch
from models.process import DiffusionProcess

BUCKETS = 4


class LossByTime:
    """Mean loss in equal ranges of the timesteps, bucket 0 nearest the data, since it was last reset.

    Sums stay on the device and in float64; nothing is waited for until they are read.
    """

    def __init__(self, process: DiffusionProcess, device: torch.device) -> None:
        inner = torch.arange(1, BUCKETS, dtype=torch.float64) / BUCKETS
        self.edges = process.timesteps(inner).to(device)  # (BUCKETS - 1,), of the process's own kind
        self.sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=device)  # losses, samples

    def add(self, part: MicroBatch) -> None:
        losses = part.losses["loss"].double()
        bucket = torch.bucketize(part.t, self.edges, right=True)  # (B,)
        self.sums.index_add_(1, bucket, torch.stack([losses, torch.ones_like(losses)]))

    def reset(self) -> None:
        self.sums.zero_()


def means(sums: Tensor) -> dict[str, float]:
    """Sums (2, BUCKETS) of losses and samples -> mean loss by name; a bucket without samples is left out."""
    return {f"train/loss_t{k}": total / n for k, (total, n) in enumerate(sums.T.tolist()) if n}
