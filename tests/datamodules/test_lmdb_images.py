"""LSUN's databases: keys in order, one index that is never stale or torn, one open handle per process."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import raw_layouts as layouts

from datamodules import lmdb_images
from datamodules.lmdb_images import open_lsun
from datamodules.raw import Rows

ENTRIES = layouts.lsun_pictures()
CONTENTS = [ENTRIES[key] for key in sorted(ENTRIES)]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return layouts.write_lmdb(tmp_path_factory.mktemp("lsun") / "bedroom_train_lmdb", ENTRIES)


def no_walk(*_):
    raise AssertionError("the keys were walked though their index is in the cache")


# --- pictures and keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["hex", "sized"])
@pytest.mark.parametrize("form", ["WEBP", "JPEG"])
def test_pictures_come_in_the_order_of_their_keys(tmp_path, style, form):
    entries = layouts.lsun_pictures(20, form=form, style=style)
    layouts.write_lmdb(tmp_path, dict(reversed(entries.items())))
    images = open_lsun(tmp_path)
    assert [images.name(k).encode() for k in range(20)] == sorted(entries)
    assert layouts.read_all(images) == [entries[key] for key in sorted(entries)]
    assert images.classes == () and images.labels.tolist() == [0] * 20
    assert f"the first {'WebP' if form == 'WEBP' else 'JPEG'}, at {tmp_path}" in images.description


def test_the_published_count_is_expected(database, monkeypatch):
    assert layouts.has(open_lsun(database).warnings, "60 pictures; LSUN-Bedrooms' training split has 3,033,042")
    monkeypatch.setattr(lmdb_images, "BEDROOM_COUNT", 60)
    assert open_lsun(database).warnings == ()


def test_of_several_sizes_the_largest_is_taken(tmp_path):
    entries = {b"128-0000000": b"s", b"256-0000000": b"a", b"256-0000001": b"b", b"64-0000000": b"t", b"length": b"2"}
    images = open_lsun(layouts.write_lmdb(tmp_path, entries))
    assert layouts.read_all(images) == [b"a", b"b"]
    assert layouts.has(images.warnings, "3 entries have keys of another kind than 256-0000000 and were left out")


def test_hex_keys_are_told_from_others(tmp_path):
    images = open_lsun(layouts.write_lmdb(tmp_path, ENTRIES | {b"num-samples": b"60", b"zzz": b""}))
    assert layouts.read_all(images) == CONTENTS
    assert layouts.has(images.warnings, "2 entries have keys of another kind")


def test_keys_of_no_known_style_are_all_taken(tmp_path):
    images = open_lsun(layouts.write_lmdb(tmp_path, {b"b.jpg": b"2", b"aaa.jpg": b"1"}))
    assert layouts.read_all(images) == [b"1", b"2"]


def test_the_fingerprint_is_of_keys_and_sizes(tmp_path, database):
    whole = open_lsun(database).fingerprint
    assert open_lsun(layouts.write_lmdb(tmp_path / "copy", ENTRIES)).fingerprint == whole
    key = sorted(ENTRIES)[7]
    for number, other in enumerate(
        [ENTRIES | {key: ENTRIES[key] + b"x"}, {k: v for k, v in ENTRIES.items() if k != key}]
    ):
        assert open_lsun(layouts.write_lmdb(tmp_path / str(number), other)).fingerprint != whole
    more = open_lsun(layouts.write_lmdb(tmp_path / "more", ENTRIES | {b"#": b"60"}))
    assert more.stored_sizes().tolist() == [len(content) for content in CONTENTS]


# --- processes and threads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False], ids=["index in the cache", "index in memory"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_what_this_one_has_open(database, tmp_path, method, cached):
    images = open_lsun(database, tmp_path if cached else None)
    assert layouts.read_all(images) == CONTENTS
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(layouts.read_all, (images,)) == CONTENTS
    assert layouts.read_all(images) == CONTENTS


def test_a_forked_child_reads_through_the_inherited_object_by_a_handle_of_its_own(database):
    images = open_lsun(database)
    images.read(0)
    inherited = images._env
    child = os.fork()
    if child == 0:
        right = layouts.read_all(images) == CONTENTS and layouts.read_all(open_lsun(database)) == CONTENTS
        os._exit(0 if right and images._env is not inherited else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert layouts.read_all(images) == CONTENTS


def test_views_of_one_database_share_its_handle(database):
    first, second = open_lsun(database), open_lsun(database.parent)
    assert first._env is second._env
    del first
    assert layouts.read_all(Rows(second, [3, 1])) == [CONTENTS[3], CONTENTS[1]]


def test_threads_read_at_once(database, tmp_path):
    images = pickle.loads(pickle.dumps(open_lsun(database, tmp_path)))  # nothing is open yet
    order = np.random.default_rng(0).permutation(np.tile(np.arange(60), 20)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(images.read, order)) == [CONTENTS[k] for k in order]


def test_threads_that_open_at_once_share_the_handle(database, monkeypatch):
    really = lmdb_images.lmdb.open
    monkeypatch.setattr(lmdb_images.lmdb, "open", lambda *a, **k: time.sleep(0.05) or really(*a, **k))
    images = pickle.loads(pickle.dumps(open_lsun(database)))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(images.read, range(4))) == CONTENTS[:4]


def test_a_pickled_set_carries_neither_handle_nor_index(tmp_path):
    entries = {f"256-{k:07d}".encode(): b"x" for k in range(5000)}
    images = open_lsun(layouts.write_lmdb(tmp_path / "db", entries), tmp_path / "cache")
    assert len(pickle.dumps(images)) - images.labels.nbytes < 1000


# --- the key index --------------------------------------------------------------------------------------------------


def test_the_index_is_read_from_the_cache(database, tmp_path, monkeypatch):
    open_lsun(database, tmp_path)
    assert np.load(layouts.index_file(tmp_path)).tolist() == sorted(ENTRIES)
    monkeypatch.setattr(lmdb_images, "_sorted_keys", no_walk)
    assert layouts.read_all(open_lsun(database, tmp_path)) == CONTENTS


@pytest.mark.parametrize("tell", ["time", "last key"])
def test_another_database_in_the_same_place_is_indexed_anew(tmp_path, tell):
    """Of as many entries and bytes, written in as many transactions."""
    cache, file = tmp_path / "cache", tmp_path / "db" / "data.mdb"
    sizes = []
    for seed in (0, 1):
        entries = {f"{k:020x}{seed if 0 < k < 49 or tell == 'last key' else 0:020x}".encode(): b"x" for k in range(50)}
        layouts.write_lmdb(tmp_path / "db", entries)
        if tell == "last key":
            os.utime(file, ns=(0, 0))
        images = open_lsun(tmp_path / "db", cache)
        assert [images.name(k).encode() for k in range(50)] == sorted(entries)
        assert np.load(layouts.index_file(cache)).tolist() == sorted(entries)  # the stale one is gone
        sizes.append(file.stat().st_size)
        del images
    assert sizes[0] == sizes[1]


def test_entries_added_later_are_indexed(tmp_path):
    entries = dict(list(ENTRIES.items())[:40])
    open_lsun(layouts.write_lmdb(tmp_path / "db", entries), tmp_path / "cache")
    with layouts.lmdb.open(str(tmp_path / "db"), map_size=2**28) as environment:
        for key in sorted(ENTRIES)[20:]:  # the ends may stay, count and transaction do not
            with environment.begin(write=True) as transaction:
                transaction.put(key, ENTRIES[key])
    wanted = entries | {key: ENTRIES[key] for key in sorted(ENTRIES)[20:]}
    assert layouts.read_all(open_lsun(tmp_path / "db", tmp_path / "cache")) == [wanted[key] for key in sorted(wanted)]


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999], ids=["empty", "five bytes", "half", "all but the end"])
def test_a_torn_index_is_made_anew(database, tmp_path, keep):
    open_lsun(database, tmp_path)
    whole = layouts.index_file(tmp_path).read_bytes()
    layouts.index_file(tmp_path).write_bytes(whole[: keep if keep in (0, 5) else int(keep * len(whole))])
    assert layouts.read_all(open_lsun(database, tmp_path)) == CONTENTS
    assert layouts.index_file(tmp_path).read_bytes() == whole


def test_an_index_that_cannot_be_kept_is_done_without(database, tmp_path):
    (tmp_path / "file").touch()
    images = open_lsun(database, tmp_path / "file" / "cache")
    assert layouts.read_all(pickle.loads(pickle.dumps(images))) == CONTENTS


def test_an_index_removed_meanwhile_is_made_anew_by_the_process_that_reads(database, tmp_path):
    packed = pickle.dumps(open_lsun(database, tmp_path))
    layouts.index_file(tmp_path).unlink()
    assert layouts.read_all(pickle.loads(packed)) == CONTENTS


def test_a_database_replaced_under_a_set_is_noticed(tmp_path):
    layouts.write_lmdb(tmp_path / "db", ENTRIES)
    packed = pickle.dumps(open_lsun(tmp_path / "db", tmp_path / "cache"))
    layouts.write_lmdb(tmp_path / "db", dict(list(ENTRIES.items())[:9]))
    with pytest.raises(ValueError, match="had 60 pictures when it was opened, now 9"):
        pickle.loads(packed).read(0)


def test_databases_of_like_names_have_an_index_each(tmp_path):
    """torchvision's key cache is named by the letters of the path alone."""
    sets = {name: layouts.lsun_pictures(10 + k, seed=k) for k, name in enumerate(("a1", "a2"))}
    for name, entries in sets.items():
        layouts.write_lmdb(tmp_path / name / "bedroom_train_lmdb", entries)
    for _ in range(2):
        for name, entries in sets.items():
            assert len(open_lsun(tmp_path / name, tmp_path / "cache")) == len(entries)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_may_build_the_index_at_once(database, tmp_path, method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        read = pool.starmap(layouts.open_and_read, [(open_lsun, database, tmp_path)] * 6, chunksize=1)
    assert read == [CONTENTS] * 6
    assert np.load(layouts.index_file(tmp_path)).tolist() == sorted(ENTRIES)  # and nothing half-written beside it


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep, named", [(0.6, "cut short"), (100, "cannot be read"), (0, "cannot be read")])
def test_a_cut_database_is_refused_before_a_read_can_kill_the_process(tmp_path, keep, named):
    file = layouts.write_lmdb(tmp_path, ENTRIES) / "data.mdb"
    os.truncate(file, int(keep * file.stat().st_size) if keep == 0.6 else keep)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{tmp_path}.*{named}"):
            open_lsun(tmp_path)


def test_an_empty_database_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is an empty database"):
        open_lsun(layouts.write_lmdb(tmp_path, {}))


def test_numbers_as_keys_are_refused(tmp_path):
    entries = {number.to_bytes(4, "little"): b"x" for number in range(3)}
    with pytest.raises(ValueError, match="keys that end in a zero byte"):
        open_lsun(layouts.write_lmdb(tmp_path, entries))


def test_a_missing_database_is_told_from_what_is_there(tmp_path):
    (tmp_path / "bedroom_train_lmdb.zip").touch()
    with pytest.raises(
        ValueError, match=r"No bedroom_train_lmdb/data\.mdb at .*There is: bedroom_train_lmdb\.zip.*Unpack"
    ):
        open_lsun(tmp_path)
    layouts.write_lmdb(tmp_path / "church_outdoor_train_lmdb", ENTRIES)
    with pytest.raises(ValueError, match=r"There is: .*/church_outdoor_train_lmdb\."):
        open_lsun(tmp_path)
    assert len(open_lsun(tmp_path / "church_outdoor_train_lmdb")) == 60
    with pytest.raises(ValueError, match="There is no such folder"):
        open_lsun(tmp_path / "nowhere")


def test_the_training_split_is_found_below_the_root_and_alone(tmp_path):
    layouts.write_lmdb(tmp_path / "x" / "bedroom_val_lmdb", layouts.lsun_pictures(3, seed=9))
    layouts.write_lmdb(tmp_path / "x" / "bedroom_train_lmdb", ENTRIES)
    assert layouts.read_all(open_lsun(tmp_path)) == CONTENTS
    layouts.write_lmdb(tmp_path / "y" / "bedroom_train_lmdb", ENTRIES)
    with pytest.raises(ValueError, match="has 2 folders bedroom_train_lmdb"):
        open_lsun(tmp_path)


def test_folders_that_may_not_be_read_are_passed_over_with_a_warning(tmp_path, closed):
    (tmp_path / closed).mkdir()
    with pytest.raises(ValueError, match=r"There is: lost\+found\. 1 folders may not be read: .*Unpack"):
        open_lsun(tmp_path)
    layouts.write_lmdb(tmp_path / "bedroom_train_lmdb", ENTRIES)
    images = open_lsun(tmp_path)
    assert len(images) == 60 and layouts.has(images.warnings, f"1 folders may not be read: {tmp_path}/{closed}.")
