"""Signals: a training finishes its step and saves, whatever else is under way ends, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import SMALL, assert_same_training, children, directory, log, run, start, words

from bench.registry import ROOT
from bench.training.run_record import RunRecord


def wait(ready: Callable[[], Any], process: Any) -> None:
    """Until `ready()`; fails where the process ends before."""
    while not ready():
        ended = process.poll() is not None if hasattr(process, "poll") else not process.is_alive()
        assert not ended, "it ended before"
        time.sleep(0.005)


def logged(root: Path) -> int:
    """The last step in the log."""
    found = list(root.glob("runs/*/metrics.jsonl"))
    lines = found[0].read_text().rpartition("\n")[0].splitlines() if found else []
    return json.loads(lines[-1])["train/step"] if lines else 0


def saved_step(root: Path) -> int:
    return torch.load(directory(root) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def bench(*command: str) -> subprocess.Popen:
    """A process of its own, imports and all, first of a group as under a shell."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_each_signal_saves_the_step_and_the_end_is_the_same(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for root in (whole, stopped):
        root.mkdir()
    run(*words(whole, "budget.steps=200"), output=whole / "out.txt")
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        process, begin = start(*words(stopped, "budget.steps=200"), output=stopped / "out.txt"), logged(stopped)
        wait(lambda begin=begin: logged(stopped) > begin + 2, process)
        os.kill(process.pid, signum)
        process.join()
        said = (stopped / "out.txt").read_text()
        assert process.exitcode == 128 + signum, said
        assert f"{signum.name}: finishing this step" in said and "The same command goes on" in said
        assert saved_step(stopped) == logged(stopped) < 200
        assert json.loads((directory(stopped) / "run.json").read_text())["state"] == "preempted"
    run(*words(stopped, "budget.steps=200"), output=stopped / "out.txt")
    assert_same_training(whole, stopped, 200)


def test_a_second_signal_ends_at_once(tmp_path):
    """In the middle of a long step: nothing is saved, and run.json says running although nobody is."""
    slow = [word.replace("batch_size=8", "batch_size=2048") for word in words(tmp_path, "budget.steps=10")]
    process = start(*slow, output=tmp_path / "out.txt")
    wait(lambda: logged(tmp_path) == 1, process)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    process.join()
    assert process.exitcode == 143, (tmp_path / "out.txt").read_text()
    assert logged(tmp_path) == 1 and not list(directory(tmp_path).glob("checkpoints/*"))
    record = RunRecord(directory(tmp_path))
    assert record.read()["state"] == "running" and not record.alive()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_during_the_imports_is_one_sentence(tmp_path, signum):
    process = bench(*words(tmp_path, "budget.steps=5"))
    maps = Path(f"/proc/{process.pid}/maps")
    wait(lambda: "libtorch_cpu" in maps.read_text(), process)
    process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == 128 + signum
    assert "Traceback" not in out + err and "The same command goes on" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.distributed
def test_one_process_then_two_then_one_see_the_same_batches(tmp_path):
    """Each is stopped by a signal, of two only the second one; the losses are those of one process all the way."""
    whole, changed, budget = tmp_path / "whole", tmp_path / "changed", "budget.steps=200"
    for root in (whole, changed):
        root.mkdir()
    run(*words(whole, budget), output=whole / "out.txt")
    one = start(*words(changed, budget), output=changed / "out.txt")
    wait(lambda: logged(changed) > 2, one)
    os.kill(one.pid, signal.SIGTERM)
    one.join()
    alone = saved_step(changed)
    two = bench(*words(changed, budget, "trainer.devices=2"))
    wait(lambda: logged(changed) > alone + 4, two)
    (second,) = children(two.pid)
    os.kill(second, signal.SIGUSR1)
    _, err = two.communicate()
    assert two.returncode == 128 + signal.SIGUSR1, err
    checkpoint = torch.load(directory(changed) / "checkpoints" / "last.ckpt", weights_only=True)
    assert alone + 4 < checkpoint["global_step"] == logged(changed) < 200
    (order,) = (value for key, value in checkpoint.items() if "DataModule" in key)
    assert order["samples_consumed"] == 8 * checkpoint["global_step"]
    run(*words(changed, budget), output=changed / "out.txt")
    assert [row["train/step"] for row in log(changed)] == list(range(1, 201))
    # Gradients of two processes are summed in another order, and 200 steps let that grow to about 2e-5.
    assert losses(changed) == pytest.approx(losses(whole), rel=1e-3)


def losses(root: Path) -> list[float]:
    return [row["train/loss"] for row in log(root)]


@pytest.mark.parametrize(
    "send, signum", [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)], ids=["kill", "Ctrl-C"]
)
def test_a_stopped_sweep_lets_its_job_save(tmp_path, send, signum):
    """Ctrl-C reaches the whole group: launcher, submitit's controller and the job."""
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump({"sweep": {"grid": {"seed": [0]}}}))
    more = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}", "budget.steps=100000"]
    launcher = bench("sweep", str(path), *SMALL, *more)
    wait(lambda: logged(tmp_path) > 2, launcher)
    send(launcher.pid, signum)
    _, err = launcher.communicate()
    assert launcher.returncode == 128 + signum, err
    assert saved_step(tmp_path) == logged(tmp_path)
    assert json.loads((directory(tmp_path) / "run.json").read_text())["state"] == "preempted"
