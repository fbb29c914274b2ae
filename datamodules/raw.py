"""Reading a picture set as people keep it: encoded pictures in a fixed order, out of folders; parts of a set.

Pictures come undecoded and in one order: by class, inside a class by name. Readers open their files in the process that
reads, so that they pass through `fork` and `spawn`; reading is safe from several threads.

n pictures of the set.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
from tqdm import tqdm

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))  # of pictures, lower case


class ReadFailed(ValueError):
    """The disk, or the archive on it, does not give a picture: that says nothing of the picture itself."""


class EncodedImages(ABC):
    """Encoded pictures of a set in a fixed order; readers say where they lie."""

    description: str  # what was found, for people
    warnings: tuple[str, ...]  # sentences on what is missing or was left out
    classes: tuple[str, ...]  # names in label order; () = unlabelled
    labels: np.ndarray  # (n,) int64; zeros where unlabelled

    def __init__(
        self, description: str, classes: Iterable[str], labels: np.ndarray, warnings: Iterable[str] = ()
    ) -> None:
        self.description, self.warnings = description, tuple(warnings)
        self.classes, self.labels = tuple(classes), labels

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The stored file, undecoded. Raises: ReadFailed if it cannot be had; ValueError if nothing is stored."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Path below the set's folder, `class/file` out of an archive, or key of a database."""

    @abstractmethod
    def stored_sizes(self) -> np.ndarray:
        """Bytes of each picture (n,) int64, without reading any."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, stored sizes, classes and labels in order: equal for the same set, wherever it lies."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for index, (size, label) in enumerate(zip(self.stored_sizes().tolist(), self.labels.tolist(), strict=True)):
            digest.update(f"{self.name(index)}\0{size}\0{label}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @property
    def storage_order(self) -> np.ndarray:
        """All rows (n,) int64 in the order that reads fastest. Only Parquet shards read slowly in any other."""
        return np.arange(len(self))


class Rows(EncodedImages):
    """A part of a set: the given rows in the given order, or the pictures of some classes, or both.

    Classes keep their order, whatever the order they are given in, and are numbered anew from 0.

    Raises: ValueError for a row or a class that the set does not have, or if no picture is left.
    """

    def __init__(
        self, raw: EncodedImages, rows: Sequence[int] | np.ndarray | None = None, classes: Iterable[str] | None = None
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

    def stored_sizes(self) -> np.ndarray:
        return self.raw.stored_sizes()[self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """Of the whole set and the choice: the same pictures as a set of their own have another one."""
        parts = self.raw.fingerprint, json.dumps(self.classes), self.rows.tobytes().hex()
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def storage_order(self) -> np.ndarray:
        rank = np.empty(len(self.raw), np.int64)
        rank[self.raw.storage_order] = np.arange(len(self.raw))
        return np.argsort(rank[self.rows], kind="stable")


def open_folder(root: Path, *, progress: bool = True) -> EncodedImages:
    """Pictures in class subfolders (at any depth inside them), or all flat in `root` and unlabelled.

    Hidden files and folders are ignored, and links back to a folder that they lie in. A class folder without pictures
    keeps its label, with a warning.

    Raises: ValueError if the folder may not be read, there are no pictures, or some flat and others in subfolders.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}.")
    closed: list[Path] = []
    entries = [entry for entry in entries_of(root, closed) if not entry.name.startswith(".")]
    if closed:
        raise ValueError(f"The folder {root} may not be read.")
    flat = [entry.name for entry in entries if reachable(entry.is_file)]
    above = (os.path.realpath(root),)
    folders = [entry.name for entry in entries if reachable(entry.is_dir) and not _leads_back(str(entry), above)]
    pictures = [name for name in flat if is_picture(name)]
    labelled = any(is_picture(file) for folder in folders for file in files_below(root / folder))
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


# --- readers ----------------------------------------------------------------------------------------------------------


class FileImages(EncodedImages):
    """Pictures as files: in the class folders `classes` of `root`, or flat in it where there are none."""

    def __init__(self, root: Path, kind: str, classes: Sequence[str], *, progress: bool = True) -> None:
        self.root = root.absolute()
        names, labels, others, empty = [], [], [], []
        closed: list[Path] = []
        for label, folder in enumerate(bar(classes or ("",), "list", "folder", progress)):
            here = self.root / folder
            files = sorted(
                files_below(here, closed)
                if classes
                else (entry.name for entry in here.iterdir() if reachable(entry.is_file))
            )
            paths = [f"{folder}/{file}" if folder else file for file in files if not file.startswith(".")]
            pictures = [path for path in paths if is_picture(path)]
            others += [path for path in paths if not is_picture(path)]
            empty += [folder] * (not pictures)
            names += pictures
            labels += [label] * len(pictures)
        self.names = Names(names)
        warnings = []
        if empty:
            warnings.append(f"{len(empty)} class folders hold no picture: {some(empty)}.")
        if others:
            warnings.append(f"{len(others)} files are not pictures and were left out: {some(others)}.")
        warnings += passed_over(closed)
        super().__init__(describe(kind, len(names), classes, self.root), classes, np.array(labels, np.int64), warnings)

    def read(self, index: int) -> bytes:
        try:
            return (self.root / self.names[index]).read_bytes()
        except OSError as error:
            raise ReadFailed(f"{self.names[index]} cannot be read: {error.strerror}.") from None

    def name(self, index: int) -> str:
        return self.names[index]

    def stored_sizes(self) -> np.ndarray:
        return np.fromiter(((self.root / name).stat().st_size for name in self.names), np.int64, len(self))


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


# --- small things -----------------------------------------------------------------------------------------------------


def user_cache() -> Path:
    """Where files are kept that serve all projects of a user: $XDG_CACHE_HOME/isodiff, by default ~/.cache/isodiff."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isodiff"


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


def some(names: Sequence[str], none: str = "") -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or none


def describe(kind: str, count: int, classes: Sequence[str], root: Path) -> str:
    labelled = f"in {len(classes)} classes" if classes else "without classes"
    return f"{kind}, {count:,} pictures {labelled} at {root}"


def bar(items: Any, task: str, unit: str, progress: bool) -> Any:
    return tqdm(items, task, unit=unit, delay=5, leave=False, disable=None if progress else True)


def is_picture(name: str) -> bool:
    return name[name.rfind(".") :].lower() in SUFFIXES


def entries_of(folder: Path, closed: list[Path]) -> list[Path]:
    """What lies in `folder`, by name; one that may not be read is added to `closed`."""
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        closed.append(folder)
        return []


def files_below(folder: Path | str, closed: list[Path] | None = None, links: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths relative to `folder` of the files at any depth, in no order.

    Hidden ones, links to nothing, and links back to a folder that they lie in are passed over; folders that may not be
    read are, too, and are added to `closed`. `links` are the folders with the links that led here.
    """
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        if closed is not None:
            closed.append(Path(folder))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if reachable(entry.is_dir):
            above = (*links, os.path.realpath(folder)) if entry.is_symlink() else links
            if not _leads_back(entry.path, above):
                yield from (f"{entry.name}/{name}" for name in files_below(entry.path, closed, above))
        elif reachable(entry.is_file):
            yield entry.name


def _leads_back(entry: str, above: tuple[str, ...]) -> bool:
    """Whether a link leads to one of the folders `above`, or to one that they lie in."""
    if not Path(entry).is_symlink():
        return False
    target = os.path.realpath(entry)
    return any(os.path.commonpath([target, folder]) == target for folder in above)


def reachable(kind: Callable[[], bool]) -> bool:
    """`entry.is_dir` or `entry.is_file`; false for what may not be looked at, and for links in a circle."""
    try:
        return kind()
    except OSError:
        return False


def passed_over(closed: Sequence[Path]) -> list[str]:
    """A warning on folders that may not be read."""
    return [f"{len(closed)} folders may not be read: {some([str(folder) for folder in closed])}."] * bool(closed)
