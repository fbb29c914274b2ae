"""Trainings with W&B on: they go on without it, and no secret is written anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import SMALL, children, directory, log, run, start, until, words

SECRETS = {
    "WANDB_API_KEY": "0f" * 20,  # as long as W&B wants it
    "HF_TOKEN": "hf_planted_for_this_test",
    "AWS_SECRET_ACCESS_KEY": "aws-planted-for-this-test",
}


def tracked(root: Path, mode: str, *more: str) -> list[str]:
    return [word.replace("tracking=off", f"tracking={mode}") for word in words(root, *more)]


def home(root: Path) -> dict[str, str]:
    """An environment in which W&B keeps everything below `root`."""
    return {name: str(root / "home") for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_no_secret_is_written_or_said(tmp_path, mode):
    """Of the environment, and of the server's address; online there is no server, and the training goes on."""
    address = {"WANDB_BASE_URL": "http://127.0.0.1:9"}
    settings = {"output": tmp_path / "out.txt", "environment": home(tmp_path) | SECRETS | address}
    said = run(*tracked(tmp_path, mode, "budget.steps=4"), **settings)
    assert [row["train/step"] for row in log(tmp_path)] == [1, 2, 3, 4]
    said += run("evaluate", str(directory(tmp_path)), **settings)
    assert ("W&B is off from here on" in said) == (mode == "online")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix in (".wandb", ".ckpt", ".jsonl")]) >= 3 + (mode == "offline")
    found = {str(path) for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()}
    assert found == set()


def test_a_training_outlives_the_process_of_wandb(tmp_path):
    output = tmp_path / "out.txt"
    process = start(*tracked(tmp_path, "offline", "budget.steps=60"), output=output, environment=home(tmp_path))
    until(process, lambda: list(tmp_path.glob("runs/*/metrics.jsonl")) and len(log(tmp_path)) > 3)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert output.read_text().count("W&B is off from here on") == 1
    assert [row["train/step"] for row in log(tmp_path)] == list(range(1, 61))
    assert json.loads((directory(tmp_path) / "run.json").read_text())["state"] == "finished"


def test_scores_go_to_the_run_that_an_agent_of_wandb_has_named(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text("{sweep: {grid: {seed: [0, 1]}}}")
    more = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path.parent / 'cache'}", "budget.steps=4", "seed=1"]
    given = [word.replace("tracking=off", "tracking=offline") for word in SMALL]
    agent = {"WANDB_SWEEP_ID": "sweep123", "WANDB_RUN_ID": "named42"}
    run("sweep", "run", str(path), *given, *more, output=tmp_path / "out.txt", environment=home(tmp_path) | agent)
    found = list(directory(tmp_path).glob("wandb/offline-run-*"))
    assert {folder.name.rpartition("-")[2] for folder in found} == {"named42"}
    logged = set()
    for folder in found:
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", folder]
        records = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        logged |= {key for record in map(json.loads, records) for key in record.get("history", {}).get("item", {})}
    assert {"train/loss", "fd16[random]"} <= logged
