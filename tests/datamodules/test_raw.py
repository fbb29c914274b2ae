"""Raw picture sets: every layout of the same pictures is the same set, in any process; what is wrong is named."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import raw_layouts as layouts
from PIL import Image
from timm.data import ImageNetInfo

from datamodules import archives, imagenet_raw, raw
from datamodules.imagenet_raw import open_imagenet
from datamodules.raw import Rows, compare_classes, open_folder

PICTURES = layouts.imagenet_pictures()
CONTENTS = [picture.content for picture in PICTURES]
FEW = layouts.imagenet_pictures(seed=1, per_class=6, synsets=layouts.SYNSETS[:3])
ARCHIVES = ["tar of tars", "synset tars", "WebDataset"]


# --- all layouts are one set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_gives_the_same_pictures_in_the_same_order(roots, layout):
    images = open_imagenet(roots[layout])
    assert layouts.read_all(images) == CONTENTS
    assert images.classes == layouts.SYNSETS
    assert images.labels.dtype == np.int64 and images.labels.tolist() == layouts.class_numbers(PICTURES)
    suffix = ".jpg" if layout == "WebDataset" else ".JPEG"
    assert [images.name(k) for k in range(len(images))] == [f"{p.synset}/{p.stem}{suffix}" for p in PICTURES]


def test_the_generated_pictures_are_as_awkward_as_the_real_ones():
    grey, cmyk, turned, png, cut = (Image.open(io.BytesIO(content)) for content in CONTENTS[44:49])
    assert (grey.mode, cmyk.mode, png.format) == ("L", "CMYK", "PNG")
    assert turned.getexif()[layouts.ORIENTATION] == 6
    with pytest.raises(OSError, match="truncated"):
        cut.load()
    assert len({Image.open(io.BytesIO(content)).size for content in CONTENTS}) > 100


@pytest.mark.parametrize("layout", ["Kaggle", "tar of tars", "Parquet", "WebDataset"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_what_this_one_has_open(roots, layout, method):
    images = open_imagenet(roots[layout])
    assert layouts.read_all(images) == CONTENTS  # files are open here now
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(layouts.read_all, (images,)) == CONTENTS
    assert layouts.read_all(images) == CONTENTS


def test_a_forked_child_reads_through_the_inherited_object(roots):
    """As DataLoader workers do: nothing is pickled on the way."""
    for layout in ("tar of tars", "Parquet"):
        images = open_imagenet(roots[layout])
        images.read(7)
        child = os.fork()
        if child == 0:
            os._exit(0 if layouts.read_all(images) == CONTENTS else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert images.read(7) == CONTENTS[7]


@pytest.mark.parametrize("layout", ["synset tars", "Parquet"])
def test_threads_read_at_once_with_few_files_held_open(roots, layout, monkeypatch):
    monkeypatch.setattr(archives, "OPEN_FILES", 2)
    images = open_imagenet(roots[layout])
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(images)), 3)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(images.read, order)) == [CONTENTS[k] for k in order]
    if layout == "synset tars":
        assert len(images._open) <= 2


def test_a_pickled_set_carries_names_but_no_pictures(roots):
    for layout in ("tar of tars", "Parquet"):
        images = open_imagenet(roots[layout])
        layouts.read_all(images)
        assert len(pickle.dumps(images)) < 100 * len(images) < sum(map(len, CONTENTS))


def test_the_description_says_what_was_found(roots):
    assert open_imagenet(roots["Kaggle"]).description == (
        f"synset folders, 220 pictures in 5 classes at {roots['Kaggle']}/ILSVRC/Data/CLS-LOC/train"
    )


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_fingerprints_tell_sets_apart_and_not_places(roots, tmp_path):
    same = {open_imagenet(roots[name]).fingerprint for name in ("synset folders", "Kaggle", *ARCHIVES[:2])}
    assert len(same) == 1
    shorter = [*FEW[:4], replace(FEW[4], content=FEW[4].content[:-1]), *FEW[5:]]
    renamed = [*FEW[:4], replace(FEW[4], stem=FEW[4].stem + "0"), *FEW[5:]]
    moved = [replace(FEW[5], synset=FEW[6].synset) if k == 5 else picture for k, picture in enumerate(FEW)]
    prints = []
    for number, pictures in enumerate([FEW, shorter, renamed, moved, FEW[1:]]):
        layouts.write_tree(tmp_path / str(number), pictures)
        prints.append(open_imagenet(tmp_path / str(number)).fingerprint)
    assert len(set(prints)) == len(prints)


def test_sizes_are_looked_up_once_for_all_fingerprints(roots, monkeypatch):
    """A million files take a while."""
    images, whole, calls = open_imagenet(roots["synset folders"]), raw.FileImages.stored_sizes, []
    monkeypatch.setattr(raw.FileImages, "stored_sizes", lambda images: calls.append(1) or whole(images))
    assert images.fingerprint != Rows(images, [0, 1]).fingerprint != Rows(images, [0, 2]).fingerprint
    assert len(calls) == 1


def test_labels_count_where_names_and_sizes_agree(tmp_path):
    prints = set()
    for number, labels in enumerate(("011", "001")):
        (tmp_path / str(number)).mkdir()
        with tarfile.open(tmp_path / str(number) / "x.tar", "w") as tar:
            for key, label in zip("abc", labels, strict=True):
                layouts.add(tar, f"{key}.jpg", b"")
                layouts.add(tar, f"{key}.cls", label.encode())
        prints.add(open_imagenet(tmp_path / str(number)).fingerprint)
    assert len(prints) == 2


def test_a_copied_parquet_set_keeps_its_fingerprint(roots, tmp_path):
    shutil.copytree(roots["Parquet"], tmp_path / "copy")
    assert open_imagenet(tmp_path / "copy").fingerprint == open_imagenet(roots["Parquet"]).fingerprint


# --- the index of archives ------------------------------------------------------------------------------------------


def no_walk(*_):
    raise AssertionError("the archive was walked though its index is in the cache")


def test_the_index_is_read_from_the_cache(tmp_path, monkeypatch):
    layouts.write_nested_tar(tmp_path, FEW)
    first = open_imagenet(tmp_path, tmp_path / "cache")
    monkeypatch.setattr(imagenet_raw, "_inner_tars", no_walk)
    again = open_imagenet(tmp_path, tmp_path / "cache")
    assert layouts.read_all(again) == [picture.content for picture in FEW]
    assert (again.classes, again.warnings, again.fingerprint) == (first.classes, first.warnings, first.fingerprint)


def test_another_archive_in_the_same_place_is_indexed_anew(tmp_path):
    layouts.write_nested_tar(tmp_path, FEW)
    open_imagenet(tmp_path, tmp_path / "cache")
    other = [replace(picture, content=picture.content[::-1]) for picture in reversed(FEW[1:])]
    layouts.write_nested_tar(tmp_path, other)
    images = open_imagenet(tmp_path, tmp_path / "cache")
    assert layouts.read_all(images) == [picture.content for picture in reversed(other)]


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.999], ids=["empty", "a byte", "half", "all but the end"])
def test_a_torn_index_is_made_anew(tmp_path, keep):
    layouts.write_webdataset(tmp_path, FEW)
    cache = tmp_path / "cache"
    open_imagenet(tmp_path, cache)
    whole = layouts.index_file(cache).read_bytes()
    layouts.index_file(cache).write_bytes(whole[: keep if keep in (0, 1) else int(keep * len(whole))])
    assert layouts.read_all(open_imagenet(tmp_path, cache)) == [picture.content for picture in FEW]
    assert len(layouts.index_file(cache).read_bytes()) == len(whole)


def test_an_index_that_cannot_be_kept_is_done_without(tmp_path):
    layouts.write_nested_tar(tmp_path, FEW)
    (tmp_path / "file").touch()
    images = open_imagenet(tmp_path, tmp_path / "file" / "cache")
    assert layouts.read_all(images) == [picture.content for picture in FEW]


def test_processes_may_build_the_index_at_once(roots, tmp_path):
    job = (open_imagenet, roots["tar of tars"], tmp_path / "cache")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(layouts.open_and_read, [job] * 4, chunksize=1) == [CONTENTS] * 4
    assert layouts.index_file(tmp_path / "cache").suffix == ".npz"  # and nothing half-written beside it


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    file = tmp_path / "cache" / "index"
    raw.write_whole(file, lambda stream: stream.write(b"old"))
    with pytest.raises(OSError, match="disk full"):
        raw.write_whole(file, fail)
    assert layouts.index_file(tmp_path / "cache").read_bytes() == b"old"
    with file.open("rb") as reader:  # who has the old file open keeps it whole
        raw.write_whole(file, lambda stream: stream.write(b"new"))
        assert reader.read() == b"old"


# --- what is there and what is not ----------------------------------------------------------------------------------


def test_subsets_are_taken_with_a_warning(roots):
    warnings = open_imagenet(roots["synset folders"]).warnings
    assert layouts.has(warnings, "5 classes; ImageNet-1k has 1000")
    assert layouts.has(warnings, "220 pictures; ImageNet-1k's training split has 1,281,167")


def test_missing_and_foreign_synsets_are_named(tmp_path):
    known = sorted(ImageNetInfo("imagenet-1k").label_names())
    for synset in {*known, "n01000000"} - {"n02105855"}:
        (tmp_path / synset).mkdir()
    layouts.write_tree(tmp_path, FEW[:6])
    (sentence,) = (text for text in open_imagenet(tmp_path).warnings if "classes;" in text)
    assert sentence == ("1000 classes; ImageNet-1k has 1000. Missing: n02105855. Not of ImageNet-1k: n01000000.")
    (tmp_path / "n01000000").rmdir()
    assert layouts.has(open_imagenet(tmp_path).warnings, "999 classes; ImageNet-1k has 1000. Missing: n02105855.")


def test_a_complete_set_gives_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet_raw, "IMAGENET_CLASSES", 3)
    monkeypatch.setattr(imagenet_raw, "IMAGENET_COUNT", 18)
    layouts.write_tree(tmp_path, FEW)
    assert open_imagenet(tmp_path).warnings == ()


def test_an_empty_class_folder_keeps_its_label_and_is_named(tmp_path):
    layouts.write_tree(tmp_path, FEW)
    (tmp_path / "n01000000").mkdir()
    images = open_imagenet(tmp_path)
    assert images.classes == ("n01000000", *layouts.SYNSETS[:3])
    assert images.labels.tolist() == [label + 1 for label in layouts.class_numbers(FEW)]
    assert layouts.has(images.warnings, "1 class folders hold no picture: n01000000")


def test_an_empty_synset_tar_keeps_its_label_and_is_named(tmp_path):
    layouts.write_synset_tars(tmp_path, FEW)
    (tmp_path / "train" / "n01000000.tar").write_bytes(layouts.tar_bytes([]))
    images = open_imagenet(tmp_path)
    assert images.classes[0] == "n01000000" and images.labels.min() == 1
    assert layouts.has(images.warnings, "1 synset tars hold no picture: n01000000")


@pytest.mark.parametrize("backwards", [False, True])
def test_files_of_other_kinds_are_named(tmp_path, monkeypatch, backwards):
    layouts.write_tree(tmp_path, FEW)
    for name in ("notes.txt", ".hidden.JPEG", "n01440764_99999.png"):
        (tmp_path / "n01440764" / name).write_bytes(CONTENTS[0])
    listed = os.scandir  # gives no order; the other file comes first or last here
    monkeypatch.setattr(
        raw.os, "scandir", lambda folder: sorted(listed(folder), key=lambda e: e.name.endswith(".txt") != backwards)
    )
    images = open_imagenet(tmp_path)
    assert len(images) == len(FEW) + 1
    assert layouts.has(images.warnings, "1 files are not pictures and were left out: n01440764/notes.txt")
    assert layouts.has(
        images.warnings, "1 pictures are not named .JPEG and were taken too: n01440764/n01440764_99999.png"
    )


def test_a_first_synset_folder_without_pictures_does_not_hide_the_others(tmp_path):
    layouts.write_tree(tmp_path / "train", FEW)
    (tmp_path / "train" / "n01000000").mkdir()
    (tmp_path / "train" / "n01000000" / "readme.txt").touch()
    images = open_imagenet(tmp_path)
    assert len(images) == len(FEW) and layouts.has(images.warnings, "1 class folders hold no picture: n01000000")


def test_resource_forks_in_tars_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "n01440764.tar", "w") as tar:
        for name in ("._n01440764_1.JPEG", "n01440764_1.JPEG", "readme.txt"):
            layouts.add(tar, name, name.encode())
    images = open_imagenet(tmp_path)
    assert layouts.read_all(images) == [b"n01440764_1.JPEG"]
    assert layouts.has(images.warnings, "1 files are not pictures and were left out: n01440764/readme.txt")


def test_folders_come_before_archives_and_the_rest_is_named(tmp_path):
    layouts.write_nested_tar(tmp_path, PICTURES)
    layouts.write_tree(tmp_path, FEW)
    images = open_imagenet(tmp_path)
    assert len(images) == len(FEW) and layouts.has(images.warnings, "Also there and not read: a tar of synset tars.")


@pytest.mark.parametrize("layout, file", [("tar of tars", "ILSVRC2012_img_train.tar"), ("synset tars", "train")])
def test_the_root_may_be_the_archive_itself(roots, layout, file):
    assert layouts.read_all(open_imagenet(roots[layout] / file)) == CONTENTS


def test_a_broken_tar_beside_a_good_set_does_no_harm(tmp_path):
    layouts.write_tree(tmp_path, FEW)
    (tmp_path / "ILSVRC2012_img_test.tar").touch()
    (tmp_path / "folder.tar").mkdir()
    assert len(open_imagenet(tmp_path)) == len(FEW)


def test_links_are_followed_once(tmp_path):
    layouts.write_tree(tmp_path / "a" / "train", FEW)
    (tmp_path / "a" / "circle").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert len(open_imagenet(tmp_path)) == len(FEW)


@pytest.mark.parametrize("target", [".", "..", "../n01443537", "self"])
def test_links_inside_a_class_folder_do_not_run_in_circles(tmp_path, target):
    """What lies beside the class may be meant, and is followed; the folders around the link are not."""
    layouts.write_tree(tmp_path, FEW)
    (tmp_path / "n01440764" / "deeper").mkdir()
    for folder in ("n01440764", "n01440764/deeper"):
        (tmp_path / folder / "self").symlink_to(target)
    (tmp_path / "n01443537" / "back").symlink_to("../n01440764")
    images = open_imagenet(tmp_path)
    beside = target == "../n01443537"
    assert np.bincount(images.labels).tolist() == [6 * (1 + beside), 6 * 2, 6]
    assert open_folder(tmp_path).fingerprint == images.fingerprint


def test_a_link_to_the_set_itself_is_no_class(tmp_path):
    layouts.write_tree(tmp_path, FEW)
    (tmp_path / "all").symlink_to(".")
    (tmp_path / "above").symlink_to("..")
    assert open_folder(tmp_path).classes == layouts.SYNSETS[:3]


def test_folders_that_may_not_be_read_are_passed_over_with_a_warning(tmp_path, closed):
    layouts.write_tree(tmp_path / "train", FEW)
    for place in (tmp_path, tmp_path / "train" / "n01440764"):
        (place / closed).mkdir()
    images = open_imagenet(tmp_path)
    assert len(images) == len(FEW)
    for place in (tmp_path, tmp_path / "train" / "n01440764"):
        assert layouts.has(images.warnings, f"1 folders may not be read: {place}/{closed}.")
    assert len(open_folder(tmp_path / "train")) == len(FEW)
    for open_set in (open_imagenet, open_folder):
        with pytest.raises(ValueError, match=r"lost\+found.* may not be read|may not be read: .*/lost\+found"):
            open_set(tmp_path / closed)


def test_links_to_nothing_are_no_pictures(tmp_path):
    layouts.write_tree(tmp_path, FEW)
    (tmp_path / "n01440764" / "n01440764_99999.JPEG").symlink_to(tmp_path / "gone")
    assert len(open_imagenet(tmp_path)) == len(FEW)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    layouts.write_tree(tmp_path / "tree", FEW)
    images = open_imagenet(tmp_path / "tree")
    (tmp_path / "tree" / FEW[0].name).unlink()
    (tmp_path / "hub").mkdir()
    layouts.write_parquet(tmp_path / "hub", [replace(FEW[0], content=None), *FEW[1:]])
    hub = open_imagenet(tmp_path / "hub")
    for pictures, reason in ((images, "No such file"), (hub, r"its row of .*parquet holds no bytes")):
        with pytest.raises(ValueError, match=rf"{FEW[0].stem}\S* cannot be read: {reason}"):
            layouts.read_all(pictures)


def test_the_official_tar_is_preferred_to_the_small_one_beside_it(tmp_path):
    layouts.write_nested_tar(tmp_path, FEW[:6])
    (tmp_path / "ILSVRC2012_img_train.tar").rename(tmp_path / "ILSVRC2012_img_train_t3.tar")
    layouts.write_nested_tar(tmp_path, FEW)
    assert len(open_imagenet(tmp_path)) == len(FEW)


def test_two_training_trees_are_not_chosen_between(tmp_path):
    for name in ("a", "b"):
        layouts.write_tree(tmp_path / name, FEW)
    with pytest.raises(ValueError, match=r"pictures in 2 places: .*/a, .*/b\. Give one of them"):
        open_imagenet(tmp_path)


def test_nothing_found_says_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(layouts.tar_bytes(FEW))
    (tmp_path / "devkit").mkdir()
    wanted = (
        r"synset folders.*ILSVRC2012_img_train\.tar.*Parquet.*WebDataset.*There is: ILSVRC2012_img_val\.tar, devkit"
    )
    with pytest.raises(ValueError, match=wanted + r".*ILSVRC2012_img_val\.tar: damaged, or without synsets"):
        open_imagenet(tmp_path)
    with pytest.raises(ValueError, match=r"There is no .*nowhere"):
        open_imagenet(tmp_path / "nowhere")


# --- damaged or foreign archives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tar of tars", "Parquet"])
def test_a_cut_archive_is_named_at_opening(tmp_path, layout):
    layouts.LAYOUTS[layout](tmp_path, FEW)
    file = next(path for path in sorted(tmp_path.rglob("*")) if "train" in path.name and path.is_file())
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged or not a"):
        open_imagenet(tmp_path)


def test_an_archive_cut_while_in_use_is_named_with_its_picture(tmp_path):
    layouts.write_synset_tars(tmp_path, FEW)
    images = open_imagenet(tmp_path)
    file = tmp_path / "train" / "n01440764.tar"
    os.truncate(file, 600)
    with pytest.raises(ValueError, match=r"n01440764\.tar is cut short: n01440764/n01440764_\d+\.JPEG is not whole"):
        layouts.read_all(images)


def test_an_unlabelled_parquet_split_is_refused(roots):
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet has label -1.*Give the training shards"):
        open_imagenet(roots["Parquet"] / "data" / "test-00000-of-00001.parquet")


def test_a_foreign_parquet_file_is_refused(tmp_path):
    pa = layouts.pa
    pa.parquet.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet has the columns text, label; wanted are image"):
        open_imagenet(tmp_path)


@pytest.mark.parametrize(
    "members, named",
    [
        ({"a.cls": b"0", "a.jpg": b"", "b.jpg": b""}, r"x\.tar has pictures without a \.cls file: b\.jpg"),
        ({"a.jpg": b"", "a.cls": b"tench"}, r"x\.tar: a\.cls holds b'tench', not a class number"),
        ({"a.cls": b"0"}, "hold no picture"),
    ],
)
def test_a_shard_without_labels_or_pictures_is_refused(tmp_path, members, named):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in members.items():
            layouts.add(tar, name, content)
    with pytest.raises(ValueError, match=named):
        open_imagenet(tmp_path)


# --- class numbers of shards ----------------------------------------------------------------------------------------


def test_foreign_class_numbers_are_replaced_by_the_order_of_synsets(tmp_path):
    foreign = [{0: 2, 1: 1, 2: 0}[label] for label in layouts.class_numbers(FEW)]
    layouts.write_parquet(tmp_path, FEW, numbers=foreign)
    images = open_imagenet(tmp_path)
    assert images.labels.tolist() == layouts.class_numbers(FEW)
    assert layouts.has(images.warnings, "number 2 classes otherwise (n01440764 is 2)")


def test_a_class_with_two_numbers_is_refused(tmp_path):
    layouts.write_parquet(tmp_path, FEW, numbers=[7, *layouts.class_numbers(FEW)[1:]])
    with pytest.raises(ValueError, match="n01440764 carry several class numbers"):
        open_imagenet(tmp_path)


@pytest.mark.parametrize("titles, classes", [((), ("0", "1", "2")), (("tench", "goldfish", "collie", "cat"),) * 2])
def test_without_synsets_the_numbers_stand(tmp_path, titles, classes):
    layouts.write_parquet(tmp_path, FEW, titles=titles, named=False)
    images = open_imagenet(tmp_path)
    assert images.classes == classes
    assert images.labels.tolist() == layouts.class_numbers(FEW)
    assert layouts.read_all(images) == [picture.content for picture in FEW]
    assert layouts.has(images.warnings, "File names without synset")


# --- folders of any pictures ----------------------------------------------------------------------------------------


def test_class_folders_are_labelled_in_the_order_of_their_names(tmp_path):
    for name in ("dog/2.webp", "cat/x/1.JPEG", "dog/10.PNG", "cat/0.jpg", ".git/1.png", "dog/.1.png", "eel/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    images = open_folder(tmp_path)
    assert images.classes == ("cat", "dog", "eel")
    assert layouts.read_all(images) == [b"cat/0.jpg", b"cat/x/1.JPEG", b"dog/10.PNG", b"dog/2.webp"]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert layouts.has(images.warnings, "hold no picture: eel") and layouts.has(
        images.warnings, "left out: eel/notes.txt"
    )


def test_flat_pictures_have_no_classes(tmp_path):
    for name in ("b.png", "a.jpeg", "c.txt", ".d.png"):
        (tmp_path / name).write_text(name)
    (tmp_path / "thumbnails").mkdir()
    images = open_folder(tmp_path)
    assert [images.name(k) for k in range(len(images))] == ["a.jpeg", "b.png"]
    assert layouts.read_all(images) == [b"a.jpeg", b"b.png"]
    assert images.classes == () and images.labels.tolist() == [0, 0]
    assert layouts.has(images.warnings, "1 files are not pictures and were left out: c.txt")


def test_folders_that_are_neither_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"No pictures \(\.bmp, .*There is: notes\.txt"):
        open_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    for name in ("cat/1.png", "1.png"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds 1\.png beside class folders \(cat\)"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        open_folder(tmp_path / "nowhere")


# --- parts of a set -------------------------------------------------------------------------------------------------


def test_rows_are_taken_in_the_order_given(roots):
    images = open_imagenet(roots["tar of tars"])
    part = Rows(images, [200, 3, 45])
    assert layouts.read_all(part) == [CONTENTS[k] for k in (200, 3, 45)]
    assert part.labels.tolist() == [4, 0, 1] and part.classes == images.classes
    assert part.name(1) == images.name(3)


def test_chosen_classes_equal_a_tree_of_them(roots, tmp_path):
    chosen = [layouts.SYNSETS[3], layouts.SYNSETS[1]]
    part = Rows(open_imagenet(roots["Kaggle"]), classes=chosen)
    layouts.write_tree(tmp_path, [picture for picture in PICTURES if picture.synset in chosen])
    tree = open_imagenet(tmp_path)
    assert part.classes == tree.classes == tuple(sorted(chosen))
    assert part.labels.tolist() == tree.labels.tolist()
    assert layouts.read_all(part) == layouts.read_all(tree)
    assert "88 pictures in 2 of 5 classes" in part.description


def test_rows_and_classes_restrict_together(roots):
    images = open_imagenet(roots["synset folders"])
    part = Rows(images, [200, 3, 45, 201], classes=[layouts.SYNSETS[4], layouts.SYNSETS[0]])
    assert [part.name(k) for k in range(3)] == [images.name(k) for k in (200, 3, 201)]
    assert part.labels.tolist() == [1, 0, 1]
    assert Rows(part, [1], classes=[layouts.SYNSETS[0]]).read(0) == CONTENTS[3]


def test_parts_have_fingerprints_of_their_own(roots):
    images = open_imagenet(roots["synset folders"])
    parts = [images, Rows(images, [0, 1]), Rows(images, [1, 0]), Rows(images, [0, 1], classes=[layouts.SYNSETS[0]])]
    assert len({part.fingerprint for part in parts}) == 4
    assert Rows(open_imagenet(roots["Kaggle"]), [0, 1]).fingerprint == parts[1].fingerprint


@pytest.mark.parametrize(
    "choice, named",
    [
        ({"rows": [3, 220]}, "Row 220 was asked for, but the set has 220 pictures"),
        ({"rows": [-1]}, "Row -1 was asked for"),
        ({"classes": ["n01440764", "n99999999"]}, "no class n99999999: its classes are n01440764, .* and 2 more"),
        ({"rows": [0], "classes": ["n15075141"]}, "No picture is left"),
    ],
)
def test_impossible_parts_are_refused(roots, choice, named):
    with pytest.raises(ValueError, match=named):
        Rows(open_imagenet(roots["synset folders"]), **choice)


@pytest.fixture
def row_groups_read(monkeypatch):
    """The row groups read from now on, one entry each time."""
    read, whole = [], layouts.pa.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        layouts.pa.parquet.ParquetFile, "read_row_group", lambda *a, **k: read.append(a[1]) or whole(*a, **k)
    )
    return read


def test_storage_order_reads_each_row_group_once(roots, row_groups_read):
    images = open_imagenet(roots["Parquet"])
    row_groups_read.clear()
    stored = Rows(images, images.storage_order)
    assert sorted(layouts.read_all(stored)) == sorted(CONTENTS)
    groups = sum(-(-len(part) // layouts.HUB_ROWS) for part in np.array_split(np.arange(220), layouts.HUB_SHARDS))
    assert len(row_groups_read) == groups

    row_groups_read.clear()
    few = Rows(images, np.arange(0, 220, 3))
    assert layouts.read_all(Rows(few, few.storage_order)) == [CONTENTS[k] for k in images.storage_order if k % 3 == 0]
    assert len(row_groups_read) <= groups


def test_threads_read_each_row_group_once(roots, row_groups_read, monkeypatch):
    images, whole = open_imagenet(roots["Parquet"]), archives.ParquetImages._read_group
    row_groups_read.clear()
    monkeypatch.setattr(archives.ParquetImages, "_read_group", lambda *a: time.sleep(0.02) or whole(*a))
    first = images.storage_order[: layouts.HUB_ROWS].tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(images.read, first)) == [CONTENTS[k] for k in first]
    assert len(row_groups_read) == 1


def test_a_row_group_that_fails_leaves_the_lock_free(roots, tmp_path):
    shutil.copytree(roots["Parquet"], tmp_path / "hub")
    images = open_imagenet(tmp_path / "hub")
    shutil.rmtree(tmp_path / "hub")
    for _ in range(2):
        with pytest.raises(raw.ReadFailed, match=r"Row group 0 of .*\.parquet cannot be read"):
            images.read(int(images.storage_order[0]))


def test_readers_on_both_sides_of_a_border_share_two_row_groups(roots, row_groups_read):
    images = open_imagenet(roots["Parquet"])
    row_groups_read.clear()
    sides = images.storage_order[[layouts.HUB_ROWS - 1, layouts.HUB_ROWS]]
    for k in [*sides, *sides, *sides]:
        assert images.read(k) == CONTENTS[k]
    assert len(row_groups_read) == 2


@pytest.mark.parametrize(
    "found, expected, sentence",
    [
        ("abc", "abc", None),
        ("ac", "abc", r"lacks 1 of the 3 expected classes \(b\), so"),
        ("abcd", "abc", r"has 1 that were not expected \(d\), so"),
        ("abd", "abc", r"lacks 1 of .*\(c\) and has 1 that .*\(d\)"),
        ("acb", "abc", "the expected 3 in another order: label 1 is c, not b"),
        ("", "abcdefg", r"lacks 7 .*\(a, b, c and 4 more\)"),
    ],
)
def test_classes_are_compared_in_a_sentence(found, expected, sentence):
    answer = compare_classes(tuple(found), tuple(expected))
    if sentence is None:
        assert answer is None
    else:
        with pytest.raises(ValueError, match=sentence):
            raise ValueError(answer)
