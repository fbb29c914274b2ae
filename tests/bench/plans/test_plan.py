"""Plans: commands that resolve to the run they stand for, closed forms of hours, memory and disk, what is here."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from bench import registry
from bench.config import EvalConfig, PathsConfig, RunConfig, TrainerConfig, load_run
from bench.errors import UserError
from bench.plans import plan
from bench.plans.command import known_settings, launch_plan, print_plan
from bench.plans.plan import Machine, RunPlan, plan_table
from bench.plans.runs import find_run, train_command
from bench.scoring.features import blank_inception
from bench.sweeps.sweep import read_sweep
from bench.tables.published import load_published
from bench.tables.specs import load_table, paper_tables
from datamodules.base import DataConfig
from datamodules.imagenet_raw import IMAGENET_COUNT
from datamodules.lmdb_images import BEDROOM_COUNT
from models.autoencoder import SD_CONFIG

A100S = Machine("a100", 8, 0.4)
EXTRA = ["data.autoencoder_path=/models/vae", "eval.reference=ref.npz", "seed=3"]


def plans_of(name: str, machine: Machine = A100S) -> dict[str, RunPlan]:
    return {entry.run.name: entry for entry in plan_table(load_table(name), machine)}


def printed(capsys, *arguments: object, overrides: list[str] | None = None) -> str:
    name, gpus, gpu, share = (*arguments, *("dit-table4", 8, "a100", 0.4)[len(arguments) :])
    print_plan(name, gpus, gpu, share, overrides or [])
    return capsys.readouterr().out


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", paper_tables())
def test_every_printed_command_resolves_to_its_run(name, capsys):
    runs = [entry.run for entry in plans_of(name).values()]
    own = {"data.autoencoder_path": {run.decoder for run in runs}, "eval.reference": {run.data for run in runs}}
    extra = [word for word in EXTRA if len(own.get(word.partition("=")[0], ())) < 2]  # files that serve all runs
    text = printed(capsys, name, 16, "h100", 0.5, overrides=extra)
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("  python -m bench train ")]
    entries = plans_of(name)
    assert len(commands) == len(entries)
    for words, entry in zip(commands, entries.values(), strict=True):
        config, run = load_run(words[4], words[5:]), entry.run
        assert (config.use.model, config.model.size, config.use.data) == (run.model, run.size, run.data)
        assert (config.use.recipe, config.use.eval, config.seed) == (run.recipe, "fid50k", 3)
        recipe = config.recipe
        assert (recipe.batch_size, recipe.sampler.name, recipe.sampler.steps) == (
            run.batch_size,
            run.sampler,
            run.sampler_steps,
        )
        assert (recipe.cfg_channels, config.data.autoencoder) == (run.cfg_channels, run.decoder)
        assert config.budget.given == dict(run.budget)
        assert (config.trainer.devices, config.trainer.num_nodes, config.trainer.precision) == (8, 2, "bf16-mixed")
        assert recipe.batch_size % (16 * config.trainer.accumulate) == 0
        for given, word in (
            (config.data.autoencoder_path, "data.autoencoder_path=/models/vae"),
            (config.eval.reference, "eval.reference=ref.npz"),
        ):
            assert given == (word.partition("=")[2] if word in extra else None)
    scored = [shlex.split(line) for line in text.splitlines() if line.startswith("  python -m bench evaluate ")]
    assert len(scored) == sum(place.run is not None for place in load_table(name).rows)
    for words in scored:  # what it scores is known once it is trained
        assert re.fullmatch(r"runs/(dit|uvit|diffussm)-[a-z0-9_-]+-\*", words[4])
        load_run("imagenet256", words[5:])


def test_a_sweep_of_the_plan_trains_the_runs_that_the_commands_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    launch_plan("dit-imagenet512", "print", 8, "a100-40gb", [])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    (entry,) = plans_of("dit-imagenet512").values()
    config = load_run("imagenet256", train_command(entry, {})[2:])
    assert lines[0] == ["python", "-m", "bench", "train", f"runs/{config.run_id}/config.yaml"]
    assert [words[4:] for words in lines[1:]] == [
        [f"runs/{config.run_id}", *scale] for scale in ([], ["eval.cfg_scale=1.25"], ["eval.cfg_scale=1.5"])
    ]
    (directory,) = Path("runs").glob("sweep-plan-dit-imagenet512-*")
    sweep = read_sweep(directory)
    assert {run.config["trainer"]["accumulate"] for run in sweep.runs} == {4}  # 8 images take 32 GB, 16 take 45
    assert {run.images for run in sweep.runs} == {entry.images} == {768_000_000}
    assert sweep.runs[0].train_gflops == pytest.approx(entry.train_gflops, rel=1e-5)
    # Now that its directory is there and its log says what it costs, the plan finds it.
    (directory := Path("runs") / config.run_id).joinpath("metrics.jsonl").write_text(
        json.dumps({"images_seen": 256, "train_gflops": 3 * 256 * sweep.runs[0].gflops}) + "\n"
    )
    assert find_run(entry.run, Path("runs"), {}) == (directory, "no checkpoint")
    assert find_run(entry.run, Path("runs"), {"seed": "1"}) is None
    print_plan("dit-imagenet512", 8, "a100", 0.4, [])
    assert f"python -m bench evaluate {directory} eval.cfg_scale=1.5" in capsys.readouterr().out
    other = load_table("dit-table4").runs["xl-2-512-3000k"]  # decoded otherwise
    assert find_run(other, Path("runs"), {}) is None


def test_a_mistake_in_a_launch_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"eval\.refrence is not a setting"):
        launch_plan("dit-imagenet512", "print", 8, "a100", ["eval.refrence=ref.npz"])
    assert not list(tmp_path.iterdir())


def test_a_sweep_over_sizes_has_the_recipe_of_each_size(tmp_path, monkeypatch, capsys):
    """U-ViT's H models have another process than its L models."""
    monkeypatch.chdir(tmp_path)
    launch_plan("uvit-imagenet", "print", 8, "a100", [])
    capsys.readouterr()
    (directory,) = Path("runs").glob("sweep-plan-uvit-imagenet-*")
    found = {run.run_id for run in read_sweep(directory).runs}
    wanted = {
        load_run("imagenet256", train_command(entry, {})[2:]).run_id for entry in plans_of("uvit-imagenet").values()
    }
    assert found == wanted


@pytest.fixture
def begun(tmp_path):
    """Writes a run directory of the run 's-8' of dit-table4; `gflops` is what its log says of a forward."""
    run = load_table("dit-table4").runs["s-8"]

    def write(name: str, gflops: float, **record: object) -> Path:
        directory = tmp_path / f"dit-s-8-imagenet256-{name}"
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        config = load_run("imagenet256", run.overrides)
        (directory / "config.yaml").write_text(config.to_yaml())
        (directory / "metrics.jsonl").write_text(
            json.dumps({"images_seen": 1000, "train_gflops": 3000 * gflops}) + "\n"
        )
        if record:
            (directory / "run.json").write_text(json.dumps(record))
            (directory / "checkpoints" / "step-00400000.ckpt").write_bytes(b"")
        return directory

    return write


def test_what_is_here_is_told_by_looking(begun, tmp_path):
    run = load_table("dit-table4").runs["s-8"]
    begun("aaaa", 0.5)  # a size with other settings costs otherwise
    assert find_run(run, tmp_path, {}) is None
    trained = begun("bbbb", 0.358, state="finished", changed={})
    assert find_run(run, tmp_path, {}) == (trained, "trained")
    begun("bbbb", 0.358, state="finished", changed={"recipe.optimizer.lr": 0.0003})
    assert find_run(run, tmp_path, {}) is None


def test_imported_weights_are_found_as_such(begun, tmp_path):
    directory = begun(
        "cccc", 0.358, state="finished", changed={}, imported={"weights": "official weights, by the name of the file"}
    )
    assert find_run(load_table("dit-table4").runs["s-8"], tmp_path, {}) == (directory, "official weights")


def test_released_weights_are_the_cheap_way(capsys):
    text = printed(capsys, "diffussm-table1")
    for words in (
        "import DiT-XL-2-256x256.pt --model dit --size XL/2 ",
        "import DiT-XL-2-512x512.pt --model dit --size XL/2 --resolution 512",
        "import imagenet512_uvit_huge.pth --model uvit --size H/4 --resolution 512",
    ):
        assert f"or, without training: python -m bench {words}" in text
    assert "import" not in printed(capsys, "dit-table4")  # 400K steps, or another decoder


def test_the_cache_is_looked_for(capsys, tmp_path):
    assert "not in cache/imagenet256" in printed(capsys)
    manifest = tmp_path / "imagenet256" / "latents-1a2b3c4d" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    assert str(manifest.parent) in printed(capsys, overrides=[f"paths.cache={tmp_path}"])


# --- figures ----------------------------------------------------------------------------------------------------------


def test_training_gflops_are_the_papers_total_and_three_times_it():
    entries = plans_of("diffussm-table1")
    for name, where, model, resolution in (
        ("dit-xl-2-256", "DiffuSSM Table 1", "DiT-XL/2", 256),
        ("dit-xl-2-512", "DiffuSSM Table 1", "DiT-XL/2-G", 512),
        ("uvit-h-2-256", "DiffuSSM Table 1", "U-ViT-H/2-G", 256),
    ):
        (row,) = (r for r in load_published() if (r.where, r.model, r.resolution) == (where, model, resolution))
        assert entries[name].train_gflops_papers == pytest.approx(float(row.values["train_gflops_papers"]), rel=3e-3)
        assert entries[name].train_gflops == pytest.approx(3 * entries[name].train_gflops_papers)
    diffussm = entries["diffussm-xl-256"]
    assert diffussm.images == 660_000_000 // 256 * 256
    assert diffussm.train_gflops_papers * diffussm.cost.gflops_weights / diffussm.cost.gflops == pytest.approx(
        1.85e11, rel=0.016
    )


def test_hours_are_operations_over_peak_and_mfu():
    entry = plans_of("dit-imagenet256")["dit-xl-2"]
    seconds = 2 * 3 * 118.6214e9 * 1_792_000_000 / (8 * 312e12 * 0.4)
    assert entry.train_hours == pytest.approx(seconds / 3600, rel=1e-5)
    # Three rows, two of them guided: 5 forwards a step; three decodings and Inception passes.
    seconds = 2 * 50_000 * (250 * 5 * 118.6214e9 + 3 * (311.1e9 + 5.71e9)) / (8 * 312e12 * 0.4)
    assert entry.score_hours == pytest.approx(seconds / 3600, rel=1e-5)
    (cache,) = plan.caches([entry])  # of every image and its mirror
    seconds = 2 * 2 * 1_281_167 * 136.4e9 / (8 * 312e12 * 0.4)
    assert cache.hours == pytest.approx(seconds / 3600, rel=1e-5)
    twice = plans_of("dit-imagenet256", Machine("a100", 16, 0.2))["dit-xl-2"]
    assert twice.train_hours == pytest.approx(entry.train_hours)


def test_memory_is_parameters_and_activations():
    entry = plans_of("dit-imagenet256")["dit-xl-2"]
    fixed = 24 * 674.835e6 + 1345.8e6 + 2e9  # with DDP's buckets
    assert entry.memory_gb(32) == pytest.approx((fixed + 32 * 400.5e6) / 1e9, rel=1e-5)
    assert (entry.accumulate, entry.micro_batch) == (1, 32)
    alone = plans_of("dit-imagenet256", Machine("a100", 1, 0.4))["dit-xl-2"]
    assert alone.memory_gb(1) == pytest.approx((20 * 674.835e6 + 1345.8e6 + 2e9 + 400.5e6) / 1e9, rel=1e-5)
    assert alone.accumulate == 2  # 128 images fit 80 GB, 256 do not
    assert alone.memory_gb(128) <= 80 < alone.memory_gb(256)
    assert "trainer.accumulate=2" in train_command(alone, {})
    assert not any("accumulate" in word for word in train_command(alone, {"trainer.accumulate": "4"})[:-1])


def test_what_does_not_fit_is_said(capsys):
    assert "it does not fit; see trainer.activation_checkpointing" in printed(capsys, "ablation-parts", 2, "l4", 0.4)


def test_disk_is_bytes_a_parameter_and_a_pixel():
    entry = plans_of("dit-imagenet256")["dit-xl-2"]
    assert entry.checkpoint_gb == pytest.approx(16 * 0.674835)  # EMA, weights, two moments of AdamW in float32
    assert entry.samples_gb == pytest.approx(3 * 50_000 * 3 * 256**2 / 1e9)


def test_caches_are_as_large_as_the_data_configurations_say():
    sizes = {}
    for name in paper_tables():
        for cache in plan.caches(list(plans_of(name).values())):
            sizes[cache.data] = round(cache.gigabytes)
    for data, gigabytes in sizes.items():
        header = (registry.CONFIGS / "data" / f"{data}.yaml").read_text().partition("\nautoencoder")[0]
        assert f"{gigabytes} GB of moments" in header.replace("\n# ", " ")
    assert sorted(sizes.values()) == [42, 99, 168]
    counts = {"imagenet256": IMAGENET_COUNT, "imagenet512": IMAGENET_COUNT, "lsun_bedrooms256": BEDROOM_COUNT}
    assert counts == plan.IMAGES


def test_costs_of_autoencoder_and_inception_are_those_of_the_networks():
    with torch.device("meta"):
        autoencoder = AutoencoderKL(**SD_CONFIG)
        pictures, latents, x = torch.empty(1, 3, 256, 256), torch.empty(1, 4, 32, 32), torch.empty(1, 3, 299, 299)
    for given, run in (
        (plan.ENCODE_GFLOPS[256], lambda: autoencoder.encode(pictures)),
        (plan.DECODE_GFLOPS[256], lambda: autoencoder.decode(latents)),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() / 2e9 == pytest.approx(given, rel=1e-3)
    with FlopCounterMode(display=False) as counter:
        for name, layer in blank_inception().named_children():
            if name != "fc":
                x = layer(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(plan.INCEPTION_GFLOPS, rel=1e-3)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, overrides, words",
    [
        (("dit-table4", 7), [], ["--gpus is 7", "256", "evenly"]),
        (("dit-table4", 12), [], ["--gpus is 12", "whole nodes of 8"]),
        (("dit-table4", 8, "a10"), [], ["--gpu a10", "Did you mean a100?"]),
        (("dit-table4", 8, "a100", 40.0), [], ["--mfu is 40", "at most 1"]),
        (("dit-tabel4",), [], ["Did you mean dit-table4?"]),
        (("dit-table4",), ["budget.steps=3"], ["budget.steps is what the table is about"]),
        (("dit-table4",), ["model.size=S/2"], ["model.size is what the table is about"]),
        (("dit-table4",), ["recipe.batch_size=512"], ["recipe.batch_size is what the table is about"]),
        (("dit-table4",), ["eval.num_samples=1000"], ["eval.num_samples is what the table is about"]),
        (("dit-table4",), ["eval.reference=a.npz"], ["one file", "imagenet256, imagenet512", "each command"]),
        (("uvit-imagenet",), ["data.autoencoder_path=v/"], ["one file", "sd-vae, sd-vae-ft-ema"]),
        (("dit-table4",), ["sweep.slurm.partition=gpu"], ["sweep.slurm.partition", "--launch slurm"]),
        (("dit-table4",), ["seed=abc"], ["seed is 'abc'", "whole number"]),
        (("dit-table4",), ["dta.root=/x"], ["dta.root is not a setting", "Did you mean data.root?"]),
        (("dit-imagenet256",), ["eval.refrence=/y"], ["eval.refrence is not", "Did you mean eval.reference?"]),
    ],
)
def test_a_mistake_is_a_sentence_before_anything_is_printed(capsys, arguments, overrides, words):
    with pytest.raises(UserError) as error:
        printed(capsys, *arguments, overrides=overrides)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert capsys.readouterr().out == ""


def test_what_may_be_given_is_what_runs_have():
    groups = {"data": DataConfig, "eval": EvalConfig, "trainer": TrainerConfig, "paths": PathsConfig}
    ours = [f"{group}.{field.name}" for group, config in groups.items() for field in fields(config)]
    assert known_settings() == ["seed", "tracking", *ours]
    assert set(groups) | {"seed", "tracking", "use", "model", "recipe", "budget"} == {f.name for f in fields(RunConfig)}


def test_a_table_without_runs_cannot_be_planned(tmp_path):
    text = (registry.CONFIGS / "table" / "dit-imagenet256.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(re.sub(r"runs:.*?rows:", "rows:", text, flags=re.S).replace(", run: dit-xl-2", ""))
    with pytest.raises(UserError, match="names no runs of ours"):
        plan_table(load_table(str(path)), A100S)
