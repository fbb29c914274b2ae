"""Runs that are killed, damaged, moved or short of disk: what is there at the end is what an undisturbed run leaves."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from small_runs import assert_same_training, directory, log, run, score, start, until, words


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing disturbed, by their steps."""

    @cache
    def whole(steps: int) -> Path:
        root = tmp_path_factory.mktemp("whole")
        run(*words(root, f"budget.steps={steps}"), output=root / "out.txt")
        return root

    return whole


def refused(*command: str, output: Path, **limits: int) -> str:
    """The sentence of a command that ends with exit code 2."""
    process = start(*command, output=output, **limits)
    process.join()
    said = output.read_text()
    assert process.exitcode == 2 and "Traceback" not in said, said
    return said


def newest(root: Path) -> int | None:
    """When the last checkpoint was replaced."""
    found = list(root.glob("runs/*/checkpoints/last.ckpt"))
    return found[0].stat().st_mtime_ns if found else None


def test_22_sigkills_change_no_bit(tmp_path, whole):
    """At random moments, and in the middle of writing a checkpoint: the same command ends with the same bits."""
    steps, kills, writing = 160, 22, 0
    budget, often = f"budget.steps={steps}", "trainer.checkpoint_minutes=1e-9"  # a checkpoint every step
    killed = tmp_path
    moments = random.Random(0)
    for number in range(kills):
        before = newest(killed)
        process = start(*words(killed, budget, often), output=killed / "out.txt")
        half = f"runs/*/checkpoints/.*.{process.pid}.tmp"  # what it writes now
        if number % 6 == 0:
            time.sleep(moments.uniform(0, 0.5))  # while it starts
        else:
            until(process, lambda before=before: newest(killed) != before)  # it has got on by a step
            time.sleep(moments.uniform(0, 0.05))
        if number % 2:
            until(process, lambda half=half: list(killed.glob(half)))
        process.kill()
        process.join()
        assert process.exitcode == -9, (killed / "out.txt").read_text()
        writing += bool(list(killed.glob(half)))
    assert writing >= 5, "hardly any was killed while it wrote"
    said = run(*words(killed, budget, often), output=killed / "out.txt")
    assert "resuming from" in said
    assert_same_training(whole(steps), killed, steps)
    assert [row["train/step"] for row in log(killed)] == list(range(1, steps + 1))
    assert score(whole(steps)) == score(killed)
    assert not [path for path in (killed / "runs").rglob("*") if path.suffix in (".tmp", ".broken")]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "one bit":
        content[len(content) // 2] ^= 1  # amid the numbers of a tensor: no structure shows it
    else:
        content = bytearray(pickle.dumps(Code(path.with_name("ran"))))  # not even an archive
    path.write_bytes(content)


class Code:
    """Loading it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["truncated", "one bit", "no archive"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, whole, how):
    budget = ["budget.steps=8", "eval.checkpoints=2"]
    run(*words(tmp_path, *budget), output=tmp_path / "out.txt")
    last = directory(tmp_path) / "checkpoints" / "step-00000008.ckpt"
    damage(last, how)
    if how == "one bit":
        assert "is damaged" in refused("evaluate", str(directory(tmp_path)), output=tmp_path / "out.txt")
    (directory(tmp_path) / "run.json").unlink()  # as if it had been killed before it said that it had finished
    said = run(*words(tmp_path, *budget), output=tmp_path / "out.txt")
    assert f"{last} cannot be used" in said and "set aside as step-00000008.broken" in said
    assert "resuming from" in said and "step-00000004.ckpt" in said
    assert_same_training(whole(8), tmp_path, 8)
    assert not last.with_name("ran").exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    run(*words(tmp_path, "budget.steps=4"), output=tmp_path / "out.txt")
    (final,), proof = (directory(tmp_path) / "checkpoints").glob("*.ckpt"), tmp_path / "ran"
    torch.save(torch.load(final, weights_only=True) | {"callbacks": Code(proof)}, final)
    (directory(tmp_path) / "run.json").unlink()
    for command in (words(tmp_path, "budget.steps=4"), ["evaluate", str(directory(tmp_path))]):
        said = refused(*command, output=tmp_path / "out.txt")
        assert f"{final} holds more than numbers and text (posix.system)" in said
    assert final.exists() and not proof.exists()


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path, whole):
    run(*words(tmp_path, "budget.steps=4"), output=tmp_path / "out.txt")
    own = directory(tmp_path)
    run(*words(tmp_path / "other", "budget.steps=4", "seed=1"), output=tmp_path / "out.txt")
    shutil.copy(directory(tmp_path / "other") / "checkpoints" / "step-00000004.ckpt", own / "checkpoints")
    said = refused("evaluate", str(own), output=tmp_path / "out.txt")
    assert "is of another run: it was trained with seed 1, not 0" in said
    (own / "run.json").unlink()
    assert "with seed 1, not 0" in refused(*words(tmp_path, "budget.steps=4"), output=tmp_path / "out.txt")
    shutil.copy(directory(whole(8)) / "checkpoints" / "step-00000008.ckpt", own / "checkpoints")
    said = refused(*words(tmp_path, "budget.steps=4"), output=tmp_path / "out.txt")
    assert "is of step 8, but this run ends at 4" in said


def test_a_config_changed_by_hand_is_refused_by_what_differs(tmp_path):
    run(*words(tmp_path, "budget.steps=4"), output=tmp_path / "out.txt")
    file = directory(tmp_path) / "config.yaml"
    file.write_text(file.read_text().replace("ema_warmup: true", "ema_warmup: false"))
    for command in (["evaluate", str(file.parent)], ["train", str(file)]):
        assert "with recipe.ema_warmup True, not False" in refused(*command, output=tmp_path / "out.txt")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB, less than five checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no right to make a file system here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_keeps_the_last_checkpoint(small_disk, whole):
    budget, often, output = "budget.steps=160", "trainer.checkpoint_minutes=1e-9", small_disk.with_name("out.txt")
    command = words(small_disk, budget, often)
    process = start(*command, output=output)
    until(process, lambda: newest(small_disk))
    fill = small_disk / "fill"
    with fill.open("wb", buffering=0) as file, suppress(OSError):
        while process.is_alive():
            file.write(bytes(1 << 14))
    process.join()
    said = output.read_text()
    assert process.exitcode == 2 and "Traceback" not in said, said
    assert "could not be written ([Errno 28] No space left on device)" in said and "the same command goes on" in said
    assert newest(small_disk)
    fill.unlink()
    assert "resuming from" in run(*words(small_disk, budget), output=output)
    assert_same_training(whole(160), small_disk, 160)
    assert not list((small_disk / "runs").rglob("*.tmp"))


@pytest.mark.parametrize("largest_file, name", [(3000, "metrics.jsonl"), (1_000_000, "step-00000008.ckpt")])
def test_a_limit_on_files_is_one_sentence(tmp_path, whole, largest_file, name):
    command = words(tmp_path, "budget.steps=8")
    said = refused(*command, output=tmp_path / "out.txt", largest_file=largest_file)
    assert f"{name} could not be written ([Errno 27] File too large)" in said
    state = json.loads((directory(tmp_path) / "run.json").read_text())
    assert (state["state"], name in state["error"]) == ("failed", True)
    run(*command, output=tmp_path / "out.txt")
    assert_same_training(whole(8), tmp_path, 8)
