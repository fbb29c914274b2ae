"""Lock files: who works on what. A lock goes with its process, however that ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from bench.console import is_main_process

LOOK_S = 5  # for which `is_held` of another process may hold a lock at most
POLL_S = 0.2


@contextmanager
def working(path: Path, patience_s: float = LOOK_S) -> Iterator[bool]:
    """Hold a lock file while the block lasts, on the first process -> False if it is still held elsewhere."""
    if not is_main_process():
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience_s
    with path.open("a") as file:
        while not (held := _try_lock(file)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        yield held


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock file for a moment, on any process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_held(path: Path) -> bool:
    """Whether a process of this machine holds that lock file."""
    if not path.exists():
        return False
    with path.open("a") as file:
        return not _try_lock(file)


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
