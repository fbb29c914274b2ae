"""The latent cache: what is written comes back, an interruption costs one shard, a foreign cache is refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

from datamodules.prepare import CacheMeta, LatentCache, map_safetensors, prepare_cache

META = CacheMeta("toy", 3, 4, "none", "toy-ae", "abc", scale=(2.0, 0.5), shift=(1.0, -1.0))
IMAGES = torch.randint(256, (10, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(10) % 3
ROWS = np.array([9, 0, 3, 4, 9, 7])


def encode(images):
    mean = images[:, :2, ::2, ::2].float()  # (B,2,2,2)
    return mean, -mean / 100


class Counting:
    """An encoder that notes how many images it saw, and stops the process after `stop_after` of them."""

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = 0, stop_after

    def __call__(self, images):
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return encode(images)


def prepare(path, encoder=encode, images=IMAGES, labels=LABELS, meta=META):
    return prepare_cache(images, labels, encoder, path, meta, shard_rows=4, batch_size=3, progress=False)


@pytest.mark.parametrize("read_whole", [0, 2**20], ids=["memory-mapped", "read whole"])
def test_rows_come_back_across_shards(tmp_path, read_whole):
    prepare(tmp_path)
    cache = LatentCache(tmp_path, read_whole)
    expected = encode(IMAGES[torch.from_numpy(ROWS)])
    for got, wanted in zip(cache.moments(ROWS), expected, strict=True):
        np.testing.assert_array_equal(got, wanted.numpy())
    assert cache.labels.tolist() == LABELS.tolist()
    assert (cache.count, cache.num_classes, cache.latent_shape) == (10, 3, (2, 2, 2))


def test_float16_halves_the_moments_and_keeps_three_digits(tmp_path):
    prepare(tmp_path, meta=replace(META, dtype="float16"))
    assert map_safetensors(tmp_path / "moments-00000.safetensors")["mean"].nbytes == 4 * 8 * 2  # rows, values, bytes
    mean, logvar = LatentCache(tmp_path).moments(ROWS)
    expected = encode(IMAGES[torch.from_numpy(ROWS)])
    np.testing.assert_array_equal(mean, expected[0].numpy())  # whole numbers to 255 are exact
    np.testing.assert_allclose(logvar, expected[1].numpy(), rtol=2**-11)
    assert mean.dtype == np.float32


def test_an_interrupted_preparation_goes_on_after_the_last_whole_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, Counting(stop_after=7))  # shards of 4: one whole, the second half-way
    assert sorted(file.name for file in tmp_path.iterdir()) == ["moments-00000.safetensors"]
    with pytest.raises(ValueError, match=r"no latent cache.*Prepare the data first"):
        LatentCache(tmp_path)

    resumed = Counting()
    manifest = prepare(tmp_path, resumed)
    assert resumed.seen == 6
    untouched = prepare(tmp_path.with_name("in-one-go"))
    assert manifest["shards"] == untouched["shards"]


def test_a_finished_cache_is_not_encoded_again(tmp_path):
    first = prepare(tmp_path)
    encoder = Counting()
    assert prepare(tmp_path, encoder) == first
    assert encoder.seen == 0


@pytest.mark.parametrize(
    "change, named",
    [
        ({"meta": replace(META, autoencoder_sha256="def")}, "autoencoder_sha256 'abc', now 'def'"),
        ({"meta": replace(META, scale=(2.0, 0.25))}, r"scale \[2.0, 0.5\], now \[2.0, 0.25\]"),
        ({"images": IMAGES[:9], "labels": LABELS[:9]}, "count 10, now 9"),
        ({"labels": LABELS.flip(0)}, "the labels differ"),
    ],
)
def test_a_cache_of_other_data_is_refused_by_name(tmp_path, change, named):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=f"{named}.*Remove that folder"):
        prepare(tmp_path, **change)


def test_shards_left_by_another_preparation_are_not_taken_over(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, Counting(stop_after=7), meta=replace(META, autoencoder_sha256="def"))
    encoder = Counting()
    prepare(tmp_path, encoder)
    assert encoder.seen == 10


@pytest.mark.parametrize("damage", ["altered", "cut", "gone"])
def test_damaged_shards_are_noticed(tmp_path, damage):
    prepare(tmp_path)
    shard = tmp_path / "moments-00001.safetensors"
    content = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "altered" else b""))
    with pytest.raises(ValueError, match=r"moments-00001.safetensors is missing or damaged.*prepare the data again"):
        LatentCache(tmp_path)


def test_images_and_labels_must_agree_in_number(tmp_path):
    with pytest.raises(ValueError, match="toy: 10 images but 9 labels"):
        prepare(tmp_path, labels=LABELS[:9])


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float32 or float16, not 'bfloat16'"):
        replace(META, dtype="bfloat16")


def test_mapped_tensors_equal_the_library_reader(tmp_path):
    prepare(tmp_path)
    file = tmp_path / "moments-00000.safetensors"
    mapped, read = map_safetensors(file), safetensors.numpy.load_file(file)
    assert mapped.keys() == read.keys()
    for name in read:
        np.testing.assert_array_equal(mapped[name], read[name])


def test_another_process_opens_the_files_itself(tmp_path):
    prepare(tmp_path)
    cache = LatentCache(tmp_path, read_whole=0)
    packed = pickle.dumps(cache)
    assert len(packed) < 1000  # a path, not the maps
    np.testing.assert_array_equal(pickle.loads(packed).moments(ROWS)[0], cache.moments(ROWS)[0])


def test_the_manifest_says_what_the_cache_depends_on(tmp_path):
    prepare(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    wanted = {"data": "toy", "autoencoder_sha256": "abc", "scale": [2.0, 0.5], "shift": [1.0, -1.0], "mirrors": "none"}
    assert wanted.items() <= manifest.items()
    assert manifest["versions"].keys() == {"torch", "numpy", "safetensors"}
