"""Random numbers that depend on (seed, index) alone.

Sample i of a generated set, or training position i, gets its own Philox stream, drawn on the CPU in float32. The same
numbers come out for any batch size, order, number of processes or device. Philox takes both 64-bit words as its key,
so different seeds never share a stream (torch's CPU generator keeps 32 bits of a seed and would).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Top word of the Philox counter: streams of one (seed, index) that must not overlap. datamodules/base.py uses 16-17.
TRAIN, LABEL, START, STEP = 0, 1, 2, 3


def philox(seed: int, index: int, stream: int) -> np.random.Generator:
    """The generator of one (seed, index, stream)."""
    return np.random.Generator(np.random.Philox(key=(seed, index), counter=(0, 0, 0, stream)))


def normal(seed: int, indices: Sequence[int], shape: Sequence[int], stream: int) -> Tensor:
    """One standard normal draw per index -> (len(indices), *shape) float32."""
    rows = [philox(seed, int(i), stream).standard_normal(shape, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A copy on `device`, for which a CUDA device is not waited: what it still has to do goes on meanwhile."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def iid_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """Labels uniform and independent per index, as DiT and ADM draw them -> (len(indices),) int64."""
    return torch.tensor([int(philox(seed, int(i), LABEL).integers(num_classes)) for i in indices])


class StepNoise:
    """The noise of a stochastic sampler: call k gives step k's noise of every sample of the batch.

    Each sample keeps one generator through its steps, so a step's noise does not depend on the rest of the batch.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [philox(seed, int(i), STEP) for i in indices]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        """-> (B, *shape) float32, the next step's noise."""
        rows = [g.standard_normal(self.shape, dtype=np.float32) for g in self.generators]
        return to_device(torch.from_numpy(np.stack(rows)), self.device)
