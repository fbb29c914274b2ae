"""How far a score would move with another draw of generated samples: the delete-a-group jackknife.

The samples are dealt into G = 10 groups of equal size (up to one); a score is computed G times more, each time without
one group. From the spread of these replicates s_g,

    variance = (G - 1) / G * sum_g (s_g - mean)^2,    half width = t_{0.975, G - 1} * sqrt(variance).

The interval covers the sampling of the generated set: where the score of other sets of the same size, drawn from the
same checkpoint, would lie on average. It does not cover the training seed, the choice of reference images, or the bias
that a score has at a given sample count (a Frechet distance is too high for few samples, an inception score too low).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.errors import UserError
from bench.metrics import Score

GROUPS = 10
# 97.5 % quantiles of Student's t with 1, 2, ... 9 degrees of freedom.
T_QUANTILES = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


def jackknife_groups(num_samples: int) -> Tensor:
    """The group 0..G-1 of each sample index -> (num_samples,) int64; G is 10, or `num_samples` where that is smaller.

    A fixed permutation deals them out. `index % 10` would not do: with labels that go round by index, as in balanced
    sets of ten classes, every group would be one class.
    """
    order = np.random.Generator(np.random.Philox(key=(0, num_samples))).permutation(num_samples)
    return torch.from_numpy(order) % min(GROUPS, num_samples)


def score(values: Tensor) -> Score:
    """The score of all samples, followed by the scores without each group, (1 + G,) float64 -> value and interval.

    Raises: UserError if any of them is not finite.
    """
    if not torch.isfinite(values).all():
        raise UserError(
            f"A score is not finite ({values.tolist()}): the features overflow. Check the generated images."
        )
    replicates = values[1:]
    groups = len(replicates)
    variance = (groups - 1) / groups * (replicates - replicates.mean()).square().sum()
    return Score(float(values[0]), T_QUANTILES[groups - 2] * float(variance.sqrt()))
