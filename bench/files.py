"""Writing files so that a reader, or a crash, never sees half of one; names that tell contents apart."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bench.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def short_digest(text: str) -> str:
    """8 hex digits of SHA-256, for the name of a file that was made from the settings `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends without an error.

    Raises: UserError if the disk is full; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open(mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file. Raises: UserError if the disk is full; the file may then end in a part of the line."""
    with room_for(path), path.open("a") as file:
        file.write(line + "\n")


def remove_leftovers(directory: Path) -> None:
    """Delete what killed `atomic_write`s left behind in `directory`; nobody may be writing there."""
    for path in directory.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """A block that writes `path`. Raises: UserError if the disk is full, or a limit on it reached."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer raises one that has the other as its context
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "errno", None) not in FULL:
            cause = cause.__context__
        if cause is None:
            raise
        raise UserError(
            f"{path} could not be written ({cause}). What was there before is kept: make room, and the same command "
            "goes on."
        ) from None
