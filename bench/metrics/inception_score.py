"""Inception score as ADM's evaluator takes it: parts of 5000 samples in index order, the mean over parts.

exp of the mean KL(p(y|x) || p(y)) per part; the last part may be shorter and weighs the same. The logits come without
the classifier's bias. The softmax is a float64 log-softmax, so a probability of 0 is no NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.metrics.base import BLOCK, SampleMetric

PART = 5000  # samples per part, ADM's evaluator


class InceptionScore(SampleMetric):
    """Inception score of logits (B, num_classes), between 1 and num_classes (Salimans et al. 2016, sec. 4).

    `part` is the number of consecutive samples scored together. Kept as float64 sums per part and jackknife group of p
    and of sum_y p log p, from which the mean KL follows; memory grows by one such sum for each part.

    Raises: UserError for fewer than 2 samples, or (from `compute`) an index that came from two processes.

    >>> import torch
    >>> from bench.metrics.inception_score import InceptionScore
    >>> metric = InceptionScore(num_classes=10, num_samples=500)
    >>> logits = 100.0 * torch.eye(10).repeat(50, 1)  # every class equally often, each recognised for certain
    >>> for indices in torch.arange(500).split(64):
    ...     metric.update(logits[indices], indices)
    >>> round(metric.compute().value, 6)
    10.0
    """

    higher_is_better = True
    probabilities: Tensor
    negative_entropy: Tensor

    def __init__(self, num_classes: int, num_samples: int, part: int = PART) -> None:
        super().__init__(num_classes, num_samples, at_least=2)
        self.part, self.num_parts = part, -(-num_samples // part)
        cells = (self.num_parts * self.num_groups,)
        self.add_state("probabilities", torch.zeros((*cells, num_classes), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negative_entropy", torch.zeros(cells, dtype=torch.float64), dist_reduce_fx="sum")

    def _cell(self, indices: Tensor) -> Tensor:
        return indices // self.part * self.num_groups + self.groups[indices]

    def _add(self, features: Tensor, indices: Tensor, labels: Tensor | None) -> None:
        for logits, index in zip(features.split(BLOCK), indices.split(BLOCK), strict=True):
            log_p = logits.double().log_softmax(1)  # (B, num_classes)
            p = log_p.exp()
            self.probabilities.index_add_(0, self._cell(index), p)
            self.negative_entropy.index_add_(0, self._cell(index), (p * log_p).sum(1))

    def _values(self) -> Tensor:
        self._refuse_repeats()
        shape = (self.num_parts, self.num_groups)
        everyone = torch.arange(self.num_samples, device=self.device)
        counts = self._cell(everyone).bincount(minlength=self.num_parts * self.num_groups).view(shape)
        probabilities, negative_entropy = self.probabilities.view(*shape, -1), self.negative_entropy.view(shape)
        values = []
        for group in self._left_out():
            kept = torch.arange(self.num_groups, device=self.device) != (-1 if group is None else group)
            n = counts[:, kept].sum(1)  # (num_parts,)
            present = n > 0  # a short last part can lie in one group alone
            p_y = probabilities[:, kept].sum(1)[present] / n[present, None]
            kl = negative_entropy[:, kept].sum(1)[present] / n[present] - torch.xlogy(p_y, p_y).sum(1)
            values.append(kl.exp().mean())
        return torch.stack(values)
