"""How many processes there are, and which is this: as launchers say it, and a sentence where nobody does."""

from __future__ import annotations

import os

import pytest

from datamodules import processes
from datamodules.processes import Processes, require_launched, wait_for

LAUNCHED = {
    "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
    "srun": {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"},
}


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in {"SLURM_JOB_NAME", *(name for environment in LAUNCHED.values() for name in environment)}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("environment", LAUNCHED.values(), ids=LAUNCHED)
def test_launchers_of_several_nodes(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Processes.here() == Processes(rank=5, world_size=8, local_rank=1)
    require_launched(devices=4, nodes=2)
    with pytest.raises(ValueError, match=r"8 processes were started, but .* is 4 x 1"):
        require_launched(devices=4, nodes=1)


def test_processes_that_lightning_starts(monkeypatch):
    require_launched(devices=4, nodes=1)  # the first one, before it starts the others
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Processes.here() == Processes(rank=3, world_size=4, local_rank=3)
    require_launched(devices=4, nodes=1)


def test_several_nodes_need_a_launcher(monkeypatch):
    with pytest.raises(ValueError, match=r"num_nodes is 2, but nothing has told .* torchrun or srun"):
        require_launched(devices=4, nodes=2)
    monkeypatch.setenv("NODE_RANK", "1")  # Lightning's own way, in which every node would take itself for the first
    with pytest.raises(ValueError, match="torchrun or srun"):
        require_launched(devices=4, nodes=2)


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_in_an_interactive_slurm_shell_lightning_starts_the_processes(monkeypatch, name):
    """The shell of `srun --pty bash` or `salloc` is a step of one task, and what it starts inherits that."""
    shell = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": name}
    for variable, value in shell.items():
        monkeypatch.setenv(variable, value)
    assert Processes.here() == Processes()  # the first one, before it starts the other
    with pytest.raises(ValueError, match="torchrun or srun"):
        require_launched(devices=2, nodes=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Processes.here() == Processes(rank=1, world_size=2, local_rank=1)
    require_launched(devices=2, nodes=1)
    monkeypatch.setenv(
        "SLURM_JOB_NAME", "python"
    )  # a job of srun's own, whose script sets variables that are not meant
    assert Processes.here() == Processes()


def test_lightnings_processes_end_with_the_first(monkeypatch, tmp_path):
    """Launchers end the others themselves; a shell that started a process in the background may go."""
    monkeypatch.setattr(processes, "POLL", 0)
    monkeypatch.setattr(processes, "PARENT", os.getppid() + 1)  # this one's has another number now: it has ended
    monkeypatch.setenv("WORLD_SIZE", "2")

    def wait():
        left = iter([1, 1, 0])
        wait_for(lambda: next(left), tmp_path, "wait", "manifest", progress=False)

    for variable, rank in ((None, None), ("LOCAL_RANK", "0"), ("RANK", "1"), ("SLURM_PROCID", "1")):
        with monkeypatch.context() as patch:
            if variable is not None:
                patch.setenv(variable, rank)
            wait()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="first process has ended"):
        wait()
