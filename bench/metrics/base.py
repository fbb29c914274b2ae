"""What all scores share: rows keyed by sample index, float64 states, exact sums over processes, an interval."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from bench.errors import UserError
from bench.metrics import Score
from bench.metrics.uncertainty import jackknife_groups, jackknife_score, share_score

BLOCK = 1000  # rows handled at once where memory would grow with the square of the sample count


def keep_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`move` without its change of dtype: `.half()` or `.to(torch.bfloat16)` then moves a tensor but never casts it."""

    def moved(tensor: Tensor) -> Tensor:
        result = move(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


class SampleMetric(Metric):
    """A score of the samples 0 .. num_samples - 1, fed in any order, in any batches, by any number of processes.

    `update(features, indices, labels)` takes float rows (B, dim), their sample indices (B,) and, where the score needs
    them, the class labels asked for (B,). An index that comes again is ignored. `compute()` synchronizes the processes
    and gives a `Score`; it refuses an incomplete set. Subclasses fill `_add` and `_values`.
    """

    full_state_update = False
    keeps: ClassVar[str] = ""  # names states that other scores of the same features can share
    groups: Tensor
    seen: Tensor

    def __init__(self, dim: int, num_samples: int, at_least: int) -> None:
        super().__init__()
        if num_samples < at_least:
            raise UserError(f"{type(self).__name__} needs at least {at_least} samples, num_samples is {num_samples}.")
        self.dim, self.num_samples = dim, num_samples
        self.register_buffer("groups", jackknife_groups(num_samples), persistent=False)  # (num_samples,)
        self.num_groups = int(self.groups.max()) + 1
        self.add_state("seen", torch.zeros(num_samples, dtype=torch.int32), dist_reduce_fx="sum")
        self.empty_rows: dict[str, Tensor] = {}  # list states: what a process without a single row contributes

    def update(self, features: Tensor, indices: Tensor, labels: Tensor | None = None) -> None:
        """Take in (B, dim) features of the samples `indices` (B,); `labels` (B,) are the classes asked for.

        Raises: UserError for wrong shapes, an index outside the set, or features that are not finite; no state changes.
        """
        features, indices = features.to(self.device), indices.to(self.device)
        labels = None if labels is None else labels.to(self.device)
        self._check(features, indices, labels)
        fresh = self._fresh(indices)
        self._add(features[fresh], indices[fresh], None if labels is None else labels[fresh])
        self.seen[indices] = 1

    def compute(self) -> Score:
        """The score of all samples and its interval. Raises: UserError if samples are missing."""
        missing = (self.seen == 0).nonzero().flatten()
        if len(missing):
            raise UserError(
                f"{type(self).__name__} needs {self.num_samples} samples, {len(missing)} are missing, the first is "
                f"index {int(missing[0])}. Sample them, or ask for fewer."
            )
        return self._score(self._values())

    @abstractmethod
    def _add(self, features: Tensor, indices: Tensor, labels: Tensor | None) -> None:
        """Take in rows that are checked and new: (B, dim), (B,) and (B,); B may be 0."""

    @abstractmethod
    def _values(self) -> Tensor:
        """The score of all samples, then without each group -> (1 + G,) float64."""

    def _score(self, values: Tensor) -> Score:
        return jackknife_score(values)

    def _left_out(self) -> Iterator[int | None]:
        """None (all samples), then each group to leave out, in the order of `_values`."""
        yield None
        yield from range(self.num_groups)

    def _add_rows_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.add_state(name, [], dist_reduce_fx="cat")
        self.empty_rows[name] = torch.empty((0, *shape), dtype=dtype)

    def _check(self, features: Tensor, indices: Tensor, labels: Tensor | None) -> None:
        name = type(self).__name__
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise UserError(
                f"{name} takes float features (B, {self.dim}), got {features.dtype} {tuple(features.shape)}."
            )
        for what, given in (("indices", indices), ("labels", labels)):
            if given is not None and (given.shape != (len(features),) or given.is_floating_point()):
                raise UserError(
                    f"{name} takes integer {what} ({len(features)},), got {given.dtype} {tuple(given.shape)}."
                )
        outside = indices[(indices < 0) | (indices >= self.num_samples)]
        if len(outside):
            raise UserError(
                f"{name} was made for sample indices 0 to {self.num_samples - 1}, got {int(outside[0])}. "
                "Cut a surplus by index, or raise num_samples."
            )
        broken = indices[~torch.isfinite(features).all(1)]
        if len(broken):
            raise UserError(f"The features of sample {int(broken[0])} are not finite. Check the generated images.")

    def _fresh(self, indices: Tensor) -> Tensor:
        """Positions in the batch of the samples not seen before, each once, in the order of their indices."""
        ascending, order = indices.sort(stable=True)
        first = torch.ones_like(ascending, dtype=torch.bool)
        first[1:] = ascending[1:] != ascending[:-1]
        return order[first & (self.seen[ascending] == 0)]

    def _refuse_repeats(self) -> None:
        """For scores kept as sums, from which a row that two processes brought cannot be taken out again."""
        repeated = (self.seen > 1).nonzero().flatten()
        if len(repeated):
            raise UserError(
                f"{type(self).__name__} got sample {int(repeated[0])} from more than one process. Give each index to "
                "one process only; a padding sampler repeats some (Lightning: use_distributed_sampler=False)."
            )

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Sums are reduced in place of torchmetrics' gather-and-stack, which would hold every process's covariances.

        A process without rows takes part with an empty block of the right shape and dtype.
        """
        group = process_group or self.process_group
        for name in self._reductions:
            state = getattr(self, name)
            if isinstance(state, list):
                rows = torch.cat(state) if state else self.empty_rows[name].to(self.device)
                setattr(self, name, [torch.cat(dist_sync_fn(rows, group))])
            else:
                total = state.clone()
                torch.distributed.all_reduce(total, group=group)
                setattr(self, name, total)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> torch.nn.Module:
        return super()._apply(keep_dtype(fn), exclude_state)


class ShareMetric(SampleMetric):
    """The share of samples that pass a test of their own, such as lying within a reference ball."""

    higher_is_better = True
    hits: Tensor

    def __init__(self, dim: int, num_samples: int) -> None:
        super().__init__(dim, num_samples, at_least=2)
        self.add_state("hits", torch.zeros(num_samples, dtype=torch.int32), dist_reduce_fx="sum")

    @abstractmethod
    def _passes(self, features: Tensor, labels: Tensor | None) -> Tensor:
        """(B, dim) float64 features, labels (B,) -> (B,) bool."""

    def _add(self, features: Tensor, indices: Tensor, labels: Tensor | None) -> None:
        for start in range(0, len(features), BLOCK):
            part = slice(start, start + BLOCK)
            passes = self._passes(features[part].double(), None if labels is None else labels[part])
            self.hits[indices[part]] = passes.int()

    def _values(self) -> Tensor:
        return (self.hits > 0).double().mean()[None]  # alone: the interval needs no replicates

    def _score(self, values: Tensor) -> Score:
        return share_score(float(values), self.num_samples)


class RowMetric(SampleMetric):
    """A score that needs all rows at once: kept in float32, put in the order of their samples before use."""

    keeps = "rows"
    rows: list[Tensor]
    row_indices: list[Tensor]

    def __init__(self, dim: int, num_samples: int, at_least: int) -> None:
        super().__init__(dim, num_samples, at_least)
        self._add_rows_state("rows", (dim,), torch.float32)
        self._add_rows_state("row_indices", (), torch.int64)

    def _add(self, features: Tensor, indices: Tensor, labels: Tensor | None) -> None:
        self.rows.append(features.float())
        self.row_indices.append(indices.long())

    def _sorted_rows(self) -> Tensor:
        """Each sample once, by index -> (num_samples, dim) float64."""
        rows, indices = torch.cat(self.rows), torch.cat(self.row_indices)
        ordered = torch.empty((self.num_samples, self.dim), dtype=torch.float64, device=rows.device)
        ordered[indices] = rows.double()
        return ordered


def share_states(metrics: Mapping[str, SampleMetric]) -> MetricCollection:
    """Scores of the same features and samples as one collection; those that keep the same states hold them once.

    Call its `update`, `compute` and `reset`; to index it or go through its items copies the states of a metric.
    """
    groups: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        groups.setdefault(metric.keeps or f"own {name}", []).append(name)
    return MetricCollection({**metrics}, compute_groups=list(groups.values()))
