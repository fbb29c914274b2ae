"""LSUN's LMDB databases read in place: one encoded picture per key.

Keys are 40 hex digits in LSUN's own files, `256-0000000` in databases resized beforehand. Their sorted list, the key
index, takes a pass over the database to make and is kept in a cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
from tqdm import tqdm

from datamodules.raw import EncodedImages, ReadFailed, entries_of, passed_over, reachable, some, write_whole

BEDROOM, BEDROOM_COUNT = "bedroom_train_lmdb", 3_033_042  # LSUN-Bedrooms' training split
DEPTH = 4  # folders below the root that are searched
HEX_KEY, SIZED_KEY = re.compile(rb"[0-9a-f]{40}"), re.compile(rb"(\d+)-\d+")
MAGIC = {b"RIFF": "WebP", b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG"}  # first bytes of a stored picture

_environments: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()  # a process may open a path once only
_lock = threading.Lock()


def open_lsun(root: Path, cache: Path | None = None, *, progress: bool = True) -> LmdbImages:
    """LSUN-Bedrooms' training pictures, unlabelled, in the order of their keys.

    `root` is the database folder or lies above its `bedroom_train_lmdb`. The key index is kept in the folder `cache`
    if one is given. Another count than the published one gives a warning.

    Raises: ValueError if there is no database or more than one, or it is damaged or empty.
    """
    closed: list[Path] = []
    path = _find(Path(root), closed)
    images = LmdbImages(path, cache, progress=progress)
    images.warnings += tuple(passed_over(closed))
    if len(images) != BEDROOM_COUNT:
        images.warnings += (f"{len(images):,} pictures; LSUN-Bedrooms' training split has {BEDROOM_COUNT:,}.",)
    return images


class LmdbImages(EncodedImages):
    """The pictures of one LMDB database in the order of their keys, unlabelled."""

    def __init__(self, path: Path, cache: Path | None = None, *, progress: bool = True) -> None:
        self.path, self.cache = path.absolute(), cache
        self._env: lmdb.Environment | None = None
        self._pid = 0
        self._keys: np.ndarray | None = self._index(progress)
        self._count = len(self._keys)
        first = next((name for magic, name in MAGIC.items() if self.read(0).startswith(magic)), "unrecognized")
        warnings = []
        if left_out := self._environment().stat()["entries"] - self._count:
            warnings.append(f"{left_out:,} entries have keys of another kind than {self.name(0)} and were left out.")
        super().__init__(
            f"LMDB, {self._count:,} pictures without classes, the first {first}, at {self.path}",
            (),
            np.zeros(self._count, np.int64),
            warnings,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what another process opens itself; an index kept in the cache is not carried along either."""
        return self.__dict__ | {"_env": None, "_pid": 0} | ({"_keys": None} if self.cache else {})

    @property
    def keys(self) -> np.ndarray:
        """(n,) fixed-width bytes, sorted."""
        if self._keys is None:
            keys = self._index(progress=False)
            if len(keys) != self._count:
                raise ValueError(f"{self.path} had {self._count:,} pictures when it was opened, now {len(keys):,}.")
            self._keys = keys
        return self._keys

    def read(self, index: int) -> bytes:
        key = bytes(self.keys[index])
        with _reading(self.path), self._environment().begin() as transaction:
            value = transaction.get(key)
        if value is None:
            raise ReadFailed(f"{self.path} has no entry {key.decode()} any more. Was it replaced while in use?")
        return value

    def name(self, index: int) -> str:
        return self.keys[index].decode(errors="replace")

    def stored_sizes(self) -> np.ndarray:
        sizes, wanted = np.zeros(len(self), np.int64), 0
        keys = self.keys
        with _reading(self.path), self._environment().begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                if wanted < len(keys) and bytes(key) == keys[wanted]:
                    sizes[wanted] = len(value)
                    wanted += 1
        return sizes

    def _environment(self) -> lmdb.Environment:
        """The database as this process opened it; one that came through `fork` is not used."""
        if self._env is None or self._pid != os.getpid():
            self._env, self._pid = _environment(self.path), os.getpid()
        return self._env

    def _index(self, progress: bool) -> np.ndarray:
        """The sorted keys, out of the cache where its index is of this very state of the database, or made now."""
        with _reading(self.path), self._environment().begin() as transaction:
            entries = transaction.stat()["entries"]
            if not entries:
                raise ValueError(f"{self.path} is an empty database.")
            cursor = transaction.cursor()
            ends = [cursor.key().decode(errors="replace") for move in (cursor.first, cursor.last) if move()]
            file = (self.path / "data.mdb").stat()
            state = [entries, file.st_size, file.st_mtime_ns, self._environment().info()["last_txnid"], ends]
            if self.cache is None:
                return _sorted_keys(cursor, entries, self.path, progress)
            place, stamp = (_digest(part) for part in (str(self.path.resolve()), state))
            index = self.cache / f"lmdb-keys-{place}-{stamp}.npy"
            try:
                return np.load(index, mmap_mode="r")
            except (OSError, ValueError, EOFError):  # none of this state yet, or torn
                keys = _sorted_keys(cursor, entries, self.path, progress)
        try:
            write_whole(index, lambda stream: np.save(stream, keys))
        except OSError:  # it would have saved the next process a pass
            self.cache = None
            return keys
        for stale in self.cache.glob(f"lmdb-keys-{place}-*.npy"):
            if stale != index:
                stale.unlink(missing_ok=True)
        return np.load(index, mmap_mode="r")


def _sorted_keys(cursor: lmdb.Cursor, entries: int, path: Path, progress: bool) -> np.ndarray:
    """Keys of pictures as fixed-width bytes: the hex keys, else those of the largest size, else all there are."""
    cursor.first()
    every = cursor.iternext(values=False)
    bar = tqdm(every, "index keys", entries, unit="key", delay=5, leave=False, disable=None if progress else True)
    keys = list(bar)  # an LMDB cursor runs in byte order
    chosen = [key for key in keys if HEX_KEY.fullmatch(key)]
    if not chosen:
        sizes = [int(match[1]) if (match := SIZED_KEY.fullmatch(key)) else 0 for key in keys]
        largest = max(sizes)
        chosen = [key for key, size in zip(keys, sizes, strict=True) if size == largest]
    if bad := [key for key in chosen if key.endswith(b"\0")]:
        raise ValueError(f"{path} has keys that end in a zero byte ({bad[0]!r}); they are numbers, not LSUN's keys.")
    return np.array(chosen)


def _find(root: Path, closed: list[Path]) -> Path:
    """The database's folder; folders that may not be read are added to `closed`.

    Raises: ValueError if there is no database, or which one is meant is not clear.
    """
    if _is_database(root):
        return root
    found, level = [], [root]
    for _ in range(DEPTH):
        folders = [folder for folder in level if folder.is_dir()]
        level = [entry for folder in folders for entry in entries_of(folder, closed) if reachable(entry.is_dir)]
        found += [folder for folder in level if _is_database(folder)]
    bedrooms = [folder for folder in found if folder.name == BEDROOM]
    if len(bedrooms) == 1:
        return bedrooms[0]
    if bedrooms:
        raise ValueError(f"{root} has {len(bedrooms)} folders {BEDROOM}: {some([str(p) for p in bedrooms])}. Give one.")
    there = some([str(folder) for folder in found])
    if not there and root.is_dir():
        there = some([entry.name for entry in entries_of(root, [])], "nothing")
    raise ValueError(
        f"No {BEDROOM}/data.mdb at {root} or {DEPTH} folders below it. "
        + (f"There is: {there}. " if there else "There is no such folder. ")
        + "".join(f"{sentence} " for sentence in passed_over(closed))
        + "Unpack bedroom_train_lmdb.zip there, or give the folder of another database itself."
    )


def _is_database(folder: Path) -> bool:
    return reachable((folder / "data.mdb").is_file)


def _environment(path: Path) -> lmdb.Environment:
    """The one open environment of `path` in this process, closed when no reader uses it any more."""
    with _lock, _reading(path):
        place = str(path.resolve())
        environment = _environments.get(place)
        if environment is None:
            environment = lmdb.open(place, readonly=True, lock=False, readahead=False, meminit=False, create=False)
            have = (path / "data.mdb").stat().st_size
            need = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if have < need:  # a read past the end of the file would kill the process
                environment.close()
                raise ValueError(f"{path}/data.mdb is cut short: {have:,} of {need:,} bytes. Unpack or copy it again.")
            _environments[place] = environment
        return environment


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except lmdb.Error as error:
        raise ReadFailed(f"The database {path} cannot be read: {error}.") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _forget_environments() -> None:
    """In a forked child: close what was inherited, so that it can be opened anew."""
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    for environment in list(_environments.values()):
        environment.close()
    _environments.clear()


os.register_at_fork(after_in_child=_forget_environments)
