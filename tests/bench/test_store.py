"""results.jsonl: nothing is lost, stored twice or read wrongly."""

from __future__ import annotations

import json
import multiprocessing
import resource
import subprocess
from dataclasses import replace

import numpy
import pytest
import torchmetrics

from bench import store
from bench.errors import UserError
from bench.store import Result, ResultStore


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "results.jsonl"


def test_rows_come_back_as_they_were_stored_and_in_order(path, comparison):
    for row in comparison:
        assert ResultStore(path).append(row)
    assert ResultStore(path).load() == comparison
    assert ResultStore(path).load(model="dit", steps=50) == [comparison[1]]


def test_a_store_without_a_file_is_empty(path):
    assert ResultStore(path).load() == []


def test_the_same_checkpoint_under_the_same_protocol_is_stored_once(path, make_result):
    row, other = make_result(), make_result(protocol={"num_samples": 1000})
    again = replace(
        row, world_size=2, created="2026-01-02T00:00:00+00:00", protocol=dict(reversed(row.protocol.items()))
    )
    results = [ResultStore(path).append(r) for r in (row, again, other, replace(row, comparison="digits2"))]
    assert results == [True, False, True, True]
    assert len(path.read_text().splitlines()) == 3


def long_name(worker: int, step: int) -> str:
    return f"{worker:02}-{step}/" * 10_000


def append_many(path, worker: int, make_row, start) -> None:
    """Rows of its own, and rows that every worker has; each pair of them at the same moment as the other workers."""
    for step in range(5):
        start.wait(timeout=60)
        ResultStore(path).append(make_row(run_id="shared", steps=step, checkpoint=f"step-{step}"))
        # Far longer than what a pipe or a buffer takes at once.
        ResultStore(path).append(make_row(run_id=f"run-{worker}", steps=step, checkpoint=long_name(worker, step)))


def test_appends_of_twenty_processes_lose_nothing_and_repeat_nothing(path, make_result):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(20)
    workers = [fork.Process(target=append_many, args=(path, k, make_result, start)) for k in range(20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 20
    rows = ResultStore(path).load()
    expected = [(name, step) for name in ("shared", *(f"run-{k}" for k in range(20))) for step in range(5)]
    assert sorted((row.run_id, row.steps) for row in rows) == sorted(expected)
    for row in rows:
        if row.run_id != "shared":
            assert row.checkpoint == long_name(int(row.run_id[4:]), row.steps)


def test_a_full_disk_keeps_the_rows_and_says_so(path, make_result):
    """A true limit on the size of a file: the row is cut off in its middle."""
    ResultStore(path).append(make_result())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, before[1]))
    try:
        with pytest.raises(UserError, match=r"results\.jsonl could not be written \(\[Errno 27\] File too large"):
            ResultStore(path).append(make_result(run_id="second"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes().count(b"\n") == 1 and not path.read_bytes().endswith(b"\n")
    assert ResultStore(path).load() == [make_result()]
    assert ResultStore(path).append(make_result(run_id="second"))
    assert [row.run_id for row in ResultStore(path).load()] == [make_result().run_id, "second"]


def test_half_a_line_left_by_a_crash_is_set_aside_and_said(path, make_result, capsys):
    first, second = make_result(), make_result(run_id="second")
    ResultStore(path).append(first)
    torn = json.dumps(second.to_dict())[:100]
    with path.open("a") as file:
        file.write(torn)
    assert ResultStore(path).load() == [first]
    assert "cut off by a crash and is left out" in capsys.readouterr().out
    assert ResultStore(path).append(second)
    assert f"set aside in {path.with_name('results.torn')}" in capsys.readouterr().out
    assert path.with_name("results.torn").read_text() == torn + "\n"
    assert ResultStore(path).load() == [first, second]


def test_a_last_line_without_its_newline_is_kept(path, make_result):
    ResultStore(path).append(make_result())
    path.write_text(path.read_text().rstrip("\n"))
    assert ResultStore(path).append(make_result(run_id="second"))
    assert [row.run_id for row in ResultStore(path).load()] == [make_result().run_id, "second"]
    assert not path.with_name("results.torn").exists()


def test_a_row_with_wrong_keys_is_named_by_file_and_line(path, make_result):
    ResultStore(path).append(make_result())
    row = make_result().to_dict()
    del row["gflops"]
    with path.open("a") as file:
        file.write(json.dumps(row | {"macs": 1}) + "\n")
    with pytest.raises(UserError, match=r"results.jsonl, line 2: missing keys: gflops; unknown keys: macs"):
        ResultStore(path).load()


@pytest.mark.parametrize("line", ["{}", "[]", "[1, 2]", "7", "{'single': 'quotes'}"])
def test_a_line_that_is_no_result_is_named_by_file_and_line(path, make_result, line):
    ResultStore(path).append(make_result())
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(UserError, match=r"results\.jsonl, line 1.*Delete the line and evaluate its run again"):
        ResultStore(path).load()


def test_a_file_in_place_of_the_runs_directory_is_refused(path, make_result):
    ResultStore(path).append(make_result())
    with pytest.raises(UserError, match=r"results\.jsonl is a file. Give the directory"):
        ResultStore(path / "results.jsonl").load()


def test_versions_are_those_that_are_imported():
    versions = store.provenance()["versions"]
    assert versions["numpy"] == numpy.__version__
    assert versions["torchmetrics"] == torchmetrics.__version__
    assert set(versions) == {"python", "isodiff", "torch", "lightning", "torchmetrics", "numpy"}


def test_provenance_fills_the_fields_of_a_result(make_result):
    row = Result(**make_result().to_dict() | store.provenance())
    assert row.git_commit == store.provenance()["git_commit"]


def test_the_commit_is_marked_when_the_code_was_changed_since(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(store, "ROOT", tmp_path.resolve())
    assert store.provenance()["git_commit"] == "unknown"  # no repository
    git("init")
    assert store.provenance()["git_commit"] == "unknown"  # no commit
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert store.provenance()["git_commit"] == commit
    (tmp_path / "new.py").write_text("2\n")
    assert store.provenance()["git_commit"] == f"{commit}+dirty"
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(store, "ROOT", tmp_path.resolve() / "site-packages")
    assert store.provenance()["git_commit"] == "unknown"  # installed in a repository that is not ours
