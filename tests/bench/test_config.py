"""Configuration: order of the sources, identity of a run, and what a user reads after a mistake."""

from __future__ import annotations

import re

import pytest
import torch

from bench import registry
from bench.config import EXTRACTORS, SAMPLES_NEEDED, changed_settings, load_comparison, load_run, require_even_batches
from bench.errors import UserError
from bench.metrics import METRICS
from bench.metrics.frechet import Moments
from bench.scoring import features
from bench.scoring.reference import Reference
from models.uvit import UViTModule


def test_later_sources_win():
    config = load_run("digits", ["recipe.optimizer.lr=0.5", "model.depth=3"])
    assert config.recipe.optimizer.lr == 0.5  # command line over configs/recipe/digits.yaml
    assert config.recipe.sampler.name == "dpm_solver_pp"  # configs/recipe/digits.yaml over models/recipe.py
    assert config.model.size == "T/2"  # the run file
    assert (config.model.depth, config.model.width) == (3, 64)  # an override of one part; the size fills the rest


def test_paper_recipe_follows_the_size():
    large = load_run("digits", ["use.model=uvit", "use.recipe=paper", "model.size=L/2"])
    huge = load_run("digits", ["use.model=uvit", "use.recipe=paper", "model.size=H/2", "recipe.batch_size=8"])
    assert large.recipe == UViTModule.recipe_for(large.model)
    assert (large.recipe.process.name, huge.recipe.process.name) == ("vp", "sd_discrete")
    assert huge.recipe.batch_size == 8


@pytest.mark.parametrize(
    "overrides, changed",
    [
        (["use.recipe=paper", "use.model=uvit", "model.size=H/2"], {}),  # this size has a recipe of its own
        (["use.recipe=paper", "recipe.optimizer.lr=3e-4"], {"recipe.optimizer.lr": 3e-4}),
        (["recipe.optimizer.lr=1e-4", "recipe.sampler.steps=50"], {}),  # what it was; what changes no weights
        (["recipe.batch_size=64", "recipe.optimizer.betas=[0.9,0.95]"],
         {"recipe.batch_size": 64, "recipe.optimizer.betas": [0.9, 0.95]}),
        (["model.depth=3", "data.subset=100", "seed=3"], {"model.depth": 3, "data.subset": 100}),
    ],
)  # fmt: skip
def test_what_was_changed_is_what_the_names_do_not_say(overrides, changed):
    assert changed_settings(load_run("imagenet256", overrides)) == changed


def test_the_title_of_a_recipe_says_what_was_changed(make_result):
    assert make_result().recipe_title == "digits"
    changed = {"recipe.optimizer.lr": 3e-4, "model.depth": 3, "recipe.batch_size": 64}
    assert make_result(changed=changed).recipe_title == "digits with batch_size=64, optimizer.lr=0.0003"


def test_run_id_changes_with_what_is_trained_only():
    base = load_run("digits").run_id
    for same in ("trainer.devices=2", "paths.runs=elsewhere", "eval.num_samples=7", "tracking=off"):
        assert load_run("digits", [same]).run_id == base
    for other in ("seed=1", "model.depth=3", "recipe.batch_size=8", "trainer.precision=bf16-mixed"):
        assert load_run("digits", [other]).run_id != base


def test_config_of_a_run_repeats_it(tmp_path):
    config = load_run("digits", ["model.depth=3", "seed=4", "budget.train_gflops=5.5"])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_run(str(path)) == config


def test_a_comparison_gives_every_row_the_same_budget_recipe_and_protocol():
    comparison = load_comparison("digits", ["budget.train_gflops=30", "models.dit.depth=2"])
    assert [run.use.model for run in comparison.runs] == ["diffussm", "dit", "uvit"]
    assert {run.budget.train_gflops for run in comparison.runs} == {30}
    assert len({run.recipe for run in comparison.runs}) == 1
    assert comparison.runs[1].model.depth == 2 and comparison.runs[2].model.depth == 4


def test_one_architecture_in_two_sizes(tmp_path):
    path = tmp_path / "sizes.yaml"
    path.write_text(
        "use: {recipe: digits}\nbudget: {images: 500}\nequal: images\n"
        "models:\n  small: {architecture: dit, size: T/2}\n  large: {architecture: dit, size: S/2}\n"
    )
    comparison = load_comparison(str(path))
    assert [(run.use.model, run.model.size) for run in comparison.runs] == [("dit", "T/2"), ("dit", "S/2")]
    assert comparison.equal == "images"


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.detph=3"], ["command line", "model.detph", "Did you mean depth?"]),
        (["model.depth=deep"], ["command line", "model.depth", "'deep'"]),
        (["model.size=B/3"], ["command line", "B/3", "S/2"]),
        (["use.model=dti"], ["dti", "Did you mean dit?"]),
        (["use.recipe=sharde"], ["sharde", "Did you mean shared?"]),
        (["recipe.sampler.name=ddmi"], ["command line", "ddmi", "ddim"]),
        (["recipe.sampler.name=euler_maruyama"], ["euler_maruyama", "iddpm", "ddim"]),
        (["budget.steps=5"], ["command line", "budget.steps", "budget.train_gflops", "twice", "null"]),
        (["budget.train_gflops=-1"], ["command line", "-1", "above 0"]),
        (["recipe.optimizer.ssm_lr=0"], ["command line", "recipe.optimizer.ssm_lr is 0", "above 0", "null"]),
        (["recipe.optimizer.betas=[1.0,0.9]"], ["command line", "betas is [1.0, 0.9]", "both must lie in [0, 1)"]),
        (["recipe.optimizer.betas=[0.9,-0.1]"], ["betas is [0.9, -0.1]", "in [0, 1)"]),
        (["recipe.optimizer.warmup_steps=-5"], ["command line", "recipe.optimizer.warmup_steps is -5", "at least 0"]),
        (["recipe.optimizer.weight_decay=-1"], ["command line", "recipe.optimizer.weight_decay is -1", "at least 0"]),
        (["recipe.optimizer.grad_clip=0"], ["command line", "recipe.optimizer.grad_clip is 0", "above 0", "null"]),
        (["recipe.process.num_timesteps=20"], ["command line", "recipe.process.num_timesteps is 20", "above 20"]),
        (["model.heads=0"], ["command line", "model.heads is 0", "above 0"]),
        (["recipe.optimizer.lr=.inf"], ["command line", "recipe.optimizer.lr is inf", "finite"]),
        (["seed"], ["'seed'", "key=value"]),
        (["seed=abc"], ["command line", "seed is 'abc'", "whole number"]),
        (["seed=-1"], ["command line", "seed is -1", "from 0 to 2^32 - 1"]),
        (["eval.seed=4294967296"], ["command line", "eval.seed is 4294967296", "from 0 to 2^32 - 1"]),
        (["seed=1", "seed=2"], ["seed", "2 times"]),
        (
            ["eval.num_samples=2", "eval.metrics=[fid]"],
            ["command line", "eval.num_samples is 2", "fid needs at least 3"],
        ),
        (["eval.num_samples=4", "eval.metrics=[recall]"], ["eval.num_samples is 4", "recall needs at least 5"]),
        (["trainer.score_every=1", "trainer.score_samples=1"], ["trainer.score_samples is 1", "at least"]),
        (["eval.metrics=[]"], ["command line", "eval.metrics is []", "at least one"]),
        (["eval.metrics=[fid,fid]"], ["command line", "eval.metrics", "each once"]),
        (["eval.metrics=[fdi]"], ["command line", "eval.metrics has 'fdi'", "Did you mean fid"]),
        (["eval.extractor=foo"], ["command line", "eval.extractor 'foo'", "effnet-lite0"]),
        (["model.depth=???"], ["command line", "model.depth is ???", "Give one"]),
        (["model.depth=[1"], ["command line", "model.depth is [1", "brackets"]),
        (["recipe=null"], ["command line", "recipe is null", "group of settings", "recipe."]),
        (["budget=null"], ["command line", "budget is null", "budget.train_gflops=2000"]),
        (["model=3"], ["command line", "model is 3", "model.size=T/2"]),
        (["recipe=shared"], ["command line", "recipe is 'shared'", "use.recipe=shared"]),
        (["eval.sampler=ddim"], ["eval.sampler is 'ddim'", "eval.sampler.name=ddpm"]),
        (["eval.sampler.stps=3"], ["eval.sampler.stps", "Did you mean steps?"]),
        (["use=foo"], ["use is 'foo'", "use.model="]),
        (["recipe.optimizer.betas=[0.9]"], ["recipe.optimizer.betas is [0.9]", "2 numbers", "=[0.9,0.99]"]),
        (["recipe.optimizer.betas=0.9"], ["recipe.optimizer.betas is 0.9", "2 numbers"]),
        (["recipe.optimizer.betas=[a,b]"], ["recipe.optimizer.betas is ['a', 'b']", "2 numbers"]),
        (["eval.metrics=fid"], ["eval.metrics is 'fid'", "eval.metrics=[fid]"]),
        (["eval.metrics=[[1]]"], ["eval.metrics is [[1]]", "list of values"]),
        (["data.classes=0"], ["data.classes is 0", "data.classes=[0]."]),
        (["model.size="], ["model.size is null", "model.size=T/2"]),
        (["model.depth.x=3"], ["model.depth is {'x': 3}", "give one value"]),
        (["model.depth=${foo}"], ["command line: model.depth refers to", "foo", "the value itself"]),
        (["model.depth=${foo"], ["command line", "model.depth is ${foo", "cannot be read"]),
        (["model..depth=3"], ["'model..depth' is not a setting", "single dots"]),
        (["sead=1"], ["sead", "Did you mean seed?"]),
    ],
)
def test_a_mistake_is_one_sentence_with_source_key_and_nearest_match(overrides, words):
    with pytest.raises(UserError) as error:
        load_run("digits", overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "override, words",
    [
        ("models=null", ["command line: models is null", "by its label"]),
        ("models=[1]", ["models is [1]", "by its label"]),
        ("models.dit=3", ["command line: models.dit is 3", "models.dit.size=S/2"]),
    ],
)
def test_rows_that_are_no_settings_are_refused(override, words):
    with pytest.raises(UserError) as error:
        load_comparison("digits", [override])
    for word in words:
        assert word in str(error.value)


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("use: {recipe: digits}\nmodel: {size: T/2, widht: 4}\nbudget: {steps: 1}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: model\.widht .*Did you mean width"):
        load_run(str(path))
    path.write_text("model:\n  size: ???\n")
    with pytest.raises(UserError, match=r"mine\.yaml: model\.size is \?\?\?"):
        load_run(str(path))
    path.write_text("")
    with pytest.raises(UserError, match=r"^mine\.yaml: budget is not set"):
        load_run(str(path), ["seed=3"])
    path.write_text("budget: {steps: 1, steps: 2}\n")
    with pytest.raises(UserError, match=r"mine\.yaml.*duplicate key"):
        load_run(str(path))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["trainer.devices=3"], ["recipe.batch_size is 64", "3 x 1 x 1 = 3", "multiple of 3", "product is 2"]),
        (["trainer.num_nodes=2", "trainer.accumulate=3"], ["1 x 2 x 3 = 6", "product is 4"]),
        (["trainer.devices=128"], ["128 x 1 x 1", "product is 64"]),
    ],
)
def test_a_batch_that_processes_cannot_share_is_told_before_they_start(overrides, words):
    with pytest.raises(UserError) as error:
        load_comparison("digits", overrides)
    for word in words:
        assert word in str(error.value)
    config = load_run("digits", overrides)  # may be scored so
    with pytest.raises(UserError, match=r"recipe\.batch_size is 64"):
        require_even_batches(config)


def test_files_that_are_not_there_are_told_as_they_were_given(tmp_path):
    for name, words in (("/no/such.yaml", "There is no file /no/such.yaml."), ("digits.yaml", "Did you mean digits?")):
        with pytest.raises(UserError, match=re.escape(words)):
            load_run(name)
    (tmp_path / "config.yaml").write_text("budget: {steps: 1}\n")
    with pytest.raises(UserError, match=re.escape(f"Give its file: {tmp_path / 'config.yaml'}")):
        load_run(str(tmp_path))


def test_extractors_that_settings_name_are_those_that_can_be_built():
    assert tuple(features._BUILDERS) == EXTRACTORS


@pytest.mark.parametrize("name", METRICS)
def test_metrics_refuse_fewer_samples_than_settings_must_give(name):
    moments = Moments(torch.zeros(1).double(), torch.eye(1).double())  # fid_inf needs more in more dimensions
    rows, labels = torch.eye(8, 2), torch.arange(8) % 2
    reference = Reference("r", 8, "random", "0", "none", 4, "0", moments, moments, rows, labels)
    needed = SAMPLES_NEEDED[name]
    METRICS[name].build(reference, needed)
    with pytest.raises(UserError, match="at least"):
        METRICS[name].build(reference, needed - 1)


@pytest.mark.parametrize("path", sorted(registry.CONFIGS.glob("run/*.yaml")), ids=lambda path: path.stem)
def test_every_run_file_loads(path):
    load_run(path.stem)


@pytest.mark.parametrize("path", sorted(registry.CONFIGS.glob("compare/*.yaml")), ids=lambda path: path.stem)
def test_every_comparison_file_loads(path):
    load_comparison(path.stem)


@pytest.mark.parametrize("group", ["recipe", "eval"])
def test_every_recipe_and_protocol_loads(group):
    for path in registry.CONFIGS.glob(f"{group}/*.yaml"):
        load_run("digits", [f"use.{group}={path.stem}"])
