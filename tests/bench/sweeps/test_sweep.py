"""Sweeps: what a file expands to, what is refused, and local jobs end to end."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path

import pytest
import yaml

from bench.config import load_reference, load_run
from bench.errors import UserError
from bench.registry import CONFIGS
from bench.scoring.scorer import write_reference
from bench.store import ResultStore
from bench.sweeps.jobs import JobRecord
from bench.sweeps.launch import launch
from bench.sweeps.printed import commands, describe, wandb_config
from bench.sweeps.status import adopt, states, table
from bench.sweeps.sweep import Sweep, expand, load_sweep, one_run
from bench.training.run_record import RunRecord
from models.dit import SIZES

BASE = {
    "use": {"model": "dit", "data": "synthetic", "recipe": "digits", "eval": "digits"},
    "model": {"size": "T/2", "depth": 1},
    "recipe": {"batch_size": 8, "sampler": {"steps": 2}},
    "budget": {"steps": 4},
    "eval": {"num_samples": 16, "batch_size": 8, "extractor": "random", "metrics": ["fid"]},
    "tracking": "off",
    "trainer": {"accelerator": "cpu"},
}


@pytest.fixture
def write(tmp_path):
    """Writes a sweep file over BASE; its runs lie in the test's folder."""

    def write(**changes) -> Path:
        path = tmp_path / "small.yaml"
        paths = {"runs": f"{tmp_path}/runs", "cache": f"{tmp_path}/cache"}
        path.write_text(yaml.safe_dump({**BASE, "paths": paths, **changes}, sort_keys=False))
        return path

    return write


def values(sweep: Sweep) -> list[dict]:
    return [run.values for run in sweep.runs]


def test_rows_grid_and_draws_multiply_in_the_order_of_the_file(write):
    sweep = expand(
        write(
            equal="none",
            sweep={
                "list": [{"model.depth": 1}, {"model.depth": 2}],
                "grid": {"seed": [0, 1], "budget.steps": [4, 8]},
                "random": {"recipe.optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "count": 2},
            },
        )
    )
    keys = ("model.depth", "seed", "budget.steps")
    expected = [(d, s, b) for d in (1, 2) for s in (0, 1) for b in (4, 8) for _ in range(2)]
    assert [tuple(run[key] for key in keys) for run in values(sweep)] == expected
    rates = [run["recipe.optimizer.lr"] for run in values(sweep)]
    assert rates[:2] * 8 == rates and 1e-4 <= min(rates) < max(rates) <= 1e-2


@pytest.mark.parametrize("recipe", ["digits", "paper"])
def test_runs_are_those_of_the_merge_in_full(write, recipe):
    """What is shared is merged once; every run must be as if it had been merged alone."""
    grid = {
        "model.depth": [1, 2],
        "recipe.optimizer.betas": [[0.9, 0.99], [0.9, 0.95]],
        "seed": [0, 7],
        "eval.cfg_scale": [1, 2.5],
        "use.model": ["dit", "uvit"],
    }
    path = write(use={**BASE["use"], "recipe": recipe}, equal="images", sweep={"grid": grid})
    sweep = expand(path)
    plain = path.with_name("plain.yaml")
    plain.write_text(
        yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in ("sweep", "equal")})
    )
    assert len(sweep.runs) == 32
    for run in sweep.runs:
        alone = load_run(str(plain), [f"{key}={json.dumps(value)}" for key, value in run.values.items()])
        assert (run.run_id, run.config) == (alone.run_id, yaml.safe_load(alone.to_yaml()))


def test_more_draws_keep_the_earlier_ones_and_other_keys_do_not_move_them(write):
    rate = {"recipe.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    decay = {"recipe.ema_decay": {"uniform": [0.5, 0.9]}, "model.depth": {"choice": [1, 2]}}
    few = values(expand(write(equal="images", sweep={"random": {**rate, "count": 2}})))
    more = values(expand(write(equal="images", sweep={"random": {**decay, **rate, "count": 5}})))
    other = values(expand(write(equal="images", sweep={"random": {**rate, "count": 2, "seed": 1}})))
    assert [run["recipe.optimizer.lr"] for run in more][:2] == [run["recipe.optimizer.lr"] for run in few]
    assert few != other


def test_overrides_reach_every_run_and_the_sweep_itself(write):
    path = write(sweep={"grid": {"seed": [0, 1]}})
    sweep = expand(path, ["budget.steps=6", "sweep.grid.seed=[3,4,5]", "sweep.slurm.partition=gpu"])
    assert [(run.steps, run.config["seed"]) for run in sweep.runs] == [(6, 3), (6, 4), (6, 5)]
    assert sweep.slurm.partition == "gpu"


def test_rows_of_a_comparison_are_runs(write):
    path = write(models={"dit": {"size": "T/2"}, "wide": {"architecture": "uvit", "size": "T/2"}}, equal="images")
    sweep = expand(path, ["models.wide.depth=2"])
    assert [(run.config["use"]["model"], run.config["model"]["depth"]) for run in sweep.runs] == [
        ("dit", 1),
        ("uvit", 2),
    ]


@pytest.mark.parametrize(
    "changes, overrides, words",
    [
        ({"sweep": {"grid": {"model.dept": [1]}}}, [], ["small.yaml, sweep", "model.dept", "Did you mean depth"]),
        ({"sweep": {"grid": {"model.size": ["T/3"]}}}, [], ["model.size 'T/3'", "T/2"]),
        ({"sweep": {"grid": {"seed": 3}}}, [], ["sweep.grid.seed is 3", "list of values"]),
        ({"sweep": {"grd": {"seed": [3]}}}, [], ["sweep.grd", "Did you mean grid"]),
        ({"sweep": {}}, [], ["varies nothing"]),
        ({"sweep": {"random": {"seed": 0, "recipe.ema_decay": {"uniform": [0.1, 0.2]}}}}, [], ["count"]),
        ({"sweep": {"random": {"recipe.ema_decay": {"normal": [0, 1]}, "count": 1}}}, [], ["loguniform"]),
        ({"sweep": {"grid": {"seed": [1]}, "list": [{"seed": 2}]}}, [], ["seed twice"]),
        ({"sweep": {"grid": {"seed": [0, 1, 0]}}}, [], ["are the same run"]),
        ({"sweep": {"grid": {"trainer.devices": [1, 2]}}}, [], ["are the same run", "trainer"]),
        ({"sweep": {"grid": {"seed": [0, 1]}}}, ["trainer.devices=3"], ["recipe.batch_size is 8", "3 x 1 x 1 = 3"]),
        ({"sweep": 3}, [], ["small.yaml: sweep is 3", "sweep.grid.seed=[0,1]"]),
        ({"sweep": {"grid": 3}}, [], ["sweep.grid is 3", "sweep.grid.seed=[0,1]"]),
        ({"sweep": {"random": {"recipe.ema_decay": {"uniform": ["a", "b"]}, "count": 1}}}, [], ["uniform is ['a'"]),
        ({"sweep": {"grid": {"seed": [0]}}}, ["sweep.slurm.timeout_min=x"], ["timeout_min is 'x'", "whole number"]),
        ({"sweep": {"grid": {"seed": [0]}}}, ["sweep.slurm.mem_gb=x"], ["mem_gb is 'x'", "above 0"]),
        ({"sweep": {"grid": {"seed": [0]}}}, ["sweep.slurm.setup=foo"], ["setup is 'foo'", "list of shell lines"]),
        ({"sweep": {"grid": {"paths.runs": ["a", "b"]}}}, [], ["cannot vary paths.runs"]),
        ({"sweep": {"grid": {"seed": [0, 1]}}}, ["seed=3"], ["command line: seed", "varies"]),
        ({"sweep": {"grid": {"seed": [0, 1]}}}, ["equal=steps"], ["equal 'steps'", "train_gflops"]),
        ({"sweep": {"grid": {"model.depth": [1, 2]}}}, [], ["small.yaml", "differ by", "train_gflops"]),
        ({"sweep": {"grid": {"gflops": [1]}}}, [], ["equal: gflops"]),
        ({"sweep": {"grid": {"seed": [0]}, "slurm": {"time": 3}}}, [], ["sweep.slurm.time", "timeout_min"]),
        ({"sweep": {"grid": {"seed": [0]}, "slurm": {"timeout_min": 2}}}, [], ["at least 5 minutes"]),
    ],
)  # fmt: skip
def test_bad_sweeps_are_refused_in_one_sentence(write, changes, overrides, words):
    with pytest.raises(UserError) as error:
        expand(write(**changes), overrides)
    for word in words:
        assert word in str(error.value)


def test_a_sweep_that_is_no_yaml_is_told_with_its_file(write):
    path = write()
    path.write_text("sweep: [1\n")
    with pytest.raises(UserError, match=r"small\.yaml: not valid YAML"):
        load_sweep(str(path))


def test_budgets_may_vary_where_runs_of_one_budget_are_equal(write):
    grid = {"budget.images": [800, 1600], "model.depth": [1, 2]}
    sweep = expand(write(budget={}, equal="images", sweep={"grid": grid}))
    assert [run.images for run in sweep.runs] == [800, 800, 1600, 1600]


def test_a_gflops_target_takes_the_nearest_named_size(write):
    """Every size is counted by itself; the nearest by ratio must be what a target picks."""
    shared = {"model": {}, "budget": {"images": 80}}
    every = expand(write(**shared, equal="images", sweep={"grid": {"model.size": list(SIZES)}}))
    cost = {run.config["model"]["size"]: run.gflops for run in every.runs}
    # The last target is nearer to T/2 by difference.
    targets = [cost["S/4"] * 1.03, cost["XL/2"] * 2, cost["T/2"] * 2.35]
    nearest = [min(cost, key=lambda size: max(cost[size] / target, target / cost[size])) for target in targets]
    sweep = expand(write(**shared, equal="gflops", sweep={"grid": {"gflops": targets}}))
    assert [run.config["model"]["size"] for run in sweep.runs] == nearest == ["S/4", "XL/2", "S/8"]
    assert targets[2] - cost["T/2"] < cost["S/8"] - targets[2]
    assert [run.gap for run in sweep.runs] == pytest.approx([1 / 1.03 - 1, -0.5, cost["S/8"] / targets[2] - 1])
    assert "size S/4, -2.9% of the target" in describe(sweep)


def test_a_sweep_is_stored_and_expanded_again_only_if_something_changed(write, monkeypatch):
    path = write(sweep={"grid": {"seed": [0, 1]}})
    first = load_sweep(str(path))
    with monkeypatch.context() as patched:
        patched.setattr("bench.sweeps.sweep.expand", lambda *_: pytest.fail("expanded again"))
        assert load_sweep(str(path)) == first
    assert load_sweep(str(path), ["budget.steps=5"]).directory != first.directory
    path.write_text(path.read_text().replace("- 1\n", "- 2\n"))
    assert [run.values for run in load_sweep(str(path)).runs] == [{"seed": 0}, {"seed": 2}]


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweep").glob("digits-*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_of_the_embedded_digits_are_equal_in_compute(path, tmp_path):
    sweep = expand(path, [f"paths.runs={tmp_path}"])
    for budget in {run.config["budget"]["train_gflops"] for run in sweep.runs}:
        spent = [run.train_gflops for run in sweep.runs if run.config["budget"]["train_gflops"] == budget]
        assert max(spent) / min(spent) - 1 < 0.02 and max(spent) <= budget


def test_lines_of_one_training_share_its_commands(write):
    """A sweep over the protocol trains once and scores by each."""
    sweep = expand(write(sweep={"grid": {"eval.cfg_scale": [1.0, 2.0]}}))
    ((first, second),) = sweep.trainings().values()
    directory = f"{sweep.root}/{first.run_id}"
    assert commands(first, first) == [
        f"python -m bench train {directory}/config.yaml",
        f"python -m bench evaluate {directory}",
    ]
    assert [shlex.split(command) for command in commands(second, first)] == [
        ["python", "-m", "bench", "evaluate", directory, "eval.cfg_scale=2.0"]
    ]


def test_printed_configs_are_the_runs(write, capsys):
    sweep = load_sweep(str(write(sweep={"grid": {"seed": [0, 1]}})))
    launch(sweep, "print")
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [words[3] for words in printed] == ["train", "evaluate", "train", "evaluate"]
    assert [load_run(words[4]).run_id for words in printed[::2]] == [run.run_id for run in sweep.runs]


def test_a_wandb_sweep_runs_the_same_points(write):
    path = write(sweep={"grid": {"seed": [0, 1], "recipe.ema_decay": [0.5, 0.9]}})
    config = yaml.safe_load(wandb_config(str(path)))
    assert config["method"] == "grid"
    assert config["parameters"] == {"seed": {"values": [0, 1]}, "recipe.ema_decay": {"values": [0.5, 0.9]}}
    assert config["command"][2:] == ["-m", "bench", "sweep", "run", str(path), "${args_no_hyphens}"]
    assert one_run(str(path), ["seed=1", "recipe.ema_decay=0.9"])[1] == load_sweep(str(path)).runs[3]
    with pytest.raises(UserError, match=r"recipe\.ema_decay"):
        one_run(str(path), ["seed=1"])


def test_a_wandb_sweep_of_draws_and_of_rows(write):
    rate = {"recipe.optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "count": 3}
    config = yaml.safe_load(wandb_config(str(write(sweep={"random": rate}))))
    drawn = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    assert (config["method"], config["run_cap"]) == ("random", 3)
    assert config["parameters"] == {"recipe.optimizer.lr": drawn}
    path = write(sweep={"list": [{"seed": 0}, {"seed": 1}]})
    config, sweep = yaml.safe_load(wandb_config(str(path))), load_sweep(str(path))
    assert config["parameters"] == {"sweep.run": {"values": [run.run_id for run in sweep.runs]}}
    assert one_run(str(path), [f"sweep.run={sweep.runs[1].run_id}"])[1] == sweep.runs[1]


def test_states_follow_run_json_metrics_and_results(write, make_result):
    sweep = load_sweep(str(write(sweep={"grid": {"seed": [0, 1, 2, 3]}})))
    new, running, scored, failed = sweep.trainings()
    root = Path(sweep.root)
    RunRecord(root / running).write("running", host="elsewhere")
    RunRecord(root / scored).write("finished")
    log = {"train/step": 2, "images_seen": 16, "train/images_per_s": 4.0}
    (root / running / "metrics.jsonl").write_text(json.dumps(log) + '\n{"train/st')
    JobRecord(sweep.directory, failed).write(state="failed", launcher="local", job="1", error="no such file")
    row = make_result(run_id=scored, steps=4, comparison="other", protocol=sweep.runs[2].protocol, fd=(61.0, 1.0))
    ResultStore(root / "results.jsonl").append(row)

    found = states(sweep)
    assert [found[run_id].state for run_id in (new, running, scored, failed)] == [
        "waiting",
        "running",
        "finished",
        "failed",
    ]
    assert (found[running].steps, found[running].seconds_left) == (2, 4.0)  # 16 images left at 4 a second
    assert found[failed].error == "no such file" and "no such file" in table(sweep)
    by_hand = RunRecord(root / running)
    with by_hand.training(steps=4, changed={}):
        assert (states(sweep)[running].state, states(sweep)[running].alive) == ("running", True)
        by_hand.write("running", host=socket.gethostname())
    assert states(sweep)[running].state == "preempted"  # killed: it says running, but nobody holds its lock
    adopt(sweep)
    adopt(sweep)
    assert [row.comparison for row in ResultStore(root / "results.jsonl").load()] == ["other", "small"]


def test_local_jobs_train_and_score_and_what_failed_is_retried(write, tmp_path, capsys):
    """One run of two lacks its reference: the other is done all the same, and only the failed one is repeated."""
    reference = tmp_path / "reference.npz"
    path = write(sweep={"list": [{"seed": 0}, {"seed": 1, "eval.reference": str(reference)}]})
    sweep = load_sweep(str(path))
    good, bad = sweep.trainings()
    with pytest.raises(UserError, match=rf"1 of 2 runs failed[\s\S]*{bad}.*{reference.name}"):
        launch(sweep, "local", at_once=2)
    assert {run_id: entry.state for run_id, entry in states(sweep).items()} == {good: "finished", bad: "failed"}
    assert json.loads((Path(sweep.root) / bad / "run.json").read_text())["state"] == "failed"
    written = (Path(sweep.root) / good / "config.yaml").stat().st_mtime_ns

    write_reference("synthetic", reference, load_reference(["eval.extractor=random", f"paths.cache={tmp_path}/cache"]))
    with pytest.raises(UserError, match="retry-failed"):
        launch(sweep, "local")  # a failed run is not repeated unasked
    launch(sweep, "local", retry_failed=True)
    assert [entry.state for entry in states(sweep).values()] == ["finished", "finished"]
    rows = ResultStore(Path(sweep.root) / "results.jsonl").load()
    assert [(row.run_id, row.comparison) for row in rows] == [(good, "small"), (bad, "small")]
    assert (Path(sweep.root) / good / "config.yaml").stat().st_mtime_ns == written
    capsys.readouterr()
    launch(sweep, "local")
    assert "0 of 2 runs to do, 2 finished" in capsys.readouterr().out


@pytest.mark.parametrize("launcher", ["local", "slurm"])
@pytest.mark.parametrize("at_once", [0, -1])
def test_no_job_at_once_is_refused_before_anything_starts(write, launcher, at_once):
    sweep = load_sweep(str(write(sweep={"grid": {"seed": [0]}})))
    with pytest.raises(UserError, match=f"--at-once is {at_once}; give at least 1"):
        launch(sweep, launcher, at_once=at_once)
    assert [path.name for path in sweep.directory.iterdir()] == ["sweep.json"]


@pytest.mark.distributed
def test_a_local_job_of_two_processes(write):
    sweep = load_sweep(str(write(trainer={"accelerator": "cpu", "devices": 2}, sweep={"grid": {"seed": [0]}})))
    launch(sweep, "local")
    (row,) = ResultStore(Path(sweep.root) / "results.jsonl").load()
    assert (row.world_size, states(sweep)[row.run_id].state) == (2, "finished")
