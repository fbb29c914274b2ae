"""run.json: the same words whoever launched a run, and a run that was killed is told from one that works."""

from __future__ import annotations

import json
import socket

import pytest
from small_runs import directory, start, until, words

from bench.errors import UserError
from bench.training.run_record import RunRecord


def test_a_training_that_works_holds_its_run(tmp_path):
    """Another one of the same run is refused, with the process to look for; when it is killed, the run is free."""
    command, output = words(tmp_path, "budget.steps=100000"), tmp_path / "out.txt"
    first = start(*command, output=output)
    until(first, lambda: list(tmp_path.glob("runs/*/metrics.jsonl")))
    record = RunRecord(directory(tmp_path))
    known = record.read()
    assert (known["state"], known["pid"], known["host"]) == ("running", first.pid, socket.gethostname())
    assert known["steps"] == 100000 and record.alive()
    second = start(*command, output=tmp_path / "second.txt")
    second.join()
    assert second.exitcode == 2
    assert (
        f"is being trained by another process ({first.pid} on {known['host']})" in (tmp_path / "second.txt").read_text()
    )
    assert record.read() == known
    first.kill()
    first.join()
    assert record.read() == known and not record.alive()


@pytest.mark.parametrize(
    "error, state",
    [
        (UserError("what went wrong"), "failed"),
        (ZeroDivisionError("by 0"), "failed"),
        (KeyboardInterrupt(), "preempted"),
    ],
)
def test_a_training_that_ends_early_says_how(tmp_path, error, state):
    record = RunRecord(tmp_path)
    with pytest.raises(type(error)), record.training(steps=7, changed={}):
        raise error
    known = record.read()
    assert (known["state"], known["steps"], record.alive()) == (state, 7, False)
    said = {"failed": "what went wrong" if isinstance(error, UserError) else "ZeroDivisionError: by 0"}
    assert known.get("error") == said.get(state)
    record.write("finished", steps=7, train_seconds=1.5)
    assert record.read() == {"state": "finished", "steps": 7, "train_seconds": 1.5}


def test_the_first_process_to_fail_says_why(tmp_path):
    record = RunRecord(tmp_path)
    record.write("running", steps=7)
    record.fail(UserError("the disk is full"))
    record.fail(RuntimeError("connection closed by peer"))
    assert record.read() == {"state": "failed", "steps": 7, "error": "the disk is full"}


def test_another_machine_is_taken_on_trust(tmp_path):
    record = RunRecord(tmp_path)
    record.write("running", host="elsewhere")
    assert record.alive()
    record.write("running", host=socket.gethostname())
    assert not record.alive()


def test_a_failing_evaluation_leaves_a_trained_run_finished(tmp_path):
    output = tmp_path / "out.txt"
    process = start(*words(tmp_path, "budget.steps=2"), output=output)
    process.join()
    process = start("evaluate", str(directory(tmp_path)), "eval.reference=missing.npz", output=output)
    process.join()
    assert process.exitcode == 2
    assert json.loads((directory(tmp_path) / "run.json").read_text())["state"] == "finished"
