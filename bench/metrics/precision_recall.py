"""Precision and recall of Kynkaanniemi et al. 2019 (sec. 2) with k = 3, the definition behind ADM's numbers.

A row's ball reaches to its third nearest neighbour among the rows of its own set (its fourth smallest distance, its own
0 included); balls are closed. Precision: share of samples within some reference ball. Recall: share of reference rows
within some sample ball. Rows are taken as float32. There are two ways to their distances:

  exact         answers to the row as float64 distances give them
  adm_float16   the arithmetic of ADM's evaluator, whose float16 lets boundary rows in: about +0.001 in precision and
                +0.002 in recall on ImageNet

Either way goes over tiles of BLOCK x BLOCK rows with quick distances that are known up to a tolerance, and takes again,
precisely, what they leave open. Memory beyond the rows does not grow with their number squared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from bench.errors import UserError
from bench.metrics.base import BLOCK, RowMetric, ShareMetric
from models.arithmetic import full_float32

NEIGHBOURS = 3
CANDIDATES = 10  # nearest rows by quick distances, among which the ball's radius is sought
HELD = 2_000_000  # distances held at once where rows are compared with all others
REFINED = 200_000  # coordinates held at once where they are compared with their candidates


def squared_norms(rows: Tensor) -> Tensor:
    """(n, d) -> (n,)."""
    return rows.square().sum(1)


def squared_distances(a: Tensor, b: Tensor, b_norms: Tensor) -> Tensor:
    """(A, d) and (B, d) with its squared norms (B,) -> (A, B), float64.

    What may be rounding counts as 0, so that equal rows lie within a ball of radius 0.
    """
    a_norms = squared_norms(a)
    distances = torch.addmm(b_norms, a, b.T, alpha=-2).add_(a_norms[:, None])
    rounding = distances < 1e-12 * (a_norms[:, None] + b_norms)
    return distances.masked_fill_(rounding, 0)


def squared_radii(rows: Tensor) -> Tensor:
    """The squared radius of each row's ball: (n, d) -> (n,) float64. Raises: UserError for 3 rows or fewer.

    >>> squared_radii(torch.tensor([[0.0], [1.0], [2.0], [4.0]]))
    tensor([16.,  9.,  4., 16.], dtype=torch.float64)
    """
    return Exact().radii(rows.float())[:, 0]


class Arithmetic(ABC):
    """Balls of rows and what they cover, from two kinds of squared distances: quick ones and precise ones."""

    @abstractmethod
    def norms(self, rows: Tensor) -> Tensor:
        """Squared norms as this arithmetic takes them: (n, d) float32 -> (n,)."""

    @abstractmethod
    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """(A, d) and (B, d) float32 -> (A, B)."""

    @abstractmethod
    def distances(self, products: Tensor, a_norms: Tensor, b_norms: Tensor) -> Tensor:
        """Quick squared distances (A, B) float32."""

    @abstractmethod
    def tolerance(self, dim: int, scale: Tensor) -> Tensor:
        """How far a quick distance, or its difference to a radius, may be off; `scale` (A,) is the sum of its terms."""

    @abstractmethod
    def precise(self, a: Tensor, b: Tensor, b_norms: Tensor) -> Tensor:
        """Squared distances (A, B) that settle what the quick ones leave open."""

    @abstractmethod
    def refined(self, rows: Tensor, columns: Tensor, quick: Tensor) -> Tensor:
        """Precise squared distances from each row to the rows `columns` (n, C), whose quick ones are `quick` (n, C)."""

    def radii(self, rows: Tensor, groups: Tensor | None = None) -> Tensor:
        """Squared radii among all rows, then among those outside each group: (n, d), (n,) -> (n, 1 + G) float64.

        The candidates of a row serve every column. A radius among them is the true one where no other row can be
        nearer, that is where it is 0 or below the last candidate's distance by the tolerance. The few rows without
        such a proof are compared with all rows.

        Raises: UserError for 3 rows or fewer.
        """
        if len(rows) <= NEIGHBOURS:
            raise UserError(f"Precision and recall need more than {NEIGHBOURS} rows on either side, got {len(rows)}.")
        norms = self.norms(rows)
        quick, columns, finite = self._candidates(rows, norms)
        owners = torch.full_like(columns[:, 0], -1) if groups is None else groups
        num_groups = int(owners.max()) + 1
        radii = _radii(self.refined(rows, columns, quick), owners[columns], num_groups)
        limit = quick[:, -1].double() - self.tolerance(rows.shape[1], norms.double() + norms.max().double())
        proven = finite & ((radii <= limit[:, None]) | (radii == 0)).all(1)
        if not proven.all():
            for some in (~proven).nonzero().flatten().split(max(1, HELD // len(rows))):
                tiles = [self.precise(rows[some], part, part_norms) for part, part_norms in _blocks(rows, norms)]
                radii[some] = _radii(torch.cat(tiles, 1).double(), owners, num_groups)
        return radii

    def _candidates(self, rows: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The smallest quick distances of each row, ascending (inf where there are fewer rows), and their columns.

        -> (n, CANDIDATES), (n, CANDIDATES), and (n,) whether all distances of the row are finite. A tile serves its
        rows and, transposed, its columns.
        """
        quick = torch.full((len(rows), CANDIDATES), torch.inf, device=rows.device)
        columns = torch.zeros_like(quick, dtype=torch.int64)
        finite = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for i, j in combinations_with_replacement(range(0, len(rows), BLOCK), 2):
            here, there = slice(i, i + BLOCK), slice(j, j + BLOCK)
            products = self.products(rows[here], rows[there])
            sides = [(here, there, products), (there, here, products.T)]
            for own, other, tile in sides[: 1 if i == j else 2]:
                distances = self.distances(tile, norms[own], norms[other])
                finite[own] &= distances.sum(1).isfinite()
                near = distances.topk(min(CANDIDATES, distances.shape[1]), largest=False, sorted=False)
                kept = torch.cat([quick[own], near.values], 1).topk(CANDIDATES, largest=False)
                both = torch.cat([columns[own], near.indices + other.start], 1)
                quick[own], columns[own] = kept.values, both.gather(1, kept.indices)
        return quick, columns, finite

    def covered(self, queries: Tensor, rows: Tensor, norms: Tensor, radii: Tensor) -> Tensor:
        """Whether a query lies within some ball: (q, d), balls (n, d), (n,) and squared radii (n, C) -> (q, C) bool.

        Each column of radii is a question of its own; a radius of -inf covers nothing.
        """
        return torch.cat([self._covered(block, rows, norms, radii) for block in queries.split(BLOCK)])

    def _covered(self, a: Tensor, rows: Tensor, norms: Tensor, radii: Tensor) -> Tensor:
        a_norms = self.norms(a)
        margin = torch.full((len(a), radii.shape[1]), -torch.inf, device=a.device)  # how deep in the ball around it
        finite = torch.ones(len(a), dtype=torch.bool, device=a.device)
        for part, part_norms, reach in _blocks(rows, norms, radii.float()):
            distances = self.distances(self.products(a, part), a_norms, part_norms)
            finite &= distances.sum(1).isfinite()
            room = torch.empty_like(distances)
            deepest = torch.stack([torch.sub(column, distances, out=room).amax(1) for column in reach.T], 1)
            margin = torch.maximum(margin, deepest)
        scale = a_norms.double() + norms.max().double() + radii.max().clamp(min=0)
        tolerance = self.tolerance(a.shape[1], scale).masked_fill_(~finite, torch.inf)[:, None]
        inside = margin >= 0
        certain = (margin >= tolerance) | (margin < -tolerance)
        unsure = (~certain.all(1)).nonzero().flatten()
        if len(unsure):
            inside[unsure] = self._settled(a[unsure], tolerance[unsure].float(), rows, norms, radii)
        return inside

    def _settled(self, a: Tensor, tolerance: Tensor, rows: Tensor, norms: Tensor, radii: Tensor) -> Tensor:
        """`covered` by precise distances to the balls that may hold one of the rows."""
        a_norms = self.norms(a)
        inside = torch.zeros((len(a), radii.shape[1]), dtype=torch.bool, device=a.device)
        for part, part_norms, reach in _blocks(rows, norms, radii):
            distances = self.distances(self.products(a, part), a_norms, part_norms)
            outside = reach.amax(1).float() - distances < -tolerance
            near = ~outside.all(0)
            if near.any():
                distances = self.precise(a, part[near], part_norms[near])
                inside |= (distances[:, :, None] <= reach[near]).any(1)
        return inside


class Exact(Arithmetic):
    """Float32 products decide most rows, float64 distances the others."""

    def norms(self, rows: Tensor) -> Tensor:
        norms = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        for part, found in _blocks(rows, norms):
            found.copy_(squared_norms(part.double()))
        return norms

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        return _float32_products(a, b)

    def distances(self, products: Tensor, a_norms: Tensor, b_norms: Tensor) -> Tensor:
        return (a_norms.float()[:, None] + b_norms.float()).sub_(products, alpha=2)

    def tolerance(self, dim: int, scale: Tensor) -> Tensor:
        """A bound, not an estimate: u = 2^-24 is the relative error of one float32 operation.

        A sum of d products in any order is off by at most d u / (1 - d u) |u||v|, twice which is below 1.01 d u times
        (|u|^2 + |v|^2). Rounding the norms, the radius and the results of three additions, each at most twice the
        scale, adds 9 u. Below 2^-126 float32 loses digits or the number: 2^-100 d u covers that.
        """
        return (1.01 * dim + 16) * 2.0**-24 * (scale + 2.0**-100)

    def precise(self, a: Tensor, b: Tensor, b_norms: Tensor) -> Tensor:
        return squared_distances(a.double(), b.double(), b_norms)

    def refined(self, rows: Tensor, columns: Tensor, quick: Tensor) -> Tensor:
        distances = torch.empty_like(quick, dtype=torch.float64)
        for own, near, found in _blocks(rows, columns, distances, size=max(1, REFINED // (CANDIDATES * rows.shape[1]))):
            found.copy_(rows[near].double().sub_(own[:, None]).square_().sum(2))  # (b, C, d) -> (b, C)
        return distances.masked_fill_(quick.isinf(), torch.inf)


class AdmFloat16(Arithmetic):
    """|u|^2 - 2 uv + |v|^2 with every result rounded to float16, left to right, and not below 0.

    Sums of squares and of products are accumulated in float32. (TensorFlow on a CPU accumulates the squares in float16,
    in an order of its own, so that up to one row in 125 differs from ADM's.) ADM takes a block of 10,000 x 10,000
    distances again in float32 if one of them is not finite; here it is the distances of one row to the whole other set,
    so that an answer does not depend on how rows are batched.
    """

    def norms(self, rows: Tensor) -> Tensor:
        norms = torch.empty(len(rows), dtype=torch.float16, device=rows.device)
        for part, found in _blocks(rows, norms):
            found.copy_(part.half().square().float().sum(1))
        return norms

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        return _float32_products(a.half().float(), b.half().float()).half()

    def distances(self, products: Tensor, a_norms: Tensor, b_norms: Tensor) -> Tensor:
        return (a_norms[:, None] - 2 * products + b_norms).clamp_(min=0).float()

    def tolerance(self, dim: int, scale: Tensor) -> Tensor:
        return torch.zeros_like(scale)  # quick distances are the definition

    def precise(self, a: Tensor, b: Tensor, b_norms: Tensor) -> Tensor:
        return self.distances(_float32_products(a, b), squared_norms(a), squared_norms(b))

    def refined(self, rows: Tensor, columns: Tensor, quick: Tensor) -> Tensor:
        return quick.double()


ARITHMETICS: dict[str, type[Arithmetic]] = {"exact": Exact, "adm_float16": AdmFloat16}


class Precision(ShareMetric):
    """Share of samples within some reference ball (Kynkaanniemi et al. 2019, eq. 1 and 2).

    `rows` (m, d) are the reference's; `radii` (m,) are the squared radii of its balls if they are known, as from
    `squared_radii(rows)`, and else taken here. `arithmetic` is exact or adm_float16, which takes the radii itself.

    Raises: UserError for another arithmetic, known radii with adm_float16, or 3 reference rows or fewer.

    >>> import torch
    >>> from bench.metrics.precision_recall import Precision
    >>> reference = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> metric = Precision(reference, None, num_samples=4)
    >>> features = torch.tensor([[0.5, 0.5], [1.0, 2.0], [0.0, -1.0], [9.0, 9.0]])
    >>> metric.update(features, indices=torch.arange(4))
    >>> metric.compute().value
    0.75
    """

    rows: Tensor
    norms: Tensor
    radii: Tensor

    def __init__(self, rows: Tensor, radii: Tensor | None, num_samples: int, arithmetic: str = "exact") -> None:
        super().__init__(rows.shape[1], num_samples)
        self.arithmetic = _arithmetic(arithmetic)
        if radii is not None and arithmetic != "exact":
            raise UserError(f"Known radii are exact ones; leave them out (None) with arithmetic {arithmetic}.")
        self.register_buffer("rows", rows.float(), persistent=False)
        self.register_buffer("norms", self.arithmetic.norms(self.rows), persistent=False)
        radii = self.arithmetic.radii(self.rows) if radii is None else radii.double()[:, None]
        self.register_buffer("radii", radii, persistent=False)  # (m, 1)

    def _passes(self, features: Tensor, labels: Tensor | None) -> Tensor:
        return self.arithmetic.covered(features.float(), self.rows, self.norms, self.radii)[:, 0]


class Recall(RowMetric):
    """Share of the reference rows (m, d) within some sample ball (Kynkaanniemi et al. 2019, eq. 1 and 2).

    `arithmetic` is exact or adm_float16. Raises: UserError for another, or fewer than 5 samples.

    >>> import torch
    >>> from bench.metrics.precision_recall import Recall
    >>> metric = Recall(torch.tensor([[0.0], [2.5], [7.0], [99.0]]), num_samples=5)
    >>> metric.update(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), indices=torch.arange(5))
    >>> metric.compute().value
    0.75
    """

    higher_is_better = True
    reference: Tensor

    def __init__(self, reference: Tensor, num_samples: int, arithmetic: str = "exact") -> None:
        super().__init__(reference.shape[1], num_samples, at_least=NEIGHBOURS + 2)
        self.arithmetic = _arithmetic(arithmetic)
        self.register_buffer("reference", reference.float(), persistent=False)

    def _values(self) -> Tensor:
        rows = torch.empty((self.num_samples, self.dim), device=self.device)
        for part, indices in zip(self.rows, self.row_indices, strict=True):
            rows[indices] = part
        radii = self.arithmetic.radii(rows, self.groups)
        radii.scatter_(1, 1 + self.groups[:, None], -torch.inf)  # a row that is left out has no ball
        norms = self.arithmetic.norms(rows)
        return self.arithmetic.covered(self.reference, rows, norms, radii).double().mean(0)


def _arithmetic(name: str) -> Arithmetic:
    if name not in ARITHMETICS:
        raise UserError(f"'{name}' is not an arithmetic of distances. Choose one of {', '.join(ARITHMETICS)}.")
    return ARITHMETICS[name]()


def _radii(distances: Tensor, owners: Tensor, num_groups: int) -> Tensor:
    """The (k + 1)-th smallest of each row of (b, c), then of those whose owner (c,) or (b, c) is not group 0, 1, ..."""
    kept = [distances] + [distances.masked_fill(owners == group, torch.inf) for group in range(num_groups)]
    return torch.stack([others.kthvalue(NEIGHBOURS + 1).values for others in kept], 1)  # (b, 1 + G)


def _blocks(*tensors: Tensor, size: int = BLOCK) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, `size` at a time."""
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _float32_products(a: Tensor, b: Tensor) -> Tensor:
    """(A, d) and (B, d) float32 -> (A, B), without the TF32 or bfloat16 that backends or autocast may be set to."""
    with full_float32(), torch.autocast(a.device.type, enabled=False):
        return a @ b.T
