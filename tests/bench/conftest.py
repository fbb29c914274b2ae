"""Made-up results for the tests of store, tables, figures and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bench.store import Result, ResultStore

PROTOCOL = {
    "name": "digits500",
    "version": 1,
    "num_samples": 500,
    "labels": "balanced",
    "seed": 0,
    "cfg_scale": 1.0,
    "cfg_channels": "all",
    "sampler": "ddim",
    "sampler_steps": 25,
    "decoder": "kl-f4",
    "decoder_sha256": "aa11",
    "quantisation": "DiT's rule",
    "precision": "float32",
    "extractor": "effnet-lite0",
    "extractor_sha256": "bb22",
    "resize": "bilinear to 224",
    "reference": "digits",
    "reference_n": 5000,
    "reference_images": "as they are",
    "reference_sha256": "cc33",
}

DIT = Result(
    run_id="dit-t-2-digits-0000aaaa",
    comparison="digits",
    model="dit",
    title="DiT",
    size="T/2",
    data="digits",
    recipe="digits",
    changed={},
    weights="ema",
    seed=0,
    steps=100,
    images_seen=9600,
    batch_size=96,
    params_m=1.25,
    gflops=0.02,
    gflops_parts={"linear": 0.015, "attention": 0.004, "convolution": 0.001, "ssm_kernel": 0.0, "fft": 0.0},
    train_gflops=576.0,
    train_gflops_papers=192.0,
    sample_gflops=0.5,
    train_seconds=61.5,
    protocol=PROTOCOL,
    scores={"fd500[effnet-lite0]": 61.234, "precision[effnet-lite0]": 0.7012},
    ci95={"fd500[effnet-lite0]": 1.106, "precision[effnet-lite0]": 0.0213},
    checkpoint="dit-t-2-digits-0000aaaa/checkpoints/step-00000100.ckpt",
    samples="dit-t-2-digits-0000aaaa/samples/step-00000100-12345678/samples.npz",
    world_size=1,
    device="cpu (2 threads)",
    versions={"python": "3.11.7", "torch": "2.14.1"},
    git_commit="0123abc",
    created="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def make_result() -> Callable[..., Result]:
    """A result like `DIT` but for the fields given; `fd` and `precision` are (value, ci95), `protocol` is merged."""

    def make(fd: tuple[float, float] = (61.234, 1.106), precision: tuple[float, float] = (0.7012, 0.0213), **changes):
        names = ("fd500[effnet-lite0]", "precision[effnet-lite0]")
        return replace(
            DIT,
            scores=dict(zip(names, (fd[0], precision[0]), strict=True)),
            ci95=dict(zip(names, (fd[1], precision[1]), strict=True)),
            **changes | {"protocol": PROTOCOL | changes.get("protocol", {})},
        )

    return make


@pytest.fixture
def comparison(make_result) -> list[Result]:
    """DiT and DiffuSSM at equal compute: untrained, half, whole. Only DiffuSSM has SSM Gflops."""
    ssm = {
        "run_id": "diffussm-t-digits-0000bbbb",
        "model": "diffussm",
        "title": "DiffuSSM",
        "size": "T",
        "params_m": 1.5,
        "gflops": 0.025,
        "gflops_parts": {"linear": 0.015, "attention": 0.0, "convolution": 0.001, "ssm_kernel": 0.003, "fft": 0.006},
        "sample_gflops": 0.625,
        "train_seconds": 93.0,
    }
    nothing = {"steps": 0, "images_seen": 0, "train_gflops": 0.0, "train_gflops_papers": 0.0}
    untrained = {"weights": "untrained", "checkpoint": "", **nothing}
    half = {"steps": 50, "images_seen": 4800, "train_gflops": 288.0, "train_gflops_papers": 96.0, "checkpoint": "half"}
    return [
        make_result(**untrained, fd=(310.5, 2.0)),
        make_result(**half, fd=(120.0, 1.5)),
        make_result(),
        make_result(**ssm | untrained, fd=(311.25, 2.0)),
        make_result(**ssm | half, fd=(110.0, 1.5)),
        make_result(
            **ssm,
            steps=80,
            images_seen=7680,
            train_gflops_papers=192.0,
            fd=(58.0, 1.25),
            precision=(0.7302, 0.02),
        ),
    ]


CONFIG = """\
eval: {num_samples: 500, batch_size: 100, seed: 0, labels: balanced, cfg_scale: 1.0, cfg_channels: null, sampler: null,
  extractor: effnet-lite0, precision: float32}
seed: 0
recipe:
  batch_size: 96
  cfg_channels: all
  optimizer: {lr: LR, betas: [0.9, 0.99]}
  sampler: {name: ddim, steps: 25}
budget: {train_gflops: 576}
"""


@pytest.fixture
def runs(tmp_path, comparison) -> Path:
    """A directory of finished runs: the rows of `comparison` in results.jsonl, each run's configuration and log, a
    grid of one grey for each checkpoint. Of DiffuSSM's last checkpoint the grid is gone."""
    root = tmp_path / "runs"
    grey = 0
    for row in comparison:
        row = replace(row, samples=f"{row.run_id}/samples/step-{row.steps:08d}-1234abcd/samples.npz")
        ResultStore(root / "results.jsonl").append(row)
        grid = root / Path(row.samples).with_name("grid.png")
        grid.parent.mkdir(parents=True)
        if row.steps != 80:
            Image.new("RGB", (40, 32), (grey := grey + 40,) * 3).save(grid)
        if row.weights == "untrained":
            directory = root / row.run_id
            (directory / "config.yaml").write_text(CONFIG.replace("LR", "0.001" if row.model == "dit" else "0.002"))
            (directory / "run.json").write_text(json.dumps({"latents": "dd44"}))
            with (directory / "metrics.jsonl").open("w") as log:
                for step in range(10, 101, 10):
                    spent = {"images_seen": 96 * step, "train_gflops": 3 * row.gflops * 96 * step}
                    losses = {"train/loss": 1 / step, "train/mse": 0.5 / step, "train/lr": 0.001}
                    log.write(json.dumps({"train/step": step, **spent, **losses}) + "\n")
    return root
