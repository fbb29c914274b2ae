"""What happens around the training step: what is logged, and that nothing but the recipe changes the numbers."""

from __future__ import annotations

import json
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import assert_same, assert_same_training, checkpoint, directory, log, merged, words

from bench import cli
from bench.config import load_run
from bench.errors import Paused, UserError
from bench.gpus import peak_gflops
from bench.prepare import prepare_data
from bench.training.buckets import LossByTime, means
from bench.training.callbacks import moving_average
from bench.training.compiling import compile_backbone
from bench.training.dry_run import estimate_seconds
from bench.training.plan import build_module, plan_training
from bench.training.run_record import read_state
from bench.training.train import train
from datamodules.base import LatentDataModule
from models.base import DiffusionModule, MicroBatch
from models.noise import TRAIN, philox
from models.process import build_process
from models.recipe import ProcessConfig

QUICK = ["eval.extractor=effnet-lite0", "eval.metrics=[inception_score]"]
KEYS = ("state_dict", "current_model_state")  # EMA and raw weights


def run(root: Path, *more: str, stop_at: float | None = None):
    _, name, *overrides = merged(words(root, *more))
    config = load_run(name, overrides)
    train(config, stop_at=stop_at)
    return config


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Six steps of a small DiT by one process -> (root, configuration)."""
    root = tmp_path_factory.mktemp("runs") / "plain"
    return root, run(root, "budget.steps=6")


def test_a_line_is_what_the_first_batch_gives_by_hand(plain):
    """Loss, gradient norm and losses by quarter of t, from the positions 0..7 and the initial weights."""
    root, config = plain
    module = build_module(config, plan_training(config).spec)
    batch = next(iter(LatentDataModule(prepare_data(config).latents, batch_size=8).loader()))
    losses = module.process.losses(*module.training_inputs(batch))["loss"]
    losses.mean().backward()
    norm = sum(p.grad.double().square().sum() for p in module.parameters() if p.grad is not None).sqrt()
    first = log(root)[0]
    assert first["train/loss"] == losses.mean().item()
    assert first["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    quarter = np.array([int(4 * philox(config.seed, position, TRAIN).random(2)[0]) for position in range(8)])
    for k in range(4):
        if (quarter == k).any():
            assert first[f"train/loss_t{k}"] == pytest.approx(losses[torch.from_numpy(quarter == k)].mean().item())
        else:
            assert f"train/loss_t{k}" not in first
    assert "train/mfu" not in first  # the peak of a CPU is not known


def test_a_line_counts_three_forwards_an_image(plain):
    root, config = plain
    gflops = plan_training(config).cost.gflops
    for line in (directory(root) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["train/gflops_per_s"] == pytest.approx(3 * gflops * row["train/images_per_s"])
        assert row["train_gflops"] == pytest.approx(3 * gflops * row["images_seen"])


@pytest.mark.parametrize(
    "name, t",
    [
        ("iddpm", [0, 249, 250, 499, 500, 749, 750, 999]),
        ("sd_discrete", [1, 250, 251, 500, 501, 750, 751, 1000]),
        ("vp", [0.0, 0.2499, 0.25, 0.4999, 0.5, 0.7499, 0.75, 1.0]),
    ],
)
def test_losses_are_told_by_quarter_of_the_timesteps(name, t):
    by_time = LossByTime(build_process(ProcessConfig(name=name)), torch.device("cpu"))
    by_time.add(MicroBatch(torch.arange(8), torch.tensor(t), {"loss": torch.arange(8.0)}))
    assert means(by_time.sums) == {f"train/loss_t{k}": 2 * k + 0.5 for k in range(4)}


def test_losses_by_timestep_are_over_all_steps_since_the_line_before(plain, tmp_path):
    root, _ = plain
    run(tmp_path / "rare", "budget.steps=6", "trainer.log_every=3")
    each, rare = log(root), log(tmp_path / "rare")
    assert [row["train/step"] for row in rare] == [3, 6]
    t = [int(4 * philox(0, position, TRAIN).random(2)[0]) for position in range(48)]
    for row, steps in zip(rare, (range(3), range(3, 6)), strict=True):
        for k in range(4):
            counts = [sum(q == k for q in t[8 * step : 8 * step + 8]) for step in steps]
            total = sum(n * each[step].get(f"train/loss_t{k}", 0.0) for n, step in zip(counts, steps, strict=True))
            assert row.get(f"train/loss_t{k}", 0.0) == pytest.approx(total / max(sum(counts), 1), rel=1e-9)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_are_one_batch(plain, tmp_path, accumulate):
    root, _ = plain
    run(tmp_path / "parts", "budget.steps=6", f"trainer.accumulate={accumulate}")
    assert len(log(tmp_path / "parts")) == 6  # a line an optimizer step
    for a, b in zip(log(root), log(tmp_path / "parts"), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, abs=1e-6), key
    one, parts = checkpoint(root, 6), checkpoint(tmp_path / "parts", 6)
    for key in KEYS:
        for name, value in one[key].items():
            torch.testing.assert_close(parts[key][name], value, rtol=0, atol=2e-6)


def test_grids_and_quick_scores_change_nothing_of_the_training(plain, tmp_path):
    root, _ = plain
    watch = ["trainer.grid_every=2", "trainer.score_every=4", "trainer.score_samples=24", *QUICK]
    config = run(tmp_path / "watched", "budget.steps=6", *watch)
    for key in (*KEYS, "optimizer_states"):
        assert_same(checkpoint(tmp_path / "watched", 6)[key], checkpoint(root, 6)[key], key)
    rows = log(tmp_path / "watched")
    assert [row for row in rows if "train/loss" in row] == log(root)
    (quick,) = (row for row in rows if "train/loss" not in row)
    assert quick["train/step"] == 4 and set(quick) > {"train/step", "images_seen", "train_gflops"}
    assert set(quick) - set(log(root)[0]) == {"quick/inception_score[effnet-lite0]"}
    assert 1 <= quick["quick/inception_score[effnet-lite0]"] <= 24
    grids = sorted(config.directory.glob("grids/*.png"))
    assert [grid.name for grid in grids] == [f"step-{step:08d}.png" for step in (2, 4, 6)]
    assert Image.open(grids[0]).size == (4 * 18 - 2, 4 * 18 - 2)  # four classes, four images of 16 pixels each
    assert not (config.directory / "quick").exists() and not (Path(config.paths.runs) / "results.jsonl").exists()


def test_what_cannot_be_watched_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="fewer than the 2 processes"):
        run(tmp_path / "a", "budget.steps=2", "trainer.score_every=1", "trainer.score_samples=4", "trainer.devices=2")
    with pytest.raises(UserError, match="no null label"):
        run(tmp_path / "b", "budget.steps=2", "trainer.grid_every=1", "recipe.label_dropout=0", "eval.cfg_scale=2")


def test_activation_checkpointing_changes_no_bit(plain, tmp_path):
    root, config = plain
    again = run(tmp_path / "twice", "budget.steps=6", "trainer.activation_checkpointing=true")
    assert again.run_id == config.run_id
    assert_same_training(root, tmp_path / "twice", 6)


def test_bf16_trains_with_float32_weights_and_average(plain, tmp_path):
    root, config = plain
    half = run(tmp_path / "half", "budget.steps=1", "trainer.precision=bf16-mixed")
    assert half.run_id != config.run_id
    for key in KEYS:
        state = checkpoint(tmp_path / "half", 1)[key]
        assert {value.dtype for value in state.values()} == {torch.float32}
    assert log(tmp_path / "half")[0]["train/loss"] == pytest.approx(log(root)[0]["train/loss"], rel=1e-2)


def test_a_time_limit_stops_with_a_checkpoint_and_the_run_goes_on_bit_for_bit(plain, tmp_path):
    """A time that is up at once lets every call take one step."""
    root, _ = plain
    for step in range(1, 6):
        with pytest.raises(Paused, match=rf"after step {step} of 6"):
            run(tmp_path / "late", "budget.steps=6", stop_at=time.monotonic())
    run(tmp_path / "late", "budget.steps=6", stop_at=time.monotonic())  # the last step ends the training
    assert_same_training(root, tmp_path / "late", 6)
    assert not (directory(tmp_path / "late") / "checkpoints" / "last.ckpt").exists()


def test_the_command_says_that_the_time_is_up_and_ends_well(tmp_path, monkeypatch, capsys):
    command = merged(words(tmp_path / "late", "budget.steps=6"))
    monkeypatch.setattr(sys, "argv", ["bench", *command, "--max-time", "00:00:00"])
    cli.main()  # exit code 0
    assert "the time is up after step 1 of 6. The same command goes on from there." in capsys.readouterr().out
    assert read_state(directory(tmp_path / "late"))["state"] == "preempted"


def test_a_compiled_backbone_gives_the_same_and_keeps_its_names(tmp_path):
    """A small one: a real size takes a minute to compile."""
    config = load_run("digits", words(tmp_path, "budget.steps=1")[2:])
    module = build_module(config, plan_training(config).spec)
    names, part = list(module.state_dict()), module.backbone.t_embedder
    module.backbone = part
    t = torch.tensor([3.0, 500.0])
    expected = part(t).detach()
    compile_backbone(module, "cpu")
    torch.testing.assert_close(module.backbone(t), expected, rtol=1e-5, atol=1e-6)
    assert {name.replace("backbone.t_embedder", "backbone") for name in names} >= set(module.state_dict())


def test_without_a_compiler_compilation_is_refused_in_a_sentence(tmp_path):
    config = load_run("digits", words(tmp_path, "budget.steps=1", "trainer.compile=true")[2:])
    torch._dynamo.reset()
    without = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/g++"), "force_disable_caches": True})
    with without, pytest.raises(UserError, match=r"nothing can be compiled here \(.*C\+\+ compiler"):
        train(config)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "device, precision, tflops",
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4),
        ("NVIDIA H100 PCIe", "bf16-mixed", 756.0),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5),
        ("NVIDIA L4", "bf16-mixed", 121.0),
        ("NVIDIA L40S", "bf16-mixed", 362.0),
    ],
)
def test_peaks_are_halves_of_the_printed_tflops_for_a_multiply_add_is_two(device, precision, tflops):
    assert peak_gflops(device, precision) == pytest.approx(1000 * tflops / 2)


def test_an_unknown_gpu_has_no_peak():
    assert peak_gflops("NVIDIA GeForce GT 710", "32-true") is None


def test_the_moving_average_without_warm_up_is_the_plain_one():
    average, weight = [torch.ones(3)], [torch.zeros(3)]
    moving_average(0.9, warmup=False)(average, weight, 5)
    assert average[0].tolist() == pytest.approx([0.9] * 3)


def test_training_is_estimated_from_15_gflops_of_it(tmp_path, monkeypatch):
    """Images enough for 15 Gflops, three forwards each, but no more than a batch; here they always take a second."""
    clock, timed, inputs = count(), [], DiffusionModule.training_inputs

    def watched(self, batch):
        timed.append(len(batch.positions))
        return inputs(self, batch)

    monkeypatch.setattr(DiffusionModule, "training_inputs", watched)
    monkeypatch.setattr("bench.training.dry_run.time.perf_counter", lambda: float(next(clock)))
    wide = ["model.size=S/2", "trainer.devices=2", "trainer.num_nodes=3", "budget.images=600000"]
    for batch_size in (8, 10_000):
        config = load_run("digits", merged(words(tmp_path, *wide, f"recipe.batch_size={batch_size}"))[2:])
        run = plan_training(config)
        assert estimate_seconds(config, run) == pytest.approx(run.budget.images / timed[-1] / (2 * 3))
    assert timed[0] == 8
    assert 3 * run.cost.gflops * timed[-1] == pytest.approx(15, rel=0.02)  # whole images
