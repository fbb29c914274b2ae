"""Which process this is, and waiting for what the others write. Files are the only message: no collective is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

# Variables that launchers set: rank, number of processes, rank on this machine. SLURM's count is that of the step: the
# batch script itself is one process of a job with many tasks.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
LIGHTNING = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_RANK")
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning starts the processes itself
PARENT = os.getppid()  # when this process began
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
        if (names := _launcher()) is None:
            return cls()
        rank, count, local = (os.environ.get(name) for name in names)
        return cls(int(rank or 0), int(count or 1), int(local or 0))


def _launcher() -> tuple[str, str, str] | None:
    """The variables of who started this process; None if nobody says so."""
    by_hand = os.environ.get("SLURM_JOB_NAME") in INTERACTIVE
    launchers = (TORCHRUN, LIGHTNING) if by_hand else (TORCHRUN, SRUN, LIGHTNING)
    return next((names for names in launchers if names[0] in os.environ), None)


def require_launched(devices: int, nodes: int) -> None:
    """Raises: ValueError if `devices` x `nodes` processes are asked for, and they are not those that were started.

    On one machine Lightning starts them itself; it cannot do so on others, nor know which of them it is on.
    """
    if nodes > 1 and _launcher() not in (TORCHRUN, SRUN):
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

    Raises: ValueError if none did for SILENCE seconds, or the first one, which started this one, has ended.
    """
    left = total = missing()
    seen, since = 0, time.monotonic()
    with tqdm(total=total, desc=task, unit=unit, delay=1, leave=False, disable=None if progress else True) as bar:
        while left:
            if _launcher() == LIGHTNING and Processes.here().rank and os.getppid() != PARENT:
                raise ValueError("The first process has ended, and this one waited for it. Run the same command again.")
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
