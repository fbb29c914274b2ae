"""What the terminal shows: sentences and progress bars, on the first process only."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from datamodules.processes import Processes


def is_main_process() -> bool:
    """True on the process that prints and writes files (rank 0 under Lightning, torchrun and SLURM)."""
    return Processes.here().rank == 0


def quiet_lightning() -> None:
    """Only Lightning's errors: its tips, device lists and advice on settings chosen here would bury our own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def say(text: str = "") -> None:
    """Print a line, on the first process only; what the terminal's encoding lacks is escaped, as names may be."""
    if is_main_process():
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A tqdm bar with rate and time left; silent where output is no terminal and on all other processes."""
    silent = not is_main_process() or not sys.stderr.isatty()
    return tqdm(iterable, dynamic_ncols=True, leave=False, disable=silent, **options)
