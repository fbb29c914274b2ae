"""What the terminal shows: sentences and progress bars, on the first process only."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from datamodules.processes import Processes

_aside = False  # whether `say` prints to stderr


def is_main_process() -> bool:
    """True on the process that prints and writes files (rank 0 under Lightning, torchrun and SLURM)."""
    return Processes.here().rank == 0


def quiet_lightning() -> None:
    """Only Lightning's errors: its tips, device lists and advice on settings chosen here would bury our own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def say(text: str = "") -> None:
    """Print a line, on the first process only; what the terminal's encoding lacks is escaped, as names may be."""
    _print(text, sys.stderr if _aside else sys.stdout)


def show(text: str) -> None:
    """Print what was asked for, such as a table, on the first process only: to stdout, whatever `say` does."""
    _print(text, sys.stdout)


@contextmanager
def notices_aside() -> Iterator[None]:
    """A block in which `say` prints to stderr, so that stdout, which may be a file, holds the result alone."""
    global _aside
    _aside = True
    try:
        yield
    finally:
        _aside = False


def _print(text: str, file: TextIO) -> None:
    if is_main_process():
        encoding = file.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=file)
        file.flush()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A tqdm bar with rate and time left; silent where output is no terminal and on all other processes."""
    silent = not is_main_process() or not sys.stderr.isatty()
    return tqdm(iterable, dynamic_ncols=True, leave=False, disable=silent, **options)
