"""Which process this is, and waiting for what the others write. Files are the only message: no collective is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

# Variables that torchrun, srun and Lightning set: (rank, number of processes, rank on this machine). SLURM's count is
# that of the step: the batch script itself is one process of a job with many tasks.
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_RANK"),
)
SILENCE = 1800.0  # seconds without a sign of life of the other processes after which they count as dead
POLL = 0.2  # seconds between looks


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of this machine

    @classmethod
    def here(cls) -> Processes:
        """As the launcher of this process says; one of one without a launcher."""
        for rank, count, local in VARIABLES:
            if rank in os.environ:
                return cls(int(os.environ[rank]), int(os.environ.get(count, 1)), int(os.environ.get(local, 0)))
        return cls()


def require_launched(devices: int, nodes: int) -> None:
    """Raises: ValueError if `devices` x `nodes` processes are asked for, and they are not those that were started.

    On one machine Lightning starts them itself; it cannot do so on others, nor know which of them it is on.
    """
    if nodes > 1 and not {"RANK", "SLURM_PROCID"} & set(os.environ):
        raise ValueError(
            f"trainer.num_nodes is {nodes}, but nothing has told this process which of them it is on. Start the "
            "command on every node by torchrun or srun, or as a sweep with --launcher slurm."
        )
    started = Processes.here().world_size
    if started not in (1, devices * nodes):
        raise ValueError(
            f"{started} processes were started, but trainer.devices x trainer.num_nodes is {devices} x {nodes}. Give "
            f"trainer.devices, per node, and trainer.num_nodes that make {started}."
        )


def wait_for(missing: Callable[[], int], folder: Path, task: str, unit: str, *, progress: bool) -> None:
    """Return when `missing()`, the number of things other processes still write in `folder`, is 0.

    A process shows life by writing or touching `folder`.

    Raises: ValueError if none did for SILENCE seconds.
    """
    left = total = missing()
    seen, since = 0, time.monotonic()
    with tqdm(total=total, desc=task, unit=unit, delay=1, leave=False, disable=None if progress else True) as bar:
        while left:
            touched = folder.stat().st_mtime_ns if folder.exists() else 0
            if touched != seen:
                seen, since = touched, time.monotonic()
            elif time.monotonic() - since > SILENCE:
                raise ValueError(
                    f"{left} of {total} {unit}s of other processes are missing in {folder}, and nothing was written "
                    f"there for {SILENCE / 60:.3g} minutes: a process has died. Run the same command again; what is "
                    "there is kept."
                )
            time.sleep(POLL)
            now = missing()
            bar.update(left - now)
            left = now


def show_life(folder: Path) -> None:
    """For those who wait."""
    os.utime(folder)
