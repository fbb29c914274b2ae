"""A real SLURM on this machine, for the tests: munged, slurmctld and one slurmd on loopback, gone at the end.

apt-get install slurm-wlm munge
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

# The node claims more cores than the machine may have, so that jobs never wait for one. cred_expire is how long a
# requeued job waits. A job of partition "high" preempts those of "main", which have 3 seconds to end and are requeued.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
KillWait=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=n1 Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=3 State=UP
PartitionName=high Nodes=n1 MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Path]:
    """The folder of a running SLURM; SLURM_CONF names it. Skips where the programs are missing."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)  # munged trusts no folder that others may write to
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    controller, node = _free_ports(2)
    conf = folder / "slurm.conf"
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    conf.write_text(
        CONF.format(
            folder=folder, host=socket.gethostname().partition(".")[0], user=user, controller=controller, node=node
        )
    )
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    daemons: list[subprocess.Popen] = []
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        munge = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("pid-file", "log-file", "seed-file")]
        daemons.append(
            _start(
                folder,
                "munged",
                "--foreground",
                "--force",
                f"--key-file={key}",
                f"--socket={folder}/munge.socket",
                *munge,
            )
        )
        _wait_for(["munge", "-S", f"{folder}/munge.socket", "-n"], daemons, folder)
        daemons.append(_start(folder, "slurmctld", "-D", "-i", "-f", str(conf)))
        _wait_for(["scontrol", "ping"], daemons, folder)
        daemons.append(_start(folder, "slurmd", "-D", "-N", "n1", "-f", str(conf)))
        _wait_for(["sh", "-c", "sinfo -hN -o %T -p main | grep -qx idle"], daemons, folder)
        yield folder
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user", user], timeout=20)
        subprocess.run(["scancel", "--user", user], timeout=20)
        _wait_for(["sh", "-c", '[ -z "$(squeue -h)" ]'], daemons, folder)
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def _start(folder: Path, program: str, *arguments: str) -> subprocess.Popen:
    with (folder / f"{program}.out").open("w") as out:
        return subprocess.Popen(
            [program, *arguments], env=os.environ | {"PATH": PATH}, stdout=out, stderr=out, start_new_session=True
        )


def _wait_for(command: list[str], daemons: list[subprocess.Popen], folder: Path, seconds: float = 30) -> None:
    """Until the command succeeds. Fails, with the end of the logs, if a daemon ends or the time is over."""
    deadline = time.monotonic() + seconds
    while subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True).returncode:
        if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
            logs = [
                line for path in sorted(folder.glob("*.[lo][ou][gt]")) for line in path.read_text().splitlines()[-5:]
            ]
            pytest.fail(f"{' '.join(command)} did not succeed:\n" + "\n".join(logs))
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
