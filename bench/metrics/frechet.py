"""Frechet distance of two Gaussians: fid on pooled features, sfid on spatial ones (ADM's evaluator).

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
from bench.metrics.base import RowMetric, SampleMetric


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean mu (d,) and covariance sigma (d, d) of a feature, float64."""

    mu: Tensor
    sigma: Tensor

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
    """Running float64 sums of rows and of their outer products; raw sums agree with two passes to 1e-13."""

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
    """Frechet distance for more samples than dimensions: one float64 sum of outer products per jackknife group."""

    higher_is_better = False
    total: Tensor
    outer: Tensor

    def __init__(self, reference: Moments, num_samples: int) -> None:
        dim = len(reference.mu)
        super().__init__(dim, num_samples, at_least=3)
        self.reference = reference
        zeros = torch.zeros((self.num_groups, dim, dim), dtype=torch.float64)
        self.add_state("total", zeros[:, 0].clone(), dist_reduce_fx="sum")
        self.add_state("outer", zeros, dist_reduce_fx="sum")

    def _add(self, features: Tensor, indices: Tensor, labels: Tensor | None) -> None:
        groups = self.groups[indices]
        by_group = features[groups.argsort()].double()
        for group, rows in enumerate(by_group.split(groups.bincount(minlength=self.num_groups).tolist())):
            self.total[group] += rows.sum(0)
            self.outer[group].addmm_(rows.T, rows)

    def _values(self) -> Tensor:
        self._refuse_repeats()
        reference = self.reference.to(self.device)
        counts = self.groups.bincount()
        n, total, outer = self.num_samples, self.total.sum(0), self.outer.sum(0)
        values = [reference.distance(_moments(n, total, outer))]
        for group in range(self.num_groups):
            left = _moments(n - int(counts[group]), total - self.total[group], outer - self.outer[group])
            values.append(reference.distance(left))
        return torch.stack(values)


class FrechetFromRows(RowMetric):
    """Frechet distance for at most as many samples as dimensions, exact in low rank, from n x n matrices."""

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
