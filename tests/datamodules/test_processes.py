"""How many processes there are, and which is this: as launchers say it, and a sentence where nobody does."""

from __future__ import annotations

import pytest

from datamodules.processes import Processes, require_launched

LAUNCHED = {
    "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
    "srun": {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"},
}


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in {name for environment in LAUNCHED.values() for name in environment}:
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
