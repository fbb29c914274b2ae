"""Class accuracy: does a sample look like the class it was asked for, by its nearest reference images?"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.errors import UserError
from bench.metrics.base import ShareMetric
from bench.metrics.precision_recall import squared_distances, squared_norms

VOTERS = 5


class ClassAccuracy(ShareMetric):
    """Share of samples whose 5 nearest reference rows (m, d) mostly carry the label asked for.

    A tie goes to the class of the nearest row among those tied. `row_labels` (m,) are the reference's.

    Raises: UserError for fewer than 5 reference rows, another number of labels, or (from `update`) no labels asked for.

    >>> import torch
    >>> from bench.metrics.class_accuracy import ClassAccuracy
    >>> reference = torch.tensor([0.0, 0.1, 0.2, 9.0, 9.1, 9.2])[:, None]
    >>> metric = ClassAccuracy(reference, torch.tensor([0, 0, 0, 1, 1, 1]), num_samples=4)
    >>> features = torch.tensor([[0.3], [8.8], [0.4], [9.3]])
    >>> metric.update(features, indices=torch.arange(4), labels=torch.tensor([0, 1, 1, 1]))
    >>> metric.compute().value
    0.75
    """

    rows: Tensor
    norms: Tensor
    row_labels: Tensor

    def __init__(self, rows: Tensor, row_labels: Tensor, num_samples: int) -> None:
        super().__init__(rows.shape[1], num_samples)
        if len(rows) < VOTERS or len(rows) != len(row_labels):
            raise UserError(
                f"class_accuracy needs {VOTERS} reference rows or more and one label for each, "
                f"got {len(rows)} rows and {len(row_labels)} labels."
            )
        self.register_buffer("rows", rows.double(), persistent=False)
        self.register_buffer("norms", squared_norms(self.rows), persistent=False)
        self.register_buffer("row_labels", row_labels.long(), persistent=False)

    def _passes(self, features: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise UserError(
                "class_accuracy needs the labels the samples were asked for; unconditional samples have none."
            )
        nearest = squared_distances(features, self.rows, self.norms).topk(VOTERS, largest=False, sorted=True).indices
        votes = self.row_labels[nearest]  # (B, 5), nearest first
        count = (votes[:, :, None] == votes[:, None, :]).sum(2)  # (B, 5): votes of each voter's class
        order = torch.arange(VOTERS, device=votes.device)
        winner = (count * VOTERS - order).argmax(1, keepdim=True)
        return votes.gather(1, winner)[:, 0] == labels
