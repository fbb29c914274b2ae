"""Finding ImageNet-1k's training pictures in the layouts people have: synset folders, tars, Parquet, WebDataset."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from datamodules.archives import Ordered, ParquetImages, TarImages, cached_table, opened, packed
from datamodules.raw import (
    EncodedImages,
    FileImages,
    bar,
    entries_of,
    files_below,
    is_picture,
    passed_over,
    reachable,
    some,
)

IMAGENET_CLASSES, IMAGENET_COUNT = 1000, 1_281_167  # train split of ILSVRC 2012
SYNSET = re.compile(r"n\d{8}")
SYNSET_FILE = re.compile(r"(n\d{8})_(\w+?)(?:_\1)?(\.\w+)?")  # Parquet shards of the hub repeat the synset at the end
DEPTH = 6  # folders below the root that are searched; the Kaggle layout needs 4
# What files and folders are told apart as; `other` are tars of no use.
# `closed` are folders that may not be read.
LAYOUTS = ("trees", "nested", "synsets", "parquet", "webdataset", "other", "closed")


def open_imagenet(root: Path, cache: Path | None = None, *, progress: bool = True) -> EncodedImages:
    """ImageNet-1k's training pictures in the first layout found in or below `root`; labels index the sorted synsets.

    Looked for in this order: synset folders (n and 8 digits; plain or as Kaggle unpacks), the official tar of tars, the
    tars of single synsets, Parquet shards of the hub, WebDataset shards. Archives are read in place. Their index is
    kept in the folder `cache` if one is given; it takes a pass over the archive's headers to make.

    A part of the 1000 classes or of the pictures is taken with a warning.

    Raises: ValueError if no layout is found, two folders could be meant, or files are damaged or unlabelled.
    """
    root = Path(root)
    found = _survey(root)
    layouts: list[tuple[str, list[Path], Callable[..., EncodedImages]]] = [
        ("synset folders", found["trees"], _open_trees),
        ("a tar of synset tars", found["nested"], _open_nested_tar),
        ("synset tars", found["synsets"], _open_synset_tars),
        ("Parquet shards", found["parquet"], _open_parquet),
        ("WebDataset shards", found["webdataset"], _open_webdataset),
    ]
    present = [layout for layout in layouts if layout[1]]
    closed = passed_over(found["closed"])
    if not present:
        there = some([entry.name for entry in entries_of(root, [])] if root.is_dir() else [root.name], "nothing")
        loose = f" ({some([path.name for path in found['other']])}: damaged, or without synsets and labels)" * bool(
            found["other"]
        )
        raise ValueError(
            f"No ImageNet training pictures at {root}: looked down to {DEPTH} folders deep for synset folders "
            "(n and 8 digits) with pictures, ILSVRC2012_img_train.tar, tars named by synset, Parquet shards "
            f"(*.parquet) and WebDataset shards (*.tar with .cls). There is: {there}{loose}."
            + "".join(f" {sentence}" for sentence in closed)
        )
    _, paths, open_layout = present[0]
    images = open_layout(root if root.is_dir() else root.parent, paths, cache, progress)
    if not len(images):
        raise ValueError(f"{images.description}: nothing to read.")
    images.warnings += tuple(_other_classes(images.classes))
    if len(images) != IMAGENET_COUNT:
        images.warnings += (f"{len(images):,} pictures; ImageNet-1k's training split has {IMAGENET_COUNT:,}.",)
    images.warnings += tuple(closed)
    if present[1:]:
        images.warnings += (f"Also there and not read: {', '.join(kind for kind, _, _ in present[1:])}.",)
    return images


def _other_classes(classes: Sequence[str]) -> list[str]:
    """A warning where the classes are not ImageNet-1k's; synsets are named."""
    from timm.data import ImageNetInfo  # takes seconds to load

    known = set(ImageNetInfo("imagenet-1k").label_names())
    synsets = [name for name in classes if SYNSET.fullmatch(name)]
    foreign = [name for name in synsets if name not in known]
    if len(classes) == IMAGENET_CLASSES and not foreign:
        return []
    sentence = f"{len(classes)} classes; ImageNet-1k has {IMAGENET_CLASSES}."
    if synsets and (missing := sorted(known.difference(synsets))):
        sentence += f" Missing: {some(missing)}."
    if foreign:
        sentence += f" Not of ImageNet-1k: {some(foreign)}."
    return [sentence]


# --- layouts ----------------------------------------------------------------------------------------------------------


def _survey(root: Path) -> dict[str, list[Path]]:
    """What lies at or below `root`, by layout; folders inside synset folders are not looked into."""
    if not reachable(root.exists):
        raise ValueError(f"There is no {root}.")
    found: dict[str, list[Path]] = {kind: [] for kind in LAYOUTS}
    level, seen = [root], {root.resolve()}
    for _ in range(DEPTH):
        entries = [
            entry
            for folder in level
            for entry in (entries_of(folder, found["closed"]) if folder.is_dir() else [folder])
        ]
        level = []
        for entry in entries:
            if entry.name.startswith(".") or is_picture(entry.name):
                continue
            if entry.suffix == ".tar" and reachable(entry.is_file):
                found[_tar_kind(entry)].append(entry)
            elif entry.suffix == ".parquet" and reachable(entry.is_file):
                found["parquet"].append(entry)
            elif not reachable(entry.is_dir):
                continue
            elif SYNSET.fullmatch(entry.name):
                # A tree has pictures somewhere: Kaggle's annotations have synset folders of their own.
                if entry.parent not in found["trees"] and any(map(is_picture, files_below(entry))):
                    found["trees"].append(entry.parent)
            elif entry.resolve() not in seen:  # links may run in circles
                seen.add(entry.resolve())
                level.append(entry)
    return found


def _tar_kind(path: Path) -> str:
    if SYNSET.fullmatch(path.stem):
        return "synsets"
    try:
        with opened(path) as tar:
            for member in islice(tar, 8):  # a sample's files lie together
                if member.name.endswith(".cls"):
                    return "webdataset"
                if member.name.endswith(".tar") and SYNSET.fullmatch(Path(member.name).stem):
                    return "nested"
    except ValueError:  # a damaged tar matters only if there is nothing else; then it is named
        return "other"
    return "other"


def _of_training(root: Path, paths: Sequence[Path]) -> list[Path]:
    """Those with 'train' in their path below `root`; all of them if none says so."""
    return [path for path in paths if "train" in str(path.relative_to(root)).lower()] or list(paths)


def _only(root: Path, paths: Sequence[Path]) -> Path:
    """Raises: ValueError if more than one is left as the training split."""
    chosen = _of_training(root, paths)
    if len(chosen) > 1:
        raise ValueError(
            f"{root} has pictures in {len(chosen)} places: {some([str(path) for path in chosen])}. Give one of them."
        )
    return chosen[0]


def _open_trees(root: Path, trees: list[Path], cache: Path | None, progress: bool) -> EncodedImages:
    tree = _only(root, trees)
    synsets = sorted(entry.name for entry in tree.iterdir() if SYNSET.fullmatch(entry.name) and reachable(entry.is_dir))
    images = FileImages(tree, "synset folders", synsets, progress=progress)
    odd = [name for name in images.names if Path(name).suffix.lower() not in (".jpeg", ".jpg")]
    if odd:
        images.warnings += (f"{len(odd)} pictures are not named .JPEG and were taken too: {some(odd)}.",)
    return images


def _open_nested_tar(root: Path, tars: list[Path], cache: Path | None, progress: bool) -> EncodedImages:
    official = [path for path in tars if path.name == "ILSVRC2012_img_train.tar"]
    path = _only(root, official or tars)
    return _open_synsets("a tar of synset tars", path, [path], _inner_tars, cache, progress)


def _open_synset_tars(root: Path, tars: list[Path], cache: Path | None, progress: bool) -> EncodedImages:
    folder = _only(root, sorted({path.parent for path in tars}))
    paths = [path for path in tars if path.parent == folder]
    return _open_synsets("synset tars", folder, paths, lambda tar, archive: [(archive.stem, 0, tar)], cache, progress)


def _open_synsets(
    kind: str, root: Path, archives: list[Path], inner: Callable, cache: Path | None, progress: bool
) -> TarImages:
    """`inner` gives the (synset, offset in the archive, open tar) of an open archive."""

    def build() -> dict[str, np.ndarray]:
        members: list[tuple[str, str, int, int, int]] = []  # synset, name, archive, offset, bytes
        synsets, others = set(), []
        found = bar(None, "index", "picture", progress)
        for number, archive in enumerate(archives):
            with opened(archive) as outer:
                for synset, start, tar in inner(outer, archive):
                    synsets.add(synset)
                    for member in tar:
                        name = f"{synset}/{Path(member.name).name}"
                        if not member.isfile() or "/." in name:
                            continue
                        if is_picture(name):
                            members.append((synset, name, number, start + member.offset_data, member.size))
                            found.update()
                        else:
                            others.append(name)
        found.close()
        members.sort()
        classes = sorted(synsets)
        number_of = {synset: label for label, synset in enumerate(classes)}
        labels = np.array([number_of[member[0]] for member in members], np.int64)
        warnings = []
        if empty := sorted(synsets - {member[0] for member in members}):
            warnings.append(f"{len(empty)} synset tars hold no picture: {some(empty)}.")
        if others:
            warnings.append(f"{len(others)} files are not pictures and were left out: {some(sorted(others))}.")
        return packed([member[1] for member in members], labels, np.array([m[2:] for m in members]), classes, warnings)

    return TarImages(kind, root, archives, cached_table(kind, archives, cache, build))


def _inner_tars(outer: tarfile.TarFile, archive: Path) -> Iterator[tuple[str, int, tarfile.TarFile]]:
    for member in outer:
        synset = Path(member.name).stem
        if member.isfile() and SYNSET.fullmatch(synset):
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as tar:
                yield synset, member.offset_data, tar


def _open_webdataset(root: Path, shards: list[Path], cache: Path | None, progress: bool) -> EncodedImages:
    shards = _of_training(root, shards)

    def build() -> dict[str, np.ndarray]:
        names, labels, places = [], [], []
        for number, shard in enumerate(bar(shards, "index", "shard", progress)):
            pictures, classes = {}, {}
            with opened(shard) as tar:
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    key, _, extension = file.partition(".")
                    if file.startswith(".") or not member.isfile():
                        continue
                    if extension == "cls":
                        content = tar.extractfile(member).read().strip()  # type: ignore[union-attr]
                        if not content.isdigit():
                            raise ValueError(f"{shard}: {member.name} holds {content[:20]!r}, not a class number.")
                        classes[folder, key] = int(content)
                    elif is_picture(file):
                        pictures[folder, key] = file, (number, member.offset_data, member.size)
            if unlabelled := [file for sample, (file, _) in pictures.items() if sample not in classes]:
                raise ValueError(f"{shard} has pictures without a .cls file: {some(unlabelled)}.")
            names += [file for file, _ in pictures.values()]
            places += [place for _, place in pictures.values()]
            labels += [classes[sample] for sample in pictures]
        ordered = _order(names, np.array(labels, np.int64), [], str(root))
        return packed(ordered.names, ordered.labels, np.array(places)[ordered.rows], ordered.classes, ordered.warnings)

    return TarImages("WebDataset shards", root, shards, cached_table("WebDataset shards", shards, cache, build))


def _open_parquet(root: Path, shards: list[Path], cache: Path | None, progress: bool) -> EncodedImages:
    import pyarrow
    import pyarrow.parquet

    shards = _of_training(root, shards)
    names: list[str] = []
    labels, places, group_bytes = [], [], []
    titles: list[str] = []  # class names out of the metadata, for sets without synsets
    for number, path in enumerate(bar(shards, "index", "shard", progress)):
        try:
            with pyarrow.parquet.ParquetFile(path) as shard:
                titles = titles or _hub_titles(shard.schema_arrow.metadata or {})
                for group in range(shard.num_row_groups):
                    part = shard.read_row_group(group, ["image.path", "label"], use_threads=False)
                    count = len(part)
                    paths = [image["path"] for image in part["image"].to_pylist()]
                    names += [name or f"{path.stem}-{group}-{row}" for row, name in enumerate(paths)]
                    labels.append(part["label"].to_numpy())
                    if (labels[-1] < 0).any():
                        raise ValueError(f"{path} has label -1: a test split has no classes. Give the training shards.")
                    places.append(np.stack([np.full(count, number), np.full(count, group), np.arange(count)], 1))
                    group_bytes.append(np.full(count, shard.metadata.row_group(group).total_byte_size))
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from None
        except KeyError:
            raise ValueError(
                f"{path} has the columns {some(shard.schema_arrow.names)}; wanted are image {{bytes, path}} and label."
            ) from None
    ordered = _order(
        [Path(name).name for name in names], np.concatenate([np.empty(0, np.int64), *labels]), titles, str(root)
    )
    place, sizes = np.concatenate(places)[ordered.rows], np.concatenate(group_bytes)[ordered.rows]
    return ParquetImages(root, shards, ordered, place, sizes)


def _hub_titles(metadata: dict[bytes, bytes]) -> list[str]:
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features.get("label", {}).get("names") or []


def _order(files: Sequence[str], stored: np.ndarray, titles: Sequence[str], where: str) -> Ordered:
    """Order by class and name of pictures whose shards give a class number `stored` (n,) only.

    File names that begin with a synset decide the classes: ImageNet's numbers differ between sources. Without synsets
    the numbers stand, under the class names `titles` where they are known.
    """
    if not files:
        raise ValueError(f"The shards at {where} hold no picture.")
    matches = [SYNSET_FILE.fullmatch(file) for file in files]
    warnings: list[str] = []
    if all(matches):
        synsets = [match[1] for match in matches if match]
        names = [f"{match[1]}/{match[1]}_{match[2]}{match[3] or ''}" for match in matches if match]
        classes = sorted(set(synsets))
        number_of = {synset: label for label, synset in enumerate(classes)}
        labels = np.array([number_of[synset] for synset in synsets], np.int64)
        pairs = np.unique(np.stack([labels, stored], 1), axis=0)  # (classes,2) if each class has one number
        twice = pairs[1:][pairs[1:, 0] == pairs[:-1, 0]]
        if len(twice):
            raise ValueError(
                f"Pictures of {classes[twice[0, 0]]} carry several class numbers in the shards at {where}."
            )
        if len(other := pairs[pairs[:, 0] != pairs[:, 1]]):
            label, number = other[0].tolist()
            warnings.append(
                f"The shards number {len(other)} classes otherwise ({classes[label]} is {number}); labels here follow "
                f"the sorted synsets ({classes[label]} is {label})."
            )
    else:
        names, labels = list(files), stored
        classes = list(titles) if len(titles) > labels.max() else [str(k) for k in range(labels.max() + 1)]
        warnings.append(f"File names without synset ({some(names)}): classes keep the numbers of the shards.")
    rows = np.array(sorted(range(len(names)), key=lambda row: (labels[row], names[row])), np.int64)
    return Ordered([names[row] for row in rows], labels[rows], rows, classes, warnings)
