"""The latent cache: what is written comes back, an interruption costs one shard, a foreign cache is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as stored

from datamodules import prepare as preparation
from datamodules import processes
from datamodules.cache import FORMAT, CacheMeta, LatentCache, card_of, file_sha256, statistics
from datamodules.imagenet import ImageNetDataModule
from datamodules.prepare import claimed, prepare_cache, read_ahead, rows_of_a_shard
from datamodules.processes import Processes

META = CacheMeta("toy", 3, 4, "none", "toy-ae", "abc", (2, 2, 2), scale=(2.0, 0.5), shift=(1.0, -1.0))
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


def prepare(path, encoder=encode, images=IMAGES, labels=LABELS, meta=META, processes=None):
    return prepare_cache(
        images, labels, encoder, path, meta, processes=processes, shard_rows=4, batch_size=3, progress=False
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("read_whole", [0, 2**20], ids=["memory-mapped", "read whole"])
def test_rows_come_back_across_shards(tmp_path, read_whole):
    prepare(tmp_path)
    cache = LatentCache(tmp_path, read_whole)
    expected = encode(IMAGES[torch.from_numpy(ROWS)])
    for got, wanted in zip(cache.moments(ROWS).swapaxes(0, 1), expected, strict=True):
        np.testing.assert_array_equal(got, wanted.numpy())
    assert cache.labels.tolist() == LABELS.tolist()
    assert (cache.count, cache.num_classes, cache.latent_shape) == (10, 3, (2, 2, 2))


def test_float16_halves_the_moments_and_keeps_three_digits(tmp_path):
    prepare(tmp_path, meta=replace(META, dtype="float16"))
    assert stored(tmp_path / "moments-00000.safetensors")["moments"].nbytes == 4 * 16 * 2  # rows, values, bytes
    mean, logvar = LatentCache(tmp_path).moments(ROWS).swapaxes(0, 1)
    expected = encode(IMAGES[torch.from_numpy(ROWS)])
    np.testing.assert_array_equal(mean, expected[0].numpy())  # whole numbers to 255 are exact
    np.testing.assert_allclose(logvar, expected[1].numpy(), rtol=2**-11)
    assert mean.dtype == np.float16


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
        ({"meta": replace(META, encoder_sha256="def")}, "encoder_sha256 'abc', now 'def'"),
        ({"meta": replace(META, scale=(2.0, 0.25))}, r"scale \[2.0, 0.5\], now \[2.0, 0.25\]"),
        ({"meta": replace(META, classes=("b", "a", "c"))}, "classes 0, now 3"),
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
        prepare(tmp_path, Counting(stop_after=7), meta=replace(META, encoder_sha256="def"))
    encoder = Counting()
    prepare(tmp_path, encoder)
    assert encoder.seen == 10


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("lose", [cut, Path.unlink], ids=["cut", "gone"])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_shard_that_was_lost_or_cut_is_made_again(tmp_path, finished, lose, world_size):
    prepare(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cache")
    lose(tmp_path / "cache" / "moments-00001.safetensors")
    if not finished:
        (tmp_path / "cache" / "manifest.json").unlink()
    counters = [Counting() for _ in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        runs = [
            pool.submit(prepare, tmp_path / "cache", counter, processes=Processes(rank, world_size))
            for rank, counter in enumerate(counters)
        ]
        [run.result(30) for run in runs]
    assert [counter.seen for counter in counters] == [0] * (world_size - 1) + [4]  # shard 1 is the last process's
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    LatentCache(tmp_path / "cache")


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


def test_mapped_moments_equal_the_library_reader(tmp_path):
    prepare(tmp_path, meta=replace(META, mirrors=True))
    shards = [stored(tmp_path / f"moments-{k:05d}.safetensors")["moments"] for k in range(3)]
    wanted = np.concatenate(shards).reshape(20, 2, 2, 2, 2)  # both views of ten images
    rows, cache = np.arange(20) // 2, LatentCache(tmp_path, read_whole=0)
    np.testing.assert_array_equal(cache.moments(rows, np.arange(20) % 2 == 1), wanted)


@pytest.mark.parametrize("read_whole", [0, 2**20], ids=["memory-mapped", "read whole"])
@pytest.mark.parametrize("damage", ["renamed", "retyped", "shifted", "no header", "cut short", "gone"])
def test_a_shard_that_is_not_as_the_manifest_says_is_refused(tmp_path, damage, read_whole):
    """The hash of a shard covers its data; a header could name them wrongly."""
    prepare(tmp_path)
    file = tmp_path / "moments-00001.safetensors"
    content, length = file.read_bytes(), int.from_bytes(file.read_bytes()[:8], "little")
    changed = {
        "renamed": content.replace(b'"moments"', b'"mamonts"'),
        "retyped": content.replace(b'"F32"', b'"I32"'),
        "shifted": (length - 1).to_bytes(8, "little") + content[8:],  # a header ends in blanks
        "no header": b"[" + content[1:],
        "cut short": content[:-1],
    }
    assert content[8 + length - 1 : 8 + length] == b" "
    cache = LatentCache(tmp_path, read_whole) if read_whole == 0 else None
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"moments-00001\.safetensors is missing or damaged"):
        (cache or LatentCache(tmp_path, read_whole)).moments(np.arange(8))


def test_rows_that_are_not_there_are_refused(tmp_path):
    prepare(tmp_path)
    for rows in ([-1], [0, 10]):
        with pytest.raises(IndexError):
            LatentCache(tmp_path, read_whole=0).moments(np.array(rows))


def test_another_process_opens_the_files_itself(tmp_path):
    prepare(tmp_path)
    cache = LatentCache(tmp_path, read_whole=0)
    packed = pickle.dumps(cache)
    assert len(packed) < 1000  # a path, not the maps
    np.testing.assert_array_equal(pickle.loads(packed).moments(ROWS), cache.moments(ROWS))


def test_the_manifest_says_what_the_cache_depends_on(tmp_path):
    prepare(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    wanted = {"data": "toy", "encoder_sha256": "abc", "scale": [2.0, 0.5], "shift": [1.0, -1.0], "mirrors": False}
    assert wanted.items() <= manifest.items()
    assert manifest["versions"].keys() == {"torch", "numpy", "pillow", "safetensors"}
    assert manifest["class_histogram"] == [4, 3, 3]
    assert [shard["file"] for shard in manifest["shards"]] == [f"moments-{k:05d}.safetensors" for k in range(3)]


# --- mirrors, pixels, statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_whole", [0, 2**20], ids=["memory-mapped", "read whole"])
def test_mirrors_are_encodings_of_mirrored_images(tmp_path, read_whole):
    prepare(tmp_path, meta=replace(META, mirrors=True))
    mirrored = np.array([True, False, True, True, False, False])
    images = IMAGES[torch.from_numpy(ROWS)]
    seen = torch.where(torch.from_numpy(mirrored)[:, None, None, None], images.flip(-1), images)
    found = LatentCache(tmp_path, read_whole).moments(ROWS, mirrored)
    for got, wanted in zip(found.swapaxes(0, 1), encode(seen), strict=True):
        np.testing.assert_array_equal(got, wanted.numpy())
    straight, _ = encode(images)
    assert not np.array_equal(encode(images.flip(-1))[0], straight.flip(-1))  # so a flipped latent would not do


@pytest.mark.parametrize("read_whole", [0, 2**20], ids=["memory-mapped", "read whole"])
def test_pixels_come_back_as_minus_one_to_one(tmp_path, read_whole):
    meta = replace(META, latent_shape=(3, 4, 4), dtype="uint8", scale=(1.0,) * 3, shift=(0.0,) * 3, mirrors=True)
    prepare(tmp_path, encoder=None, meta=meta)
    assert stored(tmp_path / "moments-00000.safetensors")["images"].nbytes == 4 * 48  # mirrors need no room
    mirrored = np.arange(6) % 2 == 0
    got = LatentCache(tmp_path, read_whole).images(ROWS, mirrored)
    wanted = IMAGES[torch.from_numpy(ROWS)].float() / 127.5 - 1
    wanted[::2] = wanted[::2].flip(-1)
    np.testing.assert_array_equal(got, wanted.numpy())


@pytest.mark.parametrize("mirrors", [False, True])
def test_the_manifest_has_mean_and_deviation_of_the_scaled_posterior(tmp_path, mirrors):
    """Against the law of total variance, over all encodings."""
    manifest = prepare(tmp_path, meta=replace(META, mirrors=mirrors))
    mean, logvar = encode(torch.cat([IMAGES, IMAGES.flip(-1)]) if mirrors else IMAGES)
    mean, variance = mean.double(), logvar.double().exp()
    std = (mean.var((0, 2, 3), correction=0) + variance.mean((0, 2, 3))).sqrt()
    scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0])
    np.testing.assert_allclose(manifest["latents"]["mean"], (mean.mean((0, 2, 3)) - shift) * scale, rtol=1e-6)
    np.testing.assert_allclose(manifest["latents"]["std"], std * scale, rtol=1e-6)


def test_statistics_of_pixels_are_those_of_all_their_values():
    """Against exact fractions; float64 values of all pixels would be eight times their memory."""
    card = statistics({"images": IMAGES.numpy()})
    for channel, values in enumerate(IMAGES.movedim(1, 0).reshape(3, -1).tolist()):
        scaled = [Fraction(2 * value - 255, 255) for value in values]
        assert card["sum"][channel] == float(sum(scaled))
        assert card["square"][channel] == float(sum(z**2 for z in scaled))
    assert card["count"] == 10 * 4 * 4


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_moments_that_do_not_fit_their_type_are_refused(tmp_path, value):
    def broken(images):
        return torch.full((len(images), 2, 2, 2), value), torch.zeros(len(images), 2, 2, 2)

    with pytest.raises(ValueError, match=r"toy-ae gave a mean that float16 does not hold.*data\.dtype=float32"):
        prepare(tmp_path, broken, meta=replace(META, dtype="float16"))
    assert list(tmp_path.iterdir()) == []


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_processes_writes_the_same_files(tmp_path, world_size):
    manifest = prepare(tmp_path / "alone")
    with ThreadPoolExecutor(world_size) as pool:
        runs = [
            pool.submit(prepare, tmp_path / "shared", processes=Processes(rank, world_size))
            for rank in range(world_size)
        ]
        assert all(run.result(30) == manifest for run in runs)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_cut_off_with_two_processes_and_ended_by_three(tmp_path, monkeypatch):
    prepare(tmp_path / "whole")
    monkeypatch.setattr(processes, "SILENCE", 0.3)
    with pytest.raises(ValueError, match=r"1 of 1 shards of other processes are missing.*Run the same command again"):
        prepare(tmp_path / "cut", processes=Processes(0, 2))  # its peer never comes
    assert sorted(contents(tmp_path / "cut")) == ["moments-00000.safetensors", "moments-00002.safetensors"]
    monkeypatch.setattr(processes, "SILENCE", 30)
    with ThreadPoolExecutor(3) as pool:
        counters = [Counting() for _ in range(3)]
        runs = [
            pool.submit(prepare, tmp_path / "cut", counter, processes=Processes(rank, 3))
            for rank, counter in enumerate(counters)
        ]
        [run.result(30) for run in runs]
    assert [counter.seen for counter in counters] == [0, 4, 0]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_two_processes_that_write_one_shard_are_told(tmp_path):
    tmp_path.joinpath("cache").mkdir()
    with (
        claimed(tmp_path / "cache" / "moments-00000.safetensors"),
        pytest.raises(ValueError, match=r"Another process is writing .*moments-00000\.safetensors.*torchrun"),
    ):
        prepare(tmp_path / "cache")
    assert prepare(tmp_path / "cache")["count"] == 10


def test_a_file_left_by_a_killed_process_is_written_over(tmp_path):
    (tmp_path / ".moments-00000.safetensors.tmp").write_bytes(b"half of a shard" * 1000)
    prepare(tmp_path)
    prepare(tmp_path.with_name("fresh"))
    assert contents(tmp_path) == contents(tmp_path.with_name("fresh"))


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3"}, (3, 4, 3)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),  # a batch script is one process of its job
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1)),  # started by Lightning
    ],
)
def test_the_launcher_says_which_process_this_is(monkeypatch, variables, expected):
    for name in {"SLURM_JOB_NAME", *processes.TORCHRUN, *processes.SRUN, *processes.LIGHTNING}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    here = Processes.here()
    assert (here.rank, here.world_size, here.local_rank) == expected


ENCODE_AND_HASH = """
import sys
from pathlib import Path
import torch
from diffusers import AutoencoderKL
from datamodules.cache import CacheMeta
from datamodules.prepare import prepare_cache
from models.autoencoder import SD_CONFIG, stable_diffusion

assert torch.get_num_threads() == int(sys.argv[2])
torch.manual_seed(0)
small = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
coder = stable_diffusion("sd-vae", AutoencoderKL(**SD_CONFIG | small))
images = torch.randint(256, (40, 3, 64, 64), dtype=torch.uint8)
meta = CacheMeta("toy", 0, 64, "none", coder.name, "abc", (4, 8, 8), coder.scale, coder.shift)
manifest = prepare_cache(images, torch.zeros(40).long(), coder.moments, Path(sys.argv[1]), meta, progress=False)
print(*(shard["sha256"] for shard in manifest["shards"]))
"""


def test_any_number_of_threads_writes_the_same_shards(tmp_path):
    """Of Stable Diffusion's encoder: its convolutions have other last bits when several threads share one."""
    hashes = [
        subprocess.run(
            [sys.executable, "-c", ENCODE_AND_HASH, str(tmp_path / threads), threads],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.split()
        for threads in ("1", "2")
    ]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2


# --- the disk -------------------------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 300, 700))
    encoder = Counting()
    with pytest.raises(ValueError, match=r"will take 0\.00 GB more and 0\.00 GB are free.*paths\.cache"):
        prepare(tmp_path, encoder)  # 10 images x (16 values x 4 bytes + label) = 720 bytes
    assert encoder.seen == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_leaves_whole_shards_only(tmp_path, monkeypatch, code):
    def full(descriptor, sync=os.fsync):
        if len(list(tmp_path.glob("moments-*"))) == 1:
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(preparation.os, "fsync", full)
    with pytest.raises(ValueError, match=r"disk of .* is full: moments-00001.*run the same command again"):
        prepare(tmp_path)
    assert list(contents(tmp_path)) == ["moments-00000.safetensors"]


@pytest.mark.parametrize(
    "count, row_bytes, rows",
    [
        (220, 1000, 32),  # small sets have something to share out, too
        (5000, 2056, 256),
        (1_281_167, 32_776, 1024),  # ImageNet 256 with mirrors: 34 MB
        (1_281_167, 131_080, 256),  # 512: 34 MB
        (1_281_167, 196_616, 256),  # pixels at 256
    ],
)
def test_shards_are_powers_of_two_below_64_mib(count, row_bytes, rows):
    assert rows_of_a_shard(count, row_bytes) == rows
    assert rows * row_bytes <= 64 * 2**20


# --- reading --------------------------------------------------------------------------------------------------------


def test_reading_runs_ahead_of_the_encoder_in_order():
    read = []

    class Source:
        def __getitem__(self, rows):
            read.append(rows)
            return rows

    batches = [slice(k, k + 1) for k in range(6)]
    ahead = read_ahead(Source(), batches)
    for k in range(6):
        assert next(ahead) is batches[k]
        deadline = time.monotonic() + 5
        while len(read) < min(k + 2, 6) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert read == batches[: len(read)] and len(read) >= min(k + 2, 6)


def test_shards_carry_the_hash_of_their_data(tmp_path):
    prepare(tmp_path)
    file = tmp_path / "moments-00001.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert card_of(file)["sha256"] == hashlib.sha256(content[start:]).hexdigest()


def test_a_cache_in_another_format_is_refused(tmp_path):
    manifest = prepare(tmp_path)
    del manifest["format"]  # as the first format had none
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"format 1; this version reads format 2.*prepare the data again"):
        LatentCache(tmp_path)
    with pytest.raises(ValueError, match="format 1"):
        prepare(tmp_path)


def test_altered_labels_are_noticed(tmp_path):
    prepare(tmp_path)
    np.save(tmp_path / "labels.npy", np.roll(np.load(tmp_path / "labels.npy"), 1))
    with pytest.raises(ValueError, match=r"labels\.npy is missing or damaged"):
        LatentCache(tmp_path)


def test_the_first_batch_of_a_large_cache_opens_no_more_shards_than_it_has_samples(tmp_path):
    """1.28 million entries in 1,251 sparse shards of the size they have on disk."""
    count, rows, shape = 1_281_167, 1024, (4, 32, 32)
    moments = {"dtype": "F16", "shape": [rows, 2, 2, *shape], "data_offsets": [0, 4 * rows * 8192]}
    header = json.dumps({"moments": moments}).encode()
    shards = []
    for k in range(count // rows):
        file = tmp_path / f"moments-{k:05d}.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        size = 8 + len(header) + 4 * rows * 8192
        os.truncate(file, size)
        shards.append({"file": file.name, "bytes": size, "sha256": "not read"})
    count = len(shards) * rows
    np.save(tmp_path / "labels.npy", np.arange(count) % 1000)
    manifest = {
        "format": FORMAT, "data": "imagenet256", "count": count, "num_classes": 1000, "classes": [],
        "latent_shape": shape, "fingerprint": "large",
        "dtype": "float16", "mirrors": True, "scale": [0.18215] * 4, "shift": [0.0] * 4,
        "shard_rows": rows, "labels_sha256": file_sha256(tmp_path / "labels.npy"), "shards": shards,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    data = ImageNetDataModule(tmp_path, batch_size=64)
    batch = next(iter(data.loader()))
    assert batch.latents.shape == (64, *shape) and data.num_classes == 1000
    opened = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert 32 < len(opened) <= 64
