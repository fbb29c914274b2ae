"""Rows of many mapped files, asked for by several threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datamodules.mapping import MappedRows


def test_threads_may_map_the_same_file_at_once(tmp_path):
    table = np.arange(40, dtype=np.int64).reshape(20, 2)
    files = [tmp_path / str(k) for k in range(4)]
    for file, part in zip(files, np.split(table, 4), strict=True):
        file.write_bytes(part.tobytes())
    rows = MappedRows(files, [80] * 4, count=20, file_rows=5, row_bytes=16, begin=lambda file: time.sleep(0.02) or 0)
    order = np.random.default_rng(0).permutation(20)
    with ThreadPoolExecutor(8) as pool:
        for taken in pool.map(rows.take, [order] * 8):
            np.testing.assert_array_equal(taken.view(np.int64).reshape(-1, 2), table[order])
    assert not rows.unmapped
