"""How fast, as ratios measured side by side in one run: ours and a well-known peer take turns, round after round.

A ratio is the median over rounds of peer time / our time, so a busy machine moves both. Every line also says how far
the two results are apart. Inputs are seeded. Times are wall clock at torch's own number of threads.
"""

from __future__ import annotations

import gc
import itertools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.console import progress
from bench.device import device_name
from bench.errors import UserError
from bench.perf import data as perf_data
from bench.perf import overhead as perf_overhead
from bench.registry import nearest

DIM = 2048  # of Inception's pooled features


@dataclass(frozen=True)
class Duel:
    """Two ways to the same result, and how far apart their results are."""

    name: str
    peer: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    difference: Callable[[Any, Any], float]  # (our result, theirs)
    unit: str  # what `difference` is
    note: str = ""


class Clocked(NamedTuple):
    """What a side returns that has timed itself, because what it prepares does not count."""

    seconds: float
    result: Any


def run(area: str, rounds: int, only: str | None = None) -> None:
    """Measure every duel of an area and print a line each. Raises: UserError for an area or duel there is none of."""
    if area not in AREAS:
        raise UserError(f"'{area}' is nothing to measure. {nearest(area, list(AREAS))}")
    makers = AREAS[area]
    if only is not None and only not in makers:
        raise UserError(f"'{only}' is not measured in {area}. {nearest(only, list(makers))}")
    machine = platform.processor() or platform.machine()
    print(f"{device_name('cpu')}, {machine}, torch {torch.__version__}, {rounds} rounds")
    print(f"{'':<20}{'ours':>12}{'peer':>12}{'ratio':>8}{'':>15}  {'memory':>8}")
    for name, make in makers.items():
        if only in (None, name):
            for duel in make():
                _print(duel, rounds)
            gc.collect()


def _print(duel: Duel, rounds: int) -> None:
    ours, theirs, peak, result, other = [], [], 0.0, None, None
    for k in progress(range(rounds + 1), desc=duel.name, unit="round"):
        for side in ("ours", "theirs") if k % 2 else ("theirs", "ours"):  # the second finds warmer caches
            gc.collect()
            if side == "theirs":
                seconds, other = _timed(duel.theirs)
                theirs.append(seconds)
            else:
                before = _peak_memory(reset=True)
                seconds, result = _timed(duel.ours)
                peak = max(peak, _peak_memory() - before)
                ours.append(seconds)
    ours, theirs = ours[1:], theirs[1:]  # the first round warms up
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    spread = f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
    print(
        f"{duel.name:<20}{_duration(ours):>12}{_duration(theirs):>12}{statistics.median(ratios):>7.2f}x{spread:>15}"
        f"  {peak / 2**20:>5.0f} MB  peer: {duel.peer}; {duel.unit} {duel.difference(result, other):.1e}{duel.note}"
    )
    sys.stdout.flush()


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result if isinstance(result, Clocked) else (time.perf_counter() - start, result)


def _duration(seconds: list[float]) -> str:
    median = statistics.median(seconds)
    return f"{median:.2f} s" if median >= 1 else f"{1000 * median:.1f} ms"


def _peak_memory(reset: bool = False) -> float:
    """Bytes: the peak of this process since the last reset, or its present size after a reset; 0 where unknown."""
    with suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 0.0


# --- evaluator -------------------------------------------------------------------------------------------------------


def _features(n: int, seed: int, shift: float = 0.0) -> Tensor:
    """(n, 2048) float32 like Inception's: correlated, rectified, of mean squared norm about 470."""
    rng = np.random.default_rng(0)
    mix, bias = rng.standard_normal((256, DIM)) / 16, rng.standard_normal(DIM) * 0.3
    z = np.random.default_rng(seed).standard_normal((n, 256))
    return torch.from_numpy(np.maximum((z @ mix) * 0.6 + bias + shift, 0).astype(np.float32))


def _relative(ours: Any, theirs: Any) -> float:
    return abs(float(ours) - float(theirs)) / abs(float(theirs))


def _relative_l2(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _frechet() -> list[Duel]:
    """The Frechet step on full-rank covariances, as ADM's evaluator, pytorch-fid and clean-fid take it."""
    from scipy.linalg import sqrtm

    from bench.metrics.frechet import Moments

    rng = np.random.default_rng(1)
    sigmas = []
    for _ in range(2):
        rows = rng.standard_normal((3 * DIM, DIM)) * np.linspace(0.1, 1, DIM)
        sigmas.append(np.cov(rows, rowvar=False))
    mu = [rng.standard_normal(DIM) * 0.1 for _ in range(2)]

    def ours() -> Tensor:
        a, b = (Moments(torch.from_numpy(m), torch.from_numpy(s)) for m, s in zip(mu, sigmas, strict=True))
        return a.distance(b)

    def theirs() -> float:
        root = sqrtm(sigmas[0] @ sigmas[1]).real
        return np.square(mu[0] - mu[1]).sum() + np.trace(sigmas[0] + sigmas[1] - 2 * root)

    return [Duel("frechet", "scipy.linalg.sqrtm", ours, theirs, _relative, "relative difference")]


def _moments() -> list[Duel]:
    """Taking batches of 16 feature rows into the running sums of fid."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    from bench.metrics.frechet import FrechetFromSums, Moments

    class AsTheyAre(torch.nn.Module):
        num_features = DIM

        def forward(self, rows: Tensor) -> Tensor:
            return rows

    batches = _features(2016, 2).split(16)  # our rows enter the sums by the thousand: twice in a round
    ours = FrechetFromSums(Moments(torch.zeros(DIM).double(), torch.eye(DIM).double()), 1_000_000)
    theirs = FrechetInceptionDistance(AsTheyAre(), normalize=False)
    fresh = itertools.count(step=16)

    def take_ours() -> Tensor:
        for rows, first in zip(batches, fresh, strict=False):
            ours.update(rows, torch.arange(first, first + 16))
        return ours.outer.sum(0)

    def take_theirs() -> Tensor:
        for rows in batches:
            theirs.update(rows, real=False)
        return theirs.fake_features_cov_sum

    peer = "torchmetrics FrechetInceptionDistance"
    return [
        Duel("moment updates", peer, take_ours, take_theirs, _relative_l2, "relative L2 of sums", ", 126 batches of 16")
    ]


def _precision_recall() -> list[Duel]:
    """Precision and recall of 10,000 samples against 10,000 references."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    from bench.metrics.precision_recall import Precision, Recall, squared_radii

    n = 10_000
    reference, samples, indices = _features(n, 3), _features(n, 4, 0.03), torch.arange(n)

    def ours() -> tuple[float, float]:
        precision = Precision(reference, squared_radii(reference), n)
        recall = Recall(reference, n)
        scores = []
        for metric in (precision, recall):
            metric.update(samples, indices)
            scores.append(metric.compute().value)
        return scores[0], scores[1]

    return [
        Duel(
            "precision, recall",
            "torch-fidelity (without intervals)",
            ours,
            lambda: calculate_precision_recall_full(samples, reference),
            lambda a, b: max(abs(x - y) for x, y in zip(a, b, strict=True)),
            "largest difference",
            ", 10,000 x 10,000 x 2048; 82 MB are the features a metric keeps",
        )
    ]


def _inception() -> list[Duel]:
    """Inception features of 16 images of 256x256 under random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from bench.scoring.features import blank_inception, build_extractor
    from bench.scoring.weights import random_weights

    images = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (16, 3, 256, 256), dtype=np.uint8))
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(random_weights(blank_inception(), seed=7), file)
        file.flush()
        peer = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file.name)

    def theirs() -> Tensor:
        with torch.no_grad():
            return peer(images)[0]

    def duel(name: str, note: str, **options: Any) -> Duel:
        extractor = build_extractor("random", **options)
        shipped = "torch-fidelity's extractor as it ships"
        return Duel(
            name,
            shipped,
            lambda: extractor(images)["pool"],
            theirs,
            _relative_l2,
            "relative L2 of the 2048 features",
            f", 16 images of 256x256{note}",
        )

    return [
        duel("inception", ""),
        duel("inception compiled", "", compiled=True),
        duel("inception bf16", "; its columns are marked approximate", precision="bf16"),
    ]


AREAS: dict[str, dict[str, Callable[[], list[Duel]]]] = {
    "evaluator": {
        "frechet": _frechet,
        "moments": _moments,
        "precision_recall": _precision_recall,
        "inception": _inception,
    },
    "data": perf_data.DATA,
    "overhead": perf_overhead.OVERHEAD,
}
