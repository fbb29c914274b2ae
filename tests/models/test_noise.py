"""Philox streams: one per (seed, index, stream), none shared."""

from __future__ import annotations

import numpy as np
import torch

from models.noise import LABEL, START, STEP, StepNoise, iid_labels, normal, philox


def test_streams_of_seeds_and_indices_do_not_overlap():
    """torch's CPU generator keeps 32 bits of a seed, and seed + index would repeat; Philox's key is both words."""
    keys = [(0, 1), (1, 0), (1 << 32, 0), (0, 1 << 32), (0, 0)]
    draws = {philox(*key, stream).integers(1 << 62) for key in keys for stream in (LABEL, START, STEP)}
    assert len(draws) == 15


def test_one_generator_set_to_each_stream_draws_what_new_ones_do():
    indices = [5, 0, 1 << 40, 5]
    for shape in ((3,), (4, 5)):  # an odd number of draws leaves half a word behind
        wanted = [philox(3, index, START).standard_normal(shape, np.float32) for index in indices]
        np.testing.assert_array_equal(normal(3, indices, shape, START), wanted)
    labels = [philox(3, index, LABEL).integers(10) for index in indices]
    assert iid_labels(3, indices, 10).tolist() == labels


def test_rows_depend_on_their_index_alone():
    together = normal(3, range(5), (2, 2), START)
    assert torch.equal(normal(3, [4, 1], (2, 2), START), together[[4, 1]])


def test_step_noise_continues_each_samples_own_stream():
    whole, part = StepNoise(3, range(4), (2,)), StepNoise(3, [2], (2,))
    for _ in range(3):
        assert torch.equal(whole()[2:3], part())


def test_iid_labels_are_uniform():
    counts = np.bincount(iid_labels(0, range(5000), 10).numpy(), minlength=10)
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 27.9  # 99.9 % quantile with 9 degrees of freedom
