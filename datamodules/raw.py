"""Finding and reading a picture set as people keep it: ImageNet-1k in five layouts, or any folder of pictures.

Pictures come undecoded and in one order, whatever the layout: by class, inside a class by name. Readers open their
files in the process that reads, so that they pass through `fork` and `spawn`; reading is safe from several threads.

n pictures of the set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from uuid import uuid4

import numpy as np
from tqdm import tqdm

IMAGENET_CLASSES, IMAGENET_COUNT = 1000, 1_281_167  # train split of ILSVRC 2012
SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))  # of pictures, lower case
SYNSET = re.compile(r"n\d{8}")
SYNSET_FILE = re.compile(r"(n\d{8})_(\w+?)(?:_\1)?(\.\w+)?")  # Parquet shards of the hub repeat the synset at the end
DEPTH = 6  # folders below the root that are searched; the Kaggle layout needs 4
# What files and folders are told apart as; `other` are tars of no use.
LAYOUTS = ("trees", "nested", "synsets", "parquet", "webdataset", "other")
OPEN_FILES = 64  # archives a process holds open at once


class RawImages(Protocol):
    """Encoded pictures of a set in a fixed order."""

    description: str  # what was found, for people
    warnings: tuple[str, ...]  # sentences on what is missing or was left out
    classes: tuple[str, ...]  # names in label order; () = unlabelled
    labels: np.ndarray  # (n,) int64; zeros where unlabelled

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The stored file, undecoded."""
        ...

    def name(self, index: int) -> str:
        """Path below the set's folder, `class/file` out of an archive, or key of a database."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over names, stored sizes, classes and labels in order: equal for the same set, wherever it lies."""
        ...

    @property
    def storage_order(self) -> np.ndarray:
        """All rows (n,) int64 in the order that reads fastest. Only Parquet shards read slowly in any other."""
        ...


class EncodedImages:
    """What the readers share; they add `read`, `name` and `stored_sizes`."""

    def __init__(
        self, description: str, classes: Iterable[str], labels: np.ndarray, warnings: Iterable[str] = ()
    ) -> None:
        self.description, self.warnings = description, tuple(warnings)
        self.classes, self.labels = tuple(classes), labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def stored_sizes(self) -> np.ndarray:
        """Bytes of each picture (n,) int64, without reading any."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for index, (size, label) in enumerate(zip(self.stored_sizes().tolist(), self.labels.tolist(), strict=True)):
            digest.update(f"{self.name(index)}\0{size}\0{label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @property
    def storage_order(self) -> np.ndarray:
        return np.arange(len(self))


class Rows(EncodedImages):
    """A part of a set: the given rows in the given order, or the pictures of some classes, or both.

    Classes keep their order, whatever the order they are given in, and are numbered anew from 0.

    Raises: ValueError for a row or a class that the set does not have, or if no picture is left.
    """

    def __init__(
        self, raw: RawImages, rows: Sequence[int] | np.ndarray | None = None, classes: Iterable[str] | None = None
    ) -> None:
        chosen = np.arange(len(raw)) if rows is None else np.asarray(rows, np.int64)
        outside = chosen[(chosen < 0) | (chosen >= len(raw))]
        if len(outside):
            raise ValueError(
                f"Row {outside[0]} was asked for, but the set has {len(raw):,} pictures ({raw.description})."
            )
        names, labels = raw.classes, raw.labels[chosen]
        if classes is not None:
            wanted = set(classes)
            if unknown := sorted(wanted - set(raw.classes)):
                known = f"its classes are {some(raw.classes)}" if raw.classes else "it has no classes"
                raise ValueError(f"The set has no class {some(unknown)}: {known} ({raw.description}).")
            kept = [label for label, name in enumerate(raw.classes) if name in wanted]
            number = np.full(len(raw.classes), -1)
            number[kept] = np.arange(len(kept))
            names, labels = tuple(raw.classes[label] for label in kept), number[labels]
            chosen, labels = chosen[labels >= 0], labels[labels >= 0]
        if not len(chosen):
            raise ValueError(f"No picture is left of {raw.description} by the rows and classes asked for.")
        of_classes = f" in {len(names)} of {len(raw.classes)} classes" if classes is not None else ""
        description = f"{len(chosen):,} pictures{of_classes}, out of: {raw.description}"
        super().__init__(description, names, labels, raw.warnings)
        self.raw, self.rows = raw, chosen

    def read(self, index: int) -> bytes:
        return self.raw.read(int(self.rows[index]))

    def name(self, index: int) -> str:
        return self.raw.name(int(self.rows[index]))

    def fingerprint(self) -> str:
        """Of the whole set and the choice: the same pictures as a set of their own have another one."""
        parts = self.raw.fingerprint(), json.dumps(self.classes), self.rows.tobytes().hex()
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def storage_order(self) -> np.ndarray:
        rank = np.empty(len(self.raw), np.int64)
        rank[self.raw.storage_order] = np.arange(len(self.raw))
        return np.argsort(rank[self.rows], kind="stable")


def open_imagenet(root: Path, cache: Path | None = None, *, progress: bool = True) -> EncodedImages:
    """ImageNet-1k's training pictures in the first layout found in or below `root`; labels index the sorted synsets.

    Looked for in this order: synset folders nXXXXXXXX/ (plain or as Kaggle unpacks), the official tar of tars, the tars
    of single synsets, Parquet shards of the hub, WebDataset shards. Archives are read in place. Their index is kept in
    the folder `cache` if one is given; it takes a pass over the archive's headers to make.

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
    if not present:
        there = some([entry.name for entry in sorted(root.iterdir())] if root.is_dir() else [root.name], "nothing")
        loose = f" ({some([path.name for path in found['other']])}: damaged, or without synsets and labels)" * bool(
            found["other"]
        )
        raise ValueError(
            f"No ImageNet training pictures at {root}: looked down to {DEPTH} folders deep for synset folders "
            "nXXXXXXXX/ with pictures, ILSVRC2012_img_train.tar, nXXXXXXXX.tar, Parquet shards (*.parquet) and "
            f"WebDataset shards (*.tar with .cls). There is: {there}{loose}."
        )
    _, paths, open_layout = present[0]
    images = open_layout(root if root.is_dir() else root.parent, paths, cache, progress)
    if not len(images):
        raise ValueError(f"{images.description}: nothing to read.")
    if len(images.classes) != IMAGENET_CLASSES:
        images.warnings += (f"{len(images.classes)} classes; ImageNet-1k has {IMAGENET_CLASSES}.",)
    if len(images) != IMAGENET_COUNT:
        images.warnings += (f"{len(images):,} pictures; ImageNet-1k's training split has {IMAGENET_COUNT:,}.",)
    if present[1:]:
        images.warnings += (f"Also there and not read: {', '.join(kind for kind, _, _ in present[1:])}.",)
    return images


def open_folder(root: Path, *, progress: bool = True) -> EncodedImages:
    """Pictures in class subfolders (at any depth inside them), or all flat in `root` and unlabelled.

    Hidden files and folders are ignored. A class folder without pictures keeps its label, with a warning.

    Raises: ValueError if there are no pictures, or some flat and others in subfolders.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}.")
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    flat = [entry.name for entry in entries if entry.is_file()]
    folders = [entry.name for entry in entries if entry.is_dir()]
    pictures = [name for name in flat if _is_picture(name)]
    labelled = any(_is_picture(file) for folder in folders for file in _files_below(root / folder))
    if pictures and labelled:
        raise ValueError(
            f"{root} holds {some(pictures)} beside class folders ({some(folders)}). Keep either class folders or "
            "flat pictures there."
        )
    if labelled:
        return FileImages(root, "class folders", folders, progress=progress)
    if not pictures:
        raise ValueError(
            f"No pictures ({', '.join(sorted(SUFFIXES))}) in {root} or its subfolders. There is: "
            f"{some([entry.name for entry in entries], 'nothing')}."
        )
    return FileImages(root, "flat pictures", ())


def compare_classes(found: Sequence[str], expected: Sequence[str]) -> str | None:
    """One sentence on how the classes differ from those expected in label order; None if they do not."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    parts = [f"lacks {len(missing)} of the {len(expected)} expected classes ({some(missing)})"] * bool(missing)
    parts += [f"has {len(unexpected)} that were not expected ({some(unexpected)})"] * bool(unexpected)
    if parts:
        return f"The set {' and '.join(parts)}, so its labels would mean other classes."
    for label, (here, there) in enumerate(zip(found, expected, strict=True)):
        if here != there:
            return (
                f"The classes are the expected {len(expected)} in another order: label {label} is {here}, not {there}."
            )
    return None


# --- readers --------------------------------------------------------------------------------------------------------


class FileImages(EncodedImages):
    """Pictures as files: in the class folders `classes` of `root`, or flat in it where there are none."""

    def __init__(self, root: Path, kind: str, classes: Sequence[str], *, progress: bool = True) -> None:
        self.root = root.absolute()
        names, labels, others, empty = [], [], [], []
        for label, folder in enumerate(_bar(classes or ("",), "list", "folder", progress)):
            here = self.root / folder
            files = sorted(
                _files_below(here) if classes else (entry.name for entry in here.iterdir() if entry.is_file())
            )
            paths = [f"{folder}/{file}" if folder else file for file in files if not file.startswith(".")]
            pictures = [path for path in paths if _is_picture(path)]
            others += [path for path in paths if not _is_picture(path)]
            empty += [folder] * (not pictures)
            names += pictures
            labels += [label] * len(pictures)
        self.names = Names(names)
        warnings = []
        if empty:
            warnings.append(f"{len(empty)} class folders hold no picture: {some(empty)}.")
        if others:
            warnings.append(f"{len(others)} files are not pictures and were left out: {some(others)}.")
        super().__init__(_describe(kind, len(names), classes, self.root), classes, np.array(labels, np.int64), warnings)

    def read(self, index: int) -> bytes:
        return (self.root / self.names[index]).read_bytes()

    def name(self, index: int) -> str:
        return self.names[index]

    def stored_sizes(self) -> np.ndarray:
        return np.fromiter(((self.root / name).stat().st_size for name in self.names), np.int64, len(self))


class TarImages(EncodedImages):
    """Pictures inside uncompressed tars, read in place.

    `table` has names (joined) and their ends, label, archive, offset and bytes of each picture, classes and warnings.
    """

    def __init__(self, kind: str, root: Path, archives: Sequence[Path], table: dict[str, np.ndarray]) -> None:
        self.archives, self._names = tuple(archives), Names.joined(table["names"].tobytes(), table["ends"])
        self._archive, self._offset, self._size = table["archive"], table["offset"], table["size"]
        self._open: dict[int, _Descriptor] = {}
        classes = table["classes"].tolist()
        description = _describe(kind, len(self._names), classes, root)
        super().__init__(description, classes, table["label"], table["warnings"].tolist())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def read(self, index: int) -> bytes:
        archive, size = int(self._archive[index]), int(self._size[index])
        descriptor = self._open.get(archive)
        if descriptor is None:
            descriptor = _Descriptor(self.archives[archive])
            kept = list(self._open.items())[-(OPEN_FILES - 1) :]
            self._open = {**dict(kept), archive: descriptor}  # replaced whole: other threads keep what they hold
        content = os.pread(descriptor.number, size, int(self._offset[index]))
        if len(content) != size:
            raise ValueError(f"{self.archives[archive]} is cut short: {self.name(index)} is not whole.")
        return content

    def name(self, index: int) -> str:
        return self._names[index]

    def stored_sizes(self) -> np.ndarray:
        return self._size


class ParquetImages(EncodedImages):
    """Pictures in Parquet shards, column `image` {bytes, path}; the last row groups read are held in memory.

    `place` (n,3): shard, row group and row of each picture; `group_bytes` (n,): stored size of its row group.
    A shard's rows are often shuffled: in class order every picture then costs a row group. See `storage_order`.
    """

    def __init__(
        self, root: Path, shards: Sequence[Path], ordered: _Ordered, place: np.ndarray, group_bytes: np.ndarray
    ) -> None:
        self.shards, self._names = tuple(shards), Names(ordered.names)
        self._place, self._group_bytes = place, group_bytes
        self._groups: dict[tuple[int, int], Any] = {}
        description = _describe("Parquet shards", len(place), ordered.classes, root)
        super().__init__(description, ordered.classes, ordered.labels, ordered.warnings)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups": {}}

    def read(self, index: int) -> bytes:
        import pyarrow.parquet

        number, group, row = self._place[index].tolist()
        column = self._groups.get((number, group))
        if column is None:
            with pyarrow.parquet.ParquetFile(self.shards[number]) as shard:
                column = shard.read_row_group(group, ["image.bytes"], use_threads=False)["image"]
            last = list(self._groups.items())[-1:]
            self._groups = {**dict(last), (number, group): column}  # replaced whole: other threads keep what they hold
        return column[row]["bytes"].as_py()

    def name(self, index: int) -> str:
        return self._names[index]

    def stored_sizes(self) -> np.ndarray:
        """Bytes of the row group of each picture: single sizes would take reading them all."""
        return self._group_bytes

    @property
    def storage_order(self) -> np.ndarray:
        return np.lexsort(self._place.T[::-1])


class Names:
    """Strings in one block of bytes: a million of them as Python objects would take 100 MB in every process."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.block = b"".join(encoded)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def joined(cls, block: bytes, ends: np.ndarray) -> Names:
        names = cls(())
        names.block, names.ends = block, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.block[start : int(self.ends[index])])


class _Descriptor:
    """A file open for `os.pread`, which has no position to share with threads or forked processes."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


# --- layouts of ImageNet --------------------------------------------------------------------------------------------


def _survey(root: Path) -> dict[str, list[Path]]:
    """What lies at or below `root`, by layout; folders inside synset folders are not looked into."""
    if not root.exists():
        raise ValueError(f"There is no {root}.")
    found: dict[str, list[Path]] = {kind: [] for kind in LAYOUTS}
    level, seen, judged = [root], {root.resolve()}, set()
    for _ in range(DEPTH):
        entries = [entry for folder in level for entry in (sorted(folder.iterdir()) if folder.is_dir() else [folder])]
        level = []
        for entry in entries:
            if entry.name.startswith(".") or _is_picture(entry.name):
                continue
            if entry.suffix == ".tar" and entry.is_file():
                found[_tar_kind(entry)].append(entry)
            elif entry.suffix == ".parquet" and entry.is_file():
                found["parquet"].append(entry)
            elif entry.is_dir() and SYNSET.fullmatch(entry.name):
                # The first file decides for the tree: Kaggle's annotations have synset folders of their own.
                if entry.parent not in judged and (first := next(_files_below(entry), None)):
                    judged.add(entry.parent)
                    found["trees"] += [entry.parent] * _is_picture(first)
            elif entry.is_dir() and entry.resolve() not in seen:  # links may run in circles
                seen.add(entry.resolve())
                level.append(entry)
    return found


def _tar_kind(path: Path) -> str:
    if SYNSET.fullmatch(path.stem):
        return "synsets"
    try:
        with _opened(path) as tar:
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
    synsets = sorted(entry.name for entry in tree.iterdir() if SYNSET.fullmatch(entry.name) and entry.is_dir())
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
        bar = _bar(None, "index", "picture", progress)
        for number, archive in enumerate(archives):
            with _opened(archive) as outer:
                for synset, start, tar in inner(outer, archive):
                    synsets.add(synset)
                    for member in tar:
                        name = f"{synset}/{Path(member.name).name}"
                        if not member.isfile() or "/." in name:
                            continue
                        if _is_picture(name):
                            members.append((synset, name, number, start + member.offset_data, member.size))
                            bar.update()
                        else:
                            others.append(name)
        bar.close()
        members.sort()
        classes = sorted(synsets)
        number_of = {synset: label for label, synset in enumerate(classes)}
        labels = np.array([number_of[member[0]] for member in members], np.int64)
        warnings = []
        if empty := sorted(synsets - {member[0] for member in members}):
            warnings.append(f"{len(empty)} synset tars hold no picture: {some(empty)}.")
        if others:
            warnings.append(f"{len(others)} files are not pictures and were left out: {some(sorted(others))}.")
        return _table([member[1] for member in members], labels, np.array([m[2:] for m in members]), classes, warnings)

    return TarImages(kind, root, archives, _cached_table(kind, archives, cache, build))


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
        for number, shard in enumerate(_bar(shards, "index", "shard", progress)):
            pictures, classes = {}, {}
            with _opened(shard) as tar:
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
                    elif _is_picture(file):
                        pictures[folder, key] = file, (number, member.offset_data, member.size)
            if unlabelled := [file for sample, (file, _) in pictures.items() if sample not in classes]:
                raise ValueError(f"{shard} has pictures without a .cls file: {some(unlabelled)}.")
            names += [file for file, _ in pictures.values()]
            places += [place for _, place in pictures.values()]
            labels += [classes[sample] for sample in pictures]
        ordered = _order(names, np.array(labels, np.int64), [], str(root))
        return _table(ordered.names, ordered.labels, np.array(places)[ordered.rows], ordered.classes, ordered.warnings)

    return TarImages("WebDataset shards", root, shards, _cached_table("WebDataset shards", shards, cache, build))


def _open_parquet(root: Path, shards: list[Path], cache: Path | None, progress: bool) -> EncodedImages:
    import pyarrow
    import pyarrow.parquet

    shards = _of_training(root, shards)
    names: list[str] = []
    labels, places, group_bytes = [], [], []
    titles: list[str] = []  # class names out of the metadata, for sets without synsets
    for number, path in enumerate(_bar(shards, "index", "shard", progress)):
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


class _Ordered(NamedTuple):
    """Labelled pictures in the order of the set; `rows` are their places in the order of the shards."""

    names: list[str]
    labels: np.ndarray
    rows: np.ndarray
    classes: list[str]
    warnings: list[str]


def _order(files: Sequence[str], stored: np.ndarray, titles: Sequence[str], where: str) -> _Ordered:
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
    return _Ordered([names[row] for row in rows], labels[rows], rows, classes, warnings)


# --- the index of archives ------------------------------------------------------------------------------------------


def _table(
    names: Sequence[str], labels: np.ndarray, places: np.ndarray, classes: Sequence[str], warnings: Sequence[str]
) -> dict[str, np.ndarray]:
    """What `TarImages` needs; `places` (n,3): archive, offset, bytes."""
    packed = Names(names)
    archive, offset, size = places.reshape(-1, 3).T.astype(np.int64)
    block = np.frombuffer(packed.block, np.uint8)
    return {
        "names": block, "ends": packed.ends, "label": labels, "archive": archive.astype(np.int32), "offset": offset,
        "size": size, "classes": np.array(classes, np.str_), "warnings": np.array(warnings, np.str_),
    }  # fmt: skip


def _cached_table(
    kind: str, archives: Sequence[Path], cache: Path | None, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The index of these very archives out of `cache`, or built now; a damaged one is built again."""
    if cache is None:
        return build()
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in archives]
    file = cache / f"tar-index-{hashlib.sha256(json.dumps([kind, stamps]).encode()).hexdigest()[:16]}.npz"
    try:
        with np.load(file) as table:
            return dict(table)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none yet, or torn
        table = build()
        write_whole(file, lambda stream: np.savez(stream, **table))  # type: ignore[arg-type]
        return table


def write_whole(file: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write under a name of its own, then rename: readers see all or nothing, and several writers do not collide."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


# --- small things ---------------------------------------------------------------------------------------------------


def some(names: Sequence[str], none: str = "") -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or none


def _describe(kind: str, count: int, classes: Sequence[str], root: Path) -> str:
    labelled = f"in {len(classes)} classes" if classes else "without classes"
    return f"{kind}, {count:,} pictures {labelled} at {root}"


def _bar(items: Any, task: str, unit: str, progress: bool) -> Any:
    return tqdm(items, task, unit=unit, delay=5, leave=False, disable=None if progress else True)


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar to be read in order. Raises: ValueError if it is damaged, also while it is read."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged or not a tar: {error}.") from None


def _is_picture(name: str) -> bool:
    return name[name.rfind(".") :].lower() in SUFFIXES


def _files_below(folder: Path) -> Iterator[str]:
    """Paths relative to `folder` at any depth, in no order; hidden ones are passed over."""
    skip = len(str(folder)) + 1
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (f"{parent}/{name}"[skip:] for name in files if not name.startswith("."))
