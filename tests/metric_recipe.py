"""Seeded inputs of the golden metric values in tests/golden/metrics: functions of one integer, numpy Philox only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN_METRICS = Path(__file__).parent / "golden" / "metrics"


def golden_json(name: str) -> dict[str, Any]:
    """tests/golden/metrics/<name>.json."""
    return json.loads((GOLDEN_METRICS / f"{name}.json").read_text())


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """Every array of tests/golden/metrics/<name>.npz."""
    with np.load(GOLDEN_METRICS / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def rng(seed: int, stream: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def activations(
    n: int, d: int, seed: int, stream: int, shift: float = 0.0, scale: float = 1.0, rank: int | None = None
) -> np.ndarray:
    """Inception-like features (n, d): correlated Gaussians through a ReLU, float32. Stream 0 mixes, `stream` draws."""
    mixing = rng(seed, 0)
    k = rank or d
    mix = mixing.standard_normal((k, d)) / np.sqrt(k)
    bias = mixing.standard_normal(d) * 0.3
    z = rng(seed, stream).standard_normal((n, k))
    return np.maximum((z @ mix) * (0.6 * scale) + bias + shift, 0).astype(np.float32)


def logits(n: int, c: int, seed: int, stream: int, temp: float = 3.0) -> np.ndarray:
    """(n, c) float32."""
    return (rng(seed, stream).standard_normal((n, c)) * temp).astype(np.float32)


def images(n: int, h: int, w: int, seed: int, stream: int) -> np.ndarray:
    """uint8 (n, h, w, 3) of low frequencies and noise, so that resizing is not trivial."""
    g = rng(seed, stream)
    yy, xx = np.mgrid[0:h, 0:w]
    out = np.empty((n, h, w, 3), np.uint8)
    for i in range(n):
        f = g.uniform(0.5, 6.0, (3, 2))
        p = g.uniform(0, 2 * np.pi, (3, 2))
        noise = g.integers(-40, 41, (h, w, 3))
        for c in range(3):
            waves = np.sin(2 * np.pi * f[c, 0] * xx / w + p[c, 0]) * np.cos(2 * np.pi * f[c, 1] * yy / h + p[c, 1])
            out[i, :, :, c] = np.clip(np.rint(127.5 + 80 * waves + noise[:, :, c]), 0, 255)
    return out


def feature_cases(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (reference rows, sample rows)."""
    nr, ns, d = 600, 500, 64
    ref = activations(nr, d, seed, 1)
    smp = activations(ns, d, seed, 2, shift=0.08, scale=1.15)
    dead_ref, dead_smp = ref.copy(), smp.copy()
    dead_ref[:, : d // 4] = 0.0
    dead_smp[:, : d // 4] = 0.0
    dead_smp[:, d // 4] = 0.5
    pairs = smp.copy()
    pairs[1::2] = pairs[0::2]
    return {
        "base": (ref, smp),
        "swapped": (smp, ref),
        "identical": (ref, ref.copy()),
        "singular_few_samples": (ref[:40], smp[:32]),
        "tiny_4_vs_5": (ref[:4], smp[:5]),
        "dead_features": (dead_ref, dead_smp),
        "constant_sets": (np.full((40, d), 0.25, np.float32), np.full((30, d), 0.75, np.float32)),
        "mode_collapse": (ref, np.repeat(smp[:1], 50, 0)),
        "duplicated_pairs": (ref, pairs),
        "ref_each_five_times": (ref[: nr // 5].repeat(5, 0), smp),
        "half_overflow_x100": (ref * 100, smp * 100),
        "far_apart": (ref, smp + 50),
        "wide_2048": (
            activations(200, 2048, seed, 3, rank=256),
            activations(180, 2048, seed, 4, shift=0.05, rank=256),
        ),
    }


def score_cases(seed: int) -> dict[str, tuple[np.ndarray, int]]:
    """name -> (logits, samples per part)."""
    n, c = 1300, 50
    given = logits(n, c, seed, 21)
    return {
        "n1300_split5000": (given, 5000),
        "n1300_split500": (given, 500),  # the last part has 300 rows
        "n1300_split100": (given, 100),
        "uniform": (np.zeros((200, c), np.float32), 100),
        "one_hot_underflow": (np.eye(c, dtype=np.float32)[np.arange(200) % c] * 400, 100),
    }


RESIZES = [(8, 8), (32, 32), (64, 64), (40, 56), (128, 128), (256, 256), (299, 299), (300, 300), (320, 256), (512, 512)]
