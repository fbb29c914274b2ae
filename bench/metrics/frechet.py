"""Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6): fid on pooled features, sfid on spatial ones.

    |mu - mu_r|^2 + tr S + tr S_r - 2 tr (S_r S)^(1/2)

Covariances divide by n - 1. With S_r = F F^T the last trace is the sum of the square roots of the eigenvalues of
F^T S F, or, from n centred rows X, of the n x n matrix X F F^T X^T / (n - 1). Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.errors import UserError
from bench.metrics.base import BLOCK, RowMetric, SampleMetric

ROWS_PER_DIM = 2  # samples per feature dimension below which an extrapolated distance is mostly the next order's bias


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean mu (d,) and covariance sigma (d, d) of a feature, float64.

    Raises: UserError for other shapes or dtypes, or numbers that are not finite.
    """

    mu: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.mu.shape), tuple(self.sigma.shape)
        if self.mu.ndim != 1 or shapes[1] != shapes[0] * 2:
            raise UserError(f"Moments are mu (d,) and sigma (d, d), got {shapes[0]} and {shapes[1]}.")
        if self.mu.dtype != torch.float64 or self.sigma.dtype != torch.float64:
            raise UserError(f"Moments are float64, got {self.mu.dtype} and {self.sigma.dtype}.")
        if not (torch.isfinite(self.mu).all() and torch.isfinite(self.sigma).all()):
            raise UserError("A mean or covariance is not finite: the features overflow. Check the images behind it.")

    @cached_property
    def factor(self) -> Tensor:
        """F with F F^T = sigma: Cholesky, or (d, rank) from eigenvectors where sigma is singular."""
        factor, failed = torch.linalg.cholesky_ex(self.sigma)
        if not failed:
            return factor
        values, vectors = torch.linalg.eigh(self.sigma)
        rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
        kept = values > rounding.clamp(min=0)
        return vectors[:, kept] * values[kept].sqrt()

    def distance(self, other: Moments) -> Tensor:
        """The Frechet distance to `other` -> () float64, at least 0. The factor of `self` is kept for the next call."""
        root = _sum_of_roots(self.factor.T @ other.sigma @ self.factor)
        return self._combine(other.mu, other.sigma.trace(), root)

    def _combine(self, mu: Tensor, trace: Tensor, root: Tensor) -> Tensor:
        distance = (mu - self.mu).square().sum() + trace + self.sigma.trace() - 2 * root
        return distance.clamp(min=0)  # rounding can leave -1e-14 between equal sets

    def to(self, device: torch.device) -> Moments:
        """The same moments, and the factor, on `device`."""
        if self.mu.device == device:
            return self
        moved = Moments(self.mu.to(device), self.sigma.to(device))
        moved.__dict__["factor"] = self.factor.to(device)
        return moved


class MomentSums:
    """Running float64 sums of rows and of their outer products; raw sums agree with two passes to 1e-13.

    >>> import torch
    >>> from bench.metrics.frechet import MomentSums
    >>> sums = MomentSums(dim=2)
    >>> sums.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> sums.moments().sigma.tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros((dim, dim), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in (B, dim) rows."""
        rows = rows.to(self.total)
        self.n += len(rows)
        self.total += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def moments(self) -> Moments:
        """Raises: UserError for fewer than 2 rows, which have no covariance."""
        if self.n < 2:
            raise UserError(f"A covariance needs at least 2 rows, got {self.n}.")
        return _moments(self.n, self.total, self.outer)


def frechet_distance(reference: Moments, num_samples: int) -> FrechetFromSums | FrechetFromRows:
    """The metric for that many samples: sums of outer products, or rows where they are fewer than the dimensions."""
    if num_samples > len(reference.mu):
        return FrechetFromSums(reference, num_samples)
    return FrechetFromRows(reference, num_samples)


class FrechetFromSums(SampleMetric):
    """Frechet distance for more samples than dimensions: one float64 sum of outer products per jackknife group.

    In squared units of the features; exact to 1e-9 where the covariances have full rank. Rows wait until there are 1000
    and then enter the sums at once, so memory does not grow with their number: 80 d^2 bytes, 335 MB at d = 2048.

    Raises: UserError for fewer than 3 samples, or (from `compute`) an index that came from two processes.

    >>> import torch
    >>> from bench.metrics.frechet import FrechetFromSums, Moments
    >>> reference = Moments(mu=torch.zeros(2).double(), sigma=torch.eye(2).double())
    >>> features = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 4.0])
    >>> metric = FrechetFromSums(reference, num_samples=1000)
    >>> for indices in torch.arange(1000).split(64):
    ...     metric.update(features[indices], indices)
    >>> value, ci95 = metric.compute()
    >>> abs(value - 5**2) < 2 * ci95
    True
    """

    higher_is_better = False
    keeps = "sums"
    total: Tensor
    outer: Tensor
    pending: list[Tensor]
    pending_groups: list[Tensor]

    def __init__(self, reference: Moments, num_samples: int) -> None:
        dim = len(reference.mu)
        super().__init__(dim, num_samples, at_least=3)
        self.reference = reference
        zeros = torch.zeros((self.num_groups, dim, dim), dtype=torch.float64)
        self.add_state("total", zeros[:, 0].clone(), dist_reduce_fx="sum")
        self.add_state("outer", zeros, dist_reduce_fx="sum")
        self._defaults["outer"] = torch.zeros((), dtype=torch.float64).expand_as(zeros)  # a reset value without memory
        self._add_rows_state("pending", (dim,), torch.float64)
        self._add_rows_state("pending_groups", (), torch.int64)

    def _add(self, features: Tensor, indices: Tensor, labels: Tensor | None) -> None:
        self.pending.append(features.double())
        self.pending_groups.append(self.groups[indices])
        if sum(map(len, self.pending)) >= BLOCK:
            self._fold()

    def _fold(self) -> None:
        """Move what is pending into the sums, all in place: metrics that share their states see both change."""
        if not self.pending:
            return
        rows, groups = torch.cat(self.pending), torch.cat(self.pending_groups)
        sizes = groups.bincount(minlength=self.num_groups).tolist()
        for group, part in enumerate(rows[groups.argsort()].split(sizes)):
            self.total[group] += part.sum(0)
            self.outer[group].addmm_(part.T, part)
        self.pending.clear()
        self.pending_groups.clear()

    def _values(self) -> Tensor:
        self._refuse_repeats()
        self._fold()
        reference = self.reference.to(self.device)
        counts = self.groups.bincount()
        n, total, outer = self.num_samples, self.total.sum(0), self.outer.sum(0)
        values = [reference.distance(_moments(n, total, outer))]
        for group in range(self.num_groups):
            left = _moments(n - int(counts[group]), total - self.total[group], outer - self.outer[group])
            values.append(reference.distance(left))
        return torch.stack(values)


class FrechetExtrapolated(FrechetFromSums):
    """Frechet distance extrapolated to infinitely many samples: FID_infinity of Chong & Forsyth 2020.

    Like them it takes the bias of F(n), the distance from n samples, to be linear in 1/n. The slope comes from the ten
    subsets that leave out one jackknife group, which is Quenouille's bias correction (1956):

        F(inf) = G F(n) - (G - 1) mean_g F(n without group g)

    This needs no decomposition beyond those of the interval, and its value varies no more than F(n). What is left is of
    order (d / n)^2 and makes the value too low: for isotropic Gaussians, the worst case, by 2 % of the correction at
    n = 10 d and 11 % at n = 2 d; for spectra that decay as 1/k, by less than its noise. Nothing holds the value above
    0. The interval is that of F(n), whose pseudo-values average to F(inf) (Tukey 1958).

    Raises: UserError for fewer than 2 d samples, where F(n) is mostly bias of higher orders.

    >>> import torch
    >>> from bench.metrics.frechet import FrechetExtrapolated, Moments
    >>> reference = Moments(mu=torch.zeros(8).double(), sigma=torch.eye(8).double())
    >>> metric = FrechetExtrapolated(reference, num_samples=400)
    >>> features = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))  # the reference's own distribution
    >>> metric.update(features, indices=torch.arange(400))
    >>> value, ci95 = metric.compute()
    >>> abs(value) < ci95
    True
    """

    def __init__(self, reference: Moments, num_samples: int) -> None:
        dim = len(reference.mu)
        if num_samples < ROWS_PER_DIM * dim:
            raise UserError(
                f"A Frechet distance of {dim} features can be extrapolated (fid_inf) from {ROWS_PER_DIM * dim} samples "
                f"or more, num_samples is {num_samples}. Ask for more samples, or leave this score out."
            )
        super().__init__(reference, num_samples)

    def _values(self) -> Tensor:
        values = super()._values()
        groups, without = self.num_groups, values[1:]
        extrapolated = groups * values[0] - (groups - 1) * without.mean()
        return torch.cat([extrapolated[None], without])


class FrechetFromRows(RowMetric):
    """Frechet distance for at most as many samples as dimensions, exact in low rank, from n x n matrices.

    In squared units of the features, to 1e-6 relative. Raises: UserError for fewer than 3 samples.

    >>> import torch
    >>> from bench.metrics.frechet import FrechetFromRows, Moments
    >>> reference = Moments(mu=torch.zeros(4).double(), sigma=torch.eye(4).double())
    >>> metric = FrechetFromRows(reference, num_samples=3)
    >>> metric.update(torch.full((3, 4), 2.0), indices=torch.arange(3))  # a point: |mu|^2 + tr sigma
    >>> metric.compute()
    Score(value=20.0, ci95=0.0)
    """

    higher_is_better = False

    def __init__(self, reference: Moments, num_samples: int) -> None:
        super().__init__(len(reference.mu), num_samples, at_least=3)
        self.reference = reference

    def _values(self) -> Tensor:
        reference = self.reference.to(self.device)
        rows = self._sorted_rows()  # (n, d)
        origin = rows.mean(0)
        rows = rows - origin
        projected = rows @ reference.factor  # (n, rank)
        gram = projected @ projected.T  # (n, n)
        values = []
        for group in self._left_out():
            kept = self.groups != (-1 if group is None else group)
            n = int(kept.sum())
            mu = rows[kept].mean(0)
            trace = (rows[kept].square().sum() - n * mu.square().sum()) / (n - 1)
            centred = gram[kept][:, kept]
            centred = centred - centred.mean(0)
            centred = centred - centred.mean(1, keepdim=True)
            values.append(reference._combine(origin + mu, trace, _sum_of_roots(centred / (n - 1))))
        return torch.stack(values)


def _moments(n: int, total: Tensor, outer: Tensor) -> Moments:
    mu = total / n
    return Moments(mu, (outer - n * torch.outer(mu, mu)) / (n - 1))


def _sum_of_roots(matrix: Tensor) -> Tensor:
    """Trace of the square root of a symmetric positive semi-definite matrix; rounding below 0 counts as 0."""
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).clamp(min=0).sqrt().sum()
