"""Arithmetic that does not depend on how a machine was set up: full float32, one thread to each convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 inside convolutions and products, whatever is set: they move features by 1e-3."""
    root: Any = torch.backends  # its modules make these attributes at run time
    backends = (root.cudnn.conv, root.cuda.matmul, root.mkldnn.conv, root.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def one_thread_each(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`work` on each part, in order; as many parts side by side as this process has threads, each on one alone.

    A convolution that is split over several threads has other last bits for each number of them. `work` sets grad mode
    and autocast itself: they belong to a thread.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # what threads to come begin with; this one's own never changed
