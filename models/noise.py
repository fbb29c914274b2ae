"""Random numbers that depend on (seed, index) alone.

Sample i of a generated set, or training position i, gets its own Philox stream, drawn on the CPU in float32. The same
numbers come out for any batch size, order, number of processes or device. Philox takes both 64-bit words as its key,
so different seeds never share a stream (torch's CPU generator keeps 32 bits of a seed and would).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# Top word of the Philox counter: streams of one (seed, index) that must not overlap. datamodules/base.py uses 16-18.
TRAIN, LABEL, START, STEP = 0, 1, 2, 3


def philox(seed: int, index: int, stream: int) -> np.random.Generator:
    """The generator of one (seed, index, stream)."""
    return np.random.Generator(np.random.Philox(key=(seed, index), counter=(0, 0, 0, stream)))


def streams(seed: int, indices: Sequence[int], stream: int) -> Iterator[np.random.Generator]:
    """The generator of each index in turn, to be drawn from before the next one is taken.

    It is one generator, set to the beginning of each stream: a new one per index would cost as much as 2,000 draws.
    """
    bits = np.random.Philox(key=(seed, 0), counter=(0, 0, 0, stream))
    generator, state = np.random.Generator(bits), bits.state
    for index in indices:
        state["state"]["key"][1] = index
        bits.state = state
        yield generator


def normal(seed: int, indices: Sequence[int], shape: Sequence[int], stream: int) -> Tensor:
    """One standard normal draw per index -> (len(indices), *shape) float32."""
    eps = np.empty((len(indices), *shape), np.float32)
    for row, generator in zip(eps, streams(seed, indices, stream), strict=True):
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(eps)


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`. A CUDA device is not waited for: what it still has to do goes on meanwhile."""
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def iid_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """Labels uniform and independent per index, as DiT and ADM draw them -> (len(indices),) int64."""
    return torch.tensor([int(generator.integers(num_classes)) for generator in streams(seed, indices, LABEL)])


class StepNoise:
    """The noise of a stochastic sampler: call k gives step k's noise of every sample of the batch.

    Each sample keeps one generator through its steps, so a step's noise does not depend on the rest of the batch.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [philox(seed, int(i), STEP) for i in indices]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        """-> (B, *shape) float32, the next step's noise."""
        noise = np.empty((len(self.generators), *self.shape), np.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        return to_device(torch.from_numpy(noise), self.device)
