"""Precision and recall of Kynkaanniemi et al. 2019 with k = 3, the definition behind ADM's numbers.

A row's ball reaches to its third nearest neighbour among the rows of its own set (its fourth smallest distance, its own
0 included); balls are closed. Precision: share of samples within some reference ball. Recall: share of reference rows
within some sample ball. Distances are float64 here; ADM's evaluator takes them in float16, which lets boundary rows in
(about +0.001 in precision and +0.002 in recall on ImageNet).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.errors import UserError
from bench.metrics.base import BLOCK, RowMetric, ShareMetric

NEIGHBOURS = 3


def squared_norms(rows: Tensor) -> Tensor:
    """(n, d) -> (n,)."""
    return rows.square().sum(1)


def squared_distances(a: Tensor, b: Tensor, b_norms: Tensor) -> Tensor:
    """(A, d) and (B, d) with its squared norms (B,) -> (A, B), float64.

    What may be rounding counts as 0, so that equal rows lie within a ball of radius 0.
    """
    a_norms = squared_norms(a)
    distances = torch.addmm(b_norms, a, b.T, alpha=-2).add_(a_norms[:, None])
    rounding = 1e-12 * float(a_norms.max() + b_norms.max())
    return torch.threshold_(distances, rounding, 0.0)


def squared_radii(rows: Tensor) -> Tensor:
    """The squared radius of each row's ball: (n, d) -> (n,) float64. Raises: UserError for 3 rows or fewer."""
    if len(rows) <= NEIGHBOURS:
        raise UserError(f"Precision and recall need more than {NEIGHBOURS} rows on either side, got {len(rows)}.")
    rows = rows.double()
    norms = squared_norms(rows)
    return torch.cat([_smallest(block, rows, norms)[:, -1] for block in rows.split(BLOCK)])


def _smallest(a: Tensor, b: Tensor, b_norms: Tensor) -> Tensor:
    """The k + 1 smallest squared distances from each row of `a`, ascending, inf where there are fewer -> (A, k + 1)."""
    count = NEIGHBOURS + 1
    nearest = squared_distances(a, b, b_norms).topk(min(count, len(b)), largest=False).values
    return torch.nn.functional.pad(nearest, (0, count - nearest.shape[1]), value=torch.inf)


class Precision(ShareMetric):
    """Share of samples within some reference ball; `rows` (m, d) and `radii` (m,) squared are the reference's."""

    rows: Tensor
    norms: Tensor
    radii: Tensor

    def __init__(self, rows: Tensor, radii: Tensor, num_samples: int) -> None:
        super().__init__(rows.shape[1], num_samples)
        self.register_buffer("rows", rows.double(), persistent=False)
        self.register_buffer("norms", squared_norms(self.rows), persistent=False)
        self.register_buffer("radii", radii.double(), persistent=False)

    def _passes(self, features: Tensor, labels: Tensor | None) -> Tensor:
        return (squared_distances(features, self.rows, self.norms) <= self.radii).any(1)


class Recall(RowMetric):
    """Share of the reference rows (m, d) within some sample ball."""

    higher_is_better = True
    reference: Tensor

    def __init__(self, reference: Tensor, num_samples: int) -> None:
        super().__init__(reference.shape[1], num_samples, at_least=NEIGHBOURS + 2)
        self.register_buffer("reference", reference.double(), persistent=False)

    def _values(self) -> Tensor:
        rows = self._sorted_rows()  # (n, d)
        norms = squared_norms(rows)
        radii = self._radii(rows, norms)  # (n, 1 + G)
        covered = []
        for block in self.reference.split(BLOCK):
            inside = torch.zeros((len(block), 1 + self.num_groups), dtype=torch.bool, device=block.device)
            for part, part_norms, reach in zip(rows.split(BLOCK), norms.split(BLOCK), radii.split(BLOCK), strict=True):
                distances = squared_distances(block, part, part_norms)  # (b, p)
                for column in range(1 + self.num_groups):
                    inside[:, column] |= (distances <= reach[:, column]).any(1)
            covered.append(inside)
        return torch.cat(covered).double().mean(0)

    def _radii(self, rows: Tensor, norms: Tensor) -> Tensor:
        """Squared radii among all samples, then without each group -> (n, 1 + G); -1 for a row that is left out.

        The k + 1 smallest distances to each group hold all that the radii need, so one pass over the distances serves
        every replicate.
        """
        members = [(self.groups == group).nonzero().flatten() for group in range(self.num_groups)]
        parts = [(rows[member], norms[member]) for member in members]
        radii = []
        for block in rows.split(BLOCK):
            nearest = torch.stack([_smallest(block, *part) for part in parts], 1)  # (b, G, k + 1)
            columns = [nearest.flatten(1)]
            for group in range(self.num_groups):
                columns.append(torch.cat([nearest[:, :group], nearest[:, group + 1 :]], 1).flatten(1))
            radii.append(torch.stack([column.kthvalue(NEIGHBOURS + 1).values for column in columns], 1))
        without = torch.cat(radii)
        for group, member in enumerate(members):
            without[member, 1 + group] = -1
        return without
