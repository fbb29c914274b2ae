"""The user's pictures as squares: the right ones, in the order of the set; damaged ones are named or left out."""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import raw_layouts as layouts
import torch

from datamodules import sources
from datamodules.base import DataConfig
from datamodules.crops import crop, decode
from datamodules.processes import Processes

PICTURES = layouts.imagenet_pictures()
CUT = 48  # the truncated one
GOOD = [k for k in range(len(PICTURES)) if k != CUT]
RAW_SETS = ["imagenet256", "imagenet512", "lsun_bedrooms256", "folder"]


def dataset(name):
    return importlib.import_module(f"datamodules.{name}").DATASET


def expected(rows, rule="adm_imagenet", size=32):
    squares = [crop(decode(PICTURES[row].content, "picture"), rule, size) for row in rows]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "index"))
    monkeypatch.setattr(sources, "_records", tmp_path / "records")
    forget()


def forget():
    """What a process remembers of the sets it has opened."""
    for memo in (sources._opened, sources._readable, sources._cropped):
        memo.cache_clear()


@pytest.fixture
def tree(roots):
    return DataConfig(root=str(roots["synset folders"]), resolution=32, on_error="skip")


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_gives_the_same_squares_with_their_labels(roots, layout):
    images, labels = dataset("imagenet256").images(DataConfig(root=str(roots[layout]), resolution=32, on_error="skip"))
    rows = np.arange(len(images))
    if layout == "Parquet":  # in the order of its shards, as any other would read each of them many times
        names = [images.raw.name(row) for row in rows]
        assert (images.raw.storage_order == rows).all() and names != sorted(names)
        rows = np.argsort(names)
    squares = images[:][torch.from_numpy(rows)]
    assert torch.equal(squares, expected(GOOD))
    assert labels[rows].tolist() == [k // layouts.PER_CLASS for k in GOOD]


@pytest.mark.parametrize("rows", [slice(3, 9), slice(0, 40, 7), slice(210, 500)])
def test_slices_are_those_of_a_tensor(tree, rows):
    images, _ = dataset("imagenet256").images(tree)
    assert torch.equal(images[rows], expected(GOOD)[rows])


@pytest.mark.parametrize("rule", ["adm_lsun", "ldm"])
def test_the_crop_rule_can_be_chosen(tree, rule):
    data, settings = dataset("imagenet256"), replace(tree, crop=rule, subset=20)
    images, _ = data.images(settings)
    number = {picture.name: k for k, picture in enumerate(PICTURES)}
    whole = expected([number[images.raw.name(k)] for k in range(len(images))], rule)
    assert torch.equal(images[:], whole)
    assert data.rule(settings) != data.rule(tree) and data.identity(settings) != data.identity(tree)


def test_a_damaged_picture_stops_by_name(tree):
    images, _ = dataset("imagenet256").images(replace(tree, on_error="stop"))
    assert len(images) == 220
    with pytest.raises(ValueError, match=rf"{PICTURES[CUT].name} cannot be decoded: .*truncated.*data\.on_error=skip"):
        images[40:60]


def test_a_damaged_picture_is_left_out_and_listed(tree):
    images, labels = dataset("imagenet256").images(tree)
    (sentence,) = sources.skipped_of(images)
    assert sentence.startswith(f"{PICTURES[CUT].name} cannot be decoded")
    assert len(images) == len(labels) == 219
    whole, _ = dataset("imagenet256").images(replace(tree, on_error="stop"))
    assert images.fingerprint != whole.fingerprint


def test_all_pictures_are_decoded_once_for_all_processes(tree, monkeypatch):
    first = dataset("imagenet256").images(tree)[0]
    sources._readable.cache_clear()
    monkeypatch.setattr(sources, "unreadable", None)  # would raise if it were called again
    monkeypatch.setattr(Processes, "here", lambda: Processes(1, 2))
    assert dataset("imagenet256").images(tree)[0].fingerprint == first.fingerprint


# --- the record of unreadable pictures ------------------------------------------------------------------------------

BLANK = replace(PICTURES[3], content=bytes(len(PICTURES[3].content)))  # as long as the sound picture


@pytest.fixture
def blank(tmp_path):
    """Ten pictures, one of which is a file of zeros."""
    layouts.write_tree(tmp_path / "set", [BLANK if k == 3 else picture for k, picture in enumerate(PICTURES[:10])])
    return DataConfig(root=str(tmp_path / "set"), resolution=32, on_error="skip")


def length(settings):
    forget()
    return len(dataset("imagenet256").images(settings)[0])


def test_a_set_without_damage_is_the_same_whatever_is_done_at_damage(blank, tmp_path):
    layouts.write_tree(tmp_path / "set", PICTURES[:10])
    skip, stop = (dataset("imagenet256").images(replace(blank, on_error=choice))[0] for choice in ("skip", "stop"))
    assert skip.raw is stop.raw


def break_disk(monkeypatch):
    """One file gives an I/O error from now on."""
    whole = Path.read_bytes

    def read(path):
        if path.name == f"{PICTURES[5].stem}.JPEG":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read)


@pytest.mark.parametrize("place", ["set", "sound copy"])
def test_a_picture_that_can_be_decoded_now_is_back(blank, tmp_path, place):
    assert length(blank) == 9
    layouts.write_tree(tmp_path / place, PICTURES[:10])
    assert length(replace(blank, root=str(tmp_path / place))) == 10
    (record,) = (tmp_path / "records").iterdir()
    assert record.read_text() == "{}"


def test_a_picture_damaged_since_says_how_to_look_again(blank, tmp_path):
    layouts.write_tree(tmp_path / "set", PICTURES[:10])
    assert length(blank) == 10
    layouts.write_tree(tmp_path / "set", [BLANK])
    forget()
    with pytest.raises(ValueError, match=rf"cannot be decoded.* when {tmp_path}/records/\S*\.json was made: remove"):
        dataset("imagenet256").images(blank)[0][:]


def test_a_disk_that_fails_is_no_damaged_picture(blank, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_disk(patch)
        with pytest.raises(ValueError, match=rf"{PICTURES[5].name} cannot be read: Input/output error.*try again"):
            length(blank)
        assert not list((tmp_path / "records").iterdir())
    assert length(blank) == 9
    break_disk(monkeypatch)
    with pytest.raises(ValueError, match=r"Input/output error\.$"):  # nothing of leaving it out
        dataset("imagenet256").images(blank)[0][:]


def test_a_record_that_is_none_is_made_anew(blank, tmp_path):
    length(blank)
    (record,) = (tmp_path / "records").iterdir()
    whole = record.read_text()
    for torn in ("", "[]", whole[:-5]):
        record.write_text(torn)
        assert length(blank) == 9 and record.read_text() == whole


def test_a_record_that_cannot_be_kept_is_told(blank, tmp_path, monkeypatch):
    (tmp_path / "records").touch()
    with pytest.raises(ValueError, match=r"records/\S*\.json cannot be written: File exists\. .*paths\.cache"):
        length(blank)
    monkeypatch.setattr(sources, "_records", tmp_path / "others")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot be written: No space left on device\. Make room"):
        length(blank)
    assert not list((tmp_path / "others").iterdir())


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_processes_without_a_common_home_share_the_record(blank, tmp_path):
    """With an outdated one in place, which none of them may go by."""
    length(blank)
    layouts.write_tree(tmp_path / "set", PICTURES[:10])
    layouts.write_tree(tmp_path / "set", [replace(PICTURES[7], content=bytes(len(PICTURES[7].content)))])

    def look(rank, answers):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "XDG_CACHE_HOME": str(tmp_path / f"home{rank}")}
        if rank == 0:
            time.sleep(0.5)
        forget()
        images = dataset("imagenet256").images(blank)[0]
        answers.put((images.fingerprint, sources.skipped_of(images)))

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=look, args=(rank, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    first, second = (answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert first == second and first[1][0].startswith(PICTURES[7].name)


# --- parts, processes, other sets -----------------------------------------------------------------------------------


def test_classes_and_subset_choose_among_the_pictures(tree):
    chosen = (layouts.SYNSETS[3], layouts.SYNSETS[1])
    images, labels = dataset("imagenet256").images(replace(tree, classes=chosen))
    assert images.raw.classes == (layouts.SYNSETS[1], layouts.SYNSETS[3])  # in their own order, numbered anew
    assert torch.bincount(labels).tolist() == [43, 44]
    few, _ = dataset("imagenet256").images(replace(tree, classes=chosen, subset=10, on_error="stop"))
    again, _ = dataset("imagenet256").images(replace(tree, classes=chosen, subset=10, on_error="stop"))
    assert len(few) == 10 and few.fingerprint == again.fingerprint


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_crop_the_same_squares(tree, method):
    images, _ = dataset("imagenet256").images(tree)
    here = images[10:30]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert torch.equal(pool.apply(images.__getitem__, (slice(10, 30),)), here)


def test_lsun_is_unlabelled_and_folders_have_the_classes_they_have(tmp_path):
    layouts.write_lmdb(tmp_path / "lsun" / "bedroom_train_lmdb", layouts.lsun_pictures(40))
    layouts.write_tree(tmp_path / "photos", PICTURES[:60])
    lsun, labels = dataset("lsun_bedrooms256").images(DataConfig(root=str(tmp_path / "lsun"), resolution=16))
    assert lsun.rule == "adm_lsun" and lsun[:].shape == (40, 3, 16, 16) and not labels.any()
    assert dataset("lsun_bedrooms256").num_classes == 0
    photos, labels = dataset("folder").images(DataConfig(root=str(tmp_path / "photos"), resolution=16))
    assert photos.raw.classes == layouts.SYNSETS[:2] and torch.bincount(labels).tolist() == [44, 16]


@pytest.mark.parametrize("name", RAW_SETS)
def test_a_set_without_its_pictures_says_what_it_needs(name, tmp_path):
    with pytest.raises(ValueError, match=r"needs data\.root: "):
        dataset(name).images(DataConfig())
    with pytest.raises(ValueError, match="nowhere"):
        dataset(name).images(DataConfig(root=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("name", ["digits", "synthetic"])
@pytest.mark.parametrize("given", [{"root": "/data"}, {"crop": "ldm"}, {"classes": ("0",)}])
def test_sets_that_bring_their_images_leave_no_such_choice(name, given):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(given))} is given, but .* no such choice"):
        dataset(name).images(DataConfig(**given))


@pytest.mark.parametrize(
    "bad", [{"crop": "centre"}, {"on_error": "ignore"}, {"dtype": "bfloat16"}, {"resolution": 0}, {"classes": ()}]
)
def test_impossible_choices_are_refused(bad):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(bad))} is "):
        DataConfig(**bad)
