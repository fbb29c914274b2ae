"""Kernel inception distance (Binkowski et al. 2018): the squared maximum mean discrepancy of two sets of features.

The kernel is ((x . y) / d + 1)^3 and the estimate is unbiased (Gretton et al. 2012, eq. 3):

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

The means run over all rows. Published code averages over random subsets of 100 or 1000 rows, which saves time for large
sets; its expectation is the same, its variance larger, and its value depends on the subsets drawn. Everything is
float64.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bench.errors import UserError
from bench.metrics.base import BLOCK, RowMetric


class KernelDistance(RowMetric):
    """Unbiased squared MMD between the samples and the reference rows (m, d), by the cubic kernel, over all rows.

    Near 0 for equal distributions, where it can be negative. It has no bias in the number of samples, unlike a Frechet
    distance. Kernel sums by pairs of jackknife groups give the score and its replicates in one pass, in tiles of
    BLOCK x BLOCK rows.

    Raises: UserError for fewer than 2 reference rows or 3 samples (the interval leaves some out).

    >>> import torch
    >>> from bench.metrics.kernel_distance import KernelDistance
    >>> metric = KernelDistance(torch.zeros(4, 2), num_samples=3)  # k = 1 wherever a reference row takes part
    >>> metric.update(torch.ones(3, 2), indices=torch.arange(3))  # k = ((1 + 1) / 2 + 1)^3 = 8 between samples
    >>> metric.compute()
    Score(value=7.0, ci95=0.0)
    """

    higher_is_better = False
    reference: Tensor

    def __init__(self, reference: Tensor, num_samples: int) -> None:
        super().__init__(reference.shape[1], num_samples, at_least=3)
        if len(reference) < 2:
            raise UserError(f"A kernel distance needs at least 2 reference rows, got {len(reference)}.")
        self.register_buffer("reference", reference, persistent=False)

    def _values(self) -> Tensor:
        rows, m = self._sorted_rows(), len(self.reference)  # (n, d)
        members = one_hot(self.groups, self.num_groups).double()  # (n, G)
        everyone = torch.ones((m, 1), dtype=torch.float64, device=self.device)
        between = _sums(self.reference, everyone) / (m * (m - 1))  # (1, 1)
        samples = _sums(rows, members)  # (G, G)
        crossed = _crossed_sums(rows, members, self.reference)  # (G,)
        values = []
        for group in self._left_out():
            kept = torch.ones(self.num_groups, dtype=torch.float64, device=self.device)
            if group is not None:
                kept[group] = 0
            n = kept @ members.sum(0)
            values.append(kept @ samples @ kept / (n * (n - 1)) + between.sum() - 2 * (kept @ crossed) / (n * m))
        return torch.stack(values)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(A, d) and (B, d) -> (A, B)."""
    return (a.double() @ b.double().T).div_(a.shape[1]).add_(1).pow_(3)


def _sums(rows: Tensor, members: Tensor) -> Tensor:
    """Sums of k(x_i, x_j), i != j, for i and j of each pair of groups; (n, d), members (n, G) of 0 and 1 -> (G, G)."""
    total = members.new_zeros((members.shape[1], members.shape[1]))
    for i, j in combinations_with_replacement(range(0, len(rows), BLOCK), 2):
        here, there = slice(i, i + BLOCK), slice(j, j + BLOCK)
        kernel = _kernel(rows[here], rows[there])
        if i == j:
            kernel.fill_diagonal_(0)
        sums = members[here].T @ kernel @ members[there]
        total += sums if i == j else sums + sums.T
    return total


def _crossed_sums(rows: Tensor, members: Tensor, reference: Tensor) -> Tensor:
    """Sums of k(x_i, y_j) over all j and over the i of each group -> (G,)."""
    total = members.new_zeros(members.shape[1])
    for block, member in zip(rows.split(BLOCK), members.split(BLOCK), strict=True):
        for part in reference.split(BLOCK):
            total += member.T @ _kernel(block, part).sum(1)
    return total
