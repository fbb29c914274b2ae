"""The command line: help with examples, overrides anywhere, mistakes as one sentence with exit code 2."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import cli

COMMANDS = ("compare", "train", "sample", "import", "export", "evaluate", "table", "plan", "figure", "report", "flops")


def run(monkeypatch, *words: str) -> int:
    """Exit code of `python -m bench words...`; 0 if it returns."""
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(monkeypatch, capsys, command):
    assert run(monkeypatch, command, "--help") == 0
    assert f"examples:\n  python -m bench {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, expected",
    [
        (["compare", "digts"], "Did you mean digits?"),
        (["train", "digits", "model.sise=S/2"], "Did you mean size?"),
        (["train", "digits", "--dry-run", "model.size=B/3"], "'B/3' is not a DiT size"),
        (["train", "digits", "--max-time", "5:00"], "Write HH:MM:SS or DD:HH:MM:SS"),
        (["train", "digits", "--max-time", "00:61:00"], "Write HH:MM:SS or DD:HH:MM:SS"),
        (["train", "digits", "trainer.grid_every=-1"], "trainer.grid_every is -1; it must be at least 1, or 0"),
        (["train", "digits", "trainer.stop_above_grad_norm=0"], "trainer.stop_above_grad_norm is 0.0"),
        (["sample", "runs/none"], "not a run directory"),
        (["evaluate", "runs/none"], "not a run directory"),
        (["flops", "dit/B/3"], "'B/3' is not a DiT size"),
        (["flops", "dot"], "Did you mean dit?"),
        (["table", "digits", "--runs", "/nonexistent"], "/nonexistent"),
        (["train", "digits", "extra"], "'extra' is not an override. Write key=value"),
        (["train", "digits", "budget.train_gflops", "60"], "'budget.train_gflops' is not an override"),
        (["train", "digits", "Model.size=S/2"], "Model is not a setting. Did you mean model?"),
        (["compare", "digits", "extra"], "'extra' is not an override"),
        (["train", "digits", "trainer.devices=3"], "3 x 1 x 1 = 3 does not divide"),
        (["train", "digits", "trainer.accumulate=7", "--dry-run"], "1 x 1 x 7 = 7 does not divide"),
        (["train", "digits", "=3"], "Write key=value"),
        (["plan", "dit-table4", "extra"], "'extra' is not a setting. Write key=value"),
        (["plan", "dit-table4", "seed=-1"], "seed is '-1'"),
        (["evaluate", "--samples", "a.npz", "--step", "5"], "--step names a checkpoint of a run"),
        (["report", "digits", "--out", "report.txt"], "end the name in .html"),
        (["evaluate", "runs/none", "paths.runs=/x"], "not a run directory"),
        (["import", "/", "--model", "dit", "--size", "S/2", "--steps", "1"], "/ holds no weights that are known"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(monkeypatch, capsys, words, expected):
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith(f"isodiff {words[0]}: ") and "Traceback" not in error


@pytest.mark.parametrize("text, seconds", [("00:30:00", 1800), ("100:00:05", 360_005), ("02:03:04:05", 183_845)])
def test_times_are_hours_minutes_seconds_behind_days(text, seconds):
    assert cli._seconds(text) == seconds


def test_an_unknown_flag_is_refused(monkeypatch, capsys):
    assert run(monkeypatch, "train", "digits", "--dryrun") == 2
    assert "--dryrun" in capsys.readouterr().err


def test_what_the_system_refuses_is_a_sentence_with_the_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    assert run(monkeypatch, "table", "digits", "--runs", str(tmp_path)) == 2
    assert f"isodiff table: {tmp_path}/results.jsonl: Is a directory. Give a path" in capsys.readouterr().err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_done(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "train", "digits", "trainer.accelerator=gpu") == 2
    assert "torch sees no GPU here. Give auto" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_config_budget_steps_and_time(monkeypatch, capsys):
    assert run(monkeypatch, "train", "--dry-run", "model.depth=1", "digits", "trainer.accelerator=cpu") == 0
    out = capsys.readouterr().out
    for words in (
        "depth: 1",
        "budget train_gflops=",
        "steps x",
        "train Gflops",
        "estimated training time",
        "command line",
    ):
        assert words in out
