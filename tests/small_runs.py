"""Small trainings for the tests of what runs live through, in processes forked from one that has imported torch.

A start takes no seconds of imports; the process is one of its own all the same, and can be killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

HEAVY = ["bench.training.train", "bench.evaluate", "models.dit", "datamodules.synthetic"]


SMALL = [
    "use.data=synthetic",
    "model.depth=1",
    "recipe.batch_size=8",
    "recipe.sampler.steps=2",
    "budget.train_gflops=null",
    "eval.num_samples=16",
    "eval.batch_size=8",
    "eval.extractor=random",
    "eval.metrics=[fid]",
    "tracking=off",
    "trainer.accelerator=cpu",
    "trainer.log_every=1",
]


def words(root: Path, *more: str) -> list[str]:
    """The command that trains into root/runs; all of a test share a cache."""
    return ["train", "digits", *SMALL, f"paths.runs={root / 'runs'}", f"paths.cache={root.parent / 'cache'}", *more]


def merged(words: list[str]) -> list[str]:
    """A command whose settings are given once each, the last one of a key."""
    keys = [word.partition("=")[0] if "=" in word else None for word in words]
    return [word for i, word in enumerate(words) if keys[i] is None or keys[i] not in keys[i + 1 :]]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def directory(root: Path) -> Path:
    """The one run directory in root/runs, or the run directory itself."""
    if (root / "config.yaml").exists():
        return root
    (found,) = (root / "runs").glob("*/config.yaml")
    return found.parent


def checkpoint(root: Path, step: int) -> dict[str, Any]:
    return torch.load(directory(root) / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True)


def start(
    *words: str,
    output: Path,
    largest_file: int = resource.RLIM_INFINITY,
    environment: dict[str, str] | None = None,
) -> ForkServerProcess:
    """A process that runs the command, at once; what it prints goes to a file. `largest_file`: bytes it may write."""
    context = multiprocessing.get_context("forkserver")
    os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=_run, args=(words, output, largest_file, environment or {}))
    process.start()
    return process


def run(*words: str, output: Path, environment: dict[str, str] | None = None) -> str:
    """The command, run to its end -> what it printed."""
    process = start(*words, output=output, environment=environment)
    process.join()
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def until(process: Any, ready: Callable[[], Any]) -> None:
    """Return when `ready()` says so, or the process has ended."""
    while process.is_alive() and not ready():
        time.sleep(0.0002)


def _run(words: tuple[str, ...], output: Path, largest_file: int, environment: dict[str, str]) -> None:
    from bench import signals, tracking
    from bench.cli import main

    os.environ |= environment
    tracking.START_S = 3  # no test waits for a server that is not there

    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv = ["bench", *words]
    signals.listen()
    main()


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, at any depth."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_training(a: Path, b: Path, step: int) -> None:
    """Weights, EMA, optimizer, learning rate, settings, and all of the log that is not speed."""
    one, other = checkpoint(a, step), checkpoint(b, step)
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers",
                "global_step", "isodiff"):  # fmt: skip
        assert_same(one[key], other[key], key)
    assert log(a) == log(b)


def log(root: Path) -> list[dict[str, float]]:
    """metrics.jsonl, less the rates of this machine."""
    lines = (directory(root) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "_per_s" not in key} for line in lines]


def score(root: Path) -> dict[str, float]:
    run("evaluate", str(directory(root)), output=root / "evaluate.txt")
    (row,) = map(json.loads, (root / "runs" / "results.jsonl").read_text().splitlines())
    return row["scores"]
