"""W&B as a mirror: what is recorded offline, and that none of its failures reaches the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import tracking
from bench.tracking import Tracker

# Runs in a process of its own, as W&B hooks into the one it starts in.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import pandas as pd
from PIL import Image
from bench.tracking import Tracker

root = Path(sys.argv[1])
Image.new("RGB", (4, 4)).save(root / "grid.png")
tracker = Tracker("offline", "isodiff", root / "kept")
with tracker.run("dit-t-2-aaaa", group="digits", config={"recipe": {"betas": (0.9, 0.99)}}, job_type="train") as mirror:
    for step in (20, 40):
        mirror.log({"train/step": step, "images_seen": 96 * step, "train_gflops": 5.5 * step, "train/loss": 1 / step})
    frame = pd.DataFrame([{"model": "dit", "scores.fd": 1.5}, {"model": "uvit", "scores.fd": None}])
    mirror.log_table("results", frame)
    mirror.log_image("samples/DiT T/2", root / "grid.png")
try:
    with tracker.run("failed", group="", config={}, job_type="train"):
        raise ZeroDivisionError
except ZeroDivisionError:
    print("the work's own error goes on its way")

blocked = Tracker("offline", "isodiff", root / "grid.png" / "below a file")
for name in ("one", "two"):
    with blocked.run(name, group="", config={}, job_type="train") as mirror:
        mirror.log({"train/step": 1})
print("unwritable:", blocked.mode)

tracker = Tracker("offline", "isodiff", root / "killed")
with tracker.run("killed", group="", config={}, job_type="train") as mirror:
    mirror.log({"train/step": 1})
    for stat in Path("/proc").glob("[0-9]*/stat"):  # W&B's own process is the only child of this one
        if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
            os.kill(int(stat.parent.name), signal.SIGKILL)
    time.sleep(0.3)
    for step in (2, 3, 4):
        mirror.log({"train/step": step})
print("killed:", tracker.mode)
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The script, run to its end -> (its directory, the finished process)."""
    root = tmp_path_factory.mktemp("wandb")
    home = {name: str(root / "home") for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | home
    command = [sys.executable, "-c", SCRIPT, str(root)]
    repository = Path(tracking.__file__).parent.parent
    return root, subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, timeout=120)


def inspect(directory: Path) -> list[dict]:
    """The records of an offline run, as W&B's own reader prints them."""
    program = Path(sys.executable).with_name("wandb")
    command = [program, "leet", "inspect", "--json", directory]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_an_offline_run_holds_what_was_logged(offline):
    (directory,) = (offline[0] / "kept" / "wandb").glob("offline-run-*-dit-t-2-aaaa")
    records = inspect(directory)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run["run_id"], run["run_group"], run["job_type"], run["project"]) == (
        "dit-t-2-aaaa",
        "digits",
        "train",
        "isodiff",
    )
    assert run["config"]["update"]["recipe"] == {"betas": [0.9, 0.99]}
    assert "git" not in run
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    fields = ("train/step", "images_seen", "train_gflops", "train/loss")
    assert [[row[key] for key in fields] for row in history[:2]] == [[20, 1920, 110.0, 0.05], [40, 3840, 220.0, 0.025]]
    axes = [record["metric"] for record in records if record["type"] == "metric"]
    assert [(axis.get("glob_name"), axis.get("step_metric")) for axis in axes] == [(None, None), ("*", "train/step")]
    summary = {key: value for record in records for key, value in record.get("summary", {}).get("update", {}).items()}
    assert (summary["results.ncols"], summary["results.nrows"]) == (2, 2)
    assert list((directory / "files" / "media" / "images").rglob("*.png"))


def test_an_error_of_the_work_passes_through_and_marks_the_run_failed(offline):
    assert "the work's own error goes on its way" in offline[1].stdout
    (directory,) = (offline[0] / "kept" / "wandb").glob("offline-run-*-failed")
    assert [record["exit"]["exit_code"] for record in inspect(directory) if record["type"] == "exit"] == [1]


def test_failures_of_wandb_are_one_warning_each_and_the_work_ends_well(offline):
    process = offline[1]
    assert (process.returncode, process.stderr) == (0, "")
    warnings = [line for line in process.stdout.splitlines() if line.startswith("W&B is off from here on")]
    assert ["NotADirectoryError" in line for line in warnings] == [True, False]
    assert "unwritable: off" in process.stdout and "killed: off" in process.stdout


@pytest.fixture
def keyless(tmp_path, monkeypatch):
    """A home without a W&B key."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_online_without_a_key_stays_offline_and_says_so_once(keyless, capsys):
    (keyless / ".netrc").write_text("machine example.org login a password b\n")
    assert Tracker("online", "isodiff", keyless).mode == "offline"
    assert capsys.readouterr().out.count("`wandb sync`") == 1


@pytest.mark.parametrize("host", ["api.wandb.ai", "wandb.example.org"])
def test_online_with_a_netrc_entry_or_a_key_is_online(keyless, monkeypatch, capsys, host):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    (keyless / ".netrc").write_text(f"machine {host} login user password made-up\n")
    assert Tracker("online", "isodiff", keyless).mode == "online"
    (keyless / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "made-up")
    assert Tracker("online", "isodiff", keyless).mode == "online"
    assert capsys.readouterr().out == ""


def test_only_the_first_process_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert Tracker("offline", "isodiff", tmp_path).mode == "off"


def test_off_loads_and_writes_nothing(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom bench.tracking import Tracker\n"
        "with Tracker('off', 'isodiff', Path(sys.argv[1])).run('a', group='', config={}, job_type='train') as mirror:\n"
        "    mirror.log({'train/step': 1})\n    mirror.log_image('a', Path('nowhere.png'))\n"
        "print(sorted({'wandb', 'torch', 'pandas'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []
