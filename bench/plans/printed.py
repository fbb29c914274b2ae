"""A plan as text: what each run takes, the commands, and what the figures rest on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bench.gpus import GPUS
from bench.plans.plan import (
    CHECKPOINT_PER_PARAM,
    DDP_PER_PARAM,
    OVERHEAD_GB,
    PER_PARAM,
    CachePlan,
    Machine,
    RunPlan,
)
from bench.plans.runs import device_settings, evaluate_commands, find_run, run_stem, train_command
from bench.tables.formats import number


def summary(plans: Sequence[RunPlan], runs: Path, given: dict[str, str]) -> list[str]:
    header = (
        "run",
        "images (M)",
        "Gflops",
        "training Gflops",
        "Gflops × images",
        "train h",
        "score h",
        "GB a GPU",
        "here",
    )
    rows: list[tuple[str, ...]] = [header]
    for plan in plans:
        found = find_run(plan.run, runs, given)
        cost = (plan.images / 1e6, plan.cost.gflops, plan.train_gflops, plan.train_gflops_papers)
        hours = (plan.train_hours, plan.score_hours)
        memory = plan.memory_gb(plan.micro_batch)
        rows.append(
            (
                plan.run.name,
                *map(number, cost),
                *(f"{h:,.1f}" for h in hours),
                f"{memory:.0f}",
                found[1] if found else "no",
            )
        )
    train, score = sum(plan.train_hours for plan in plans), sum(plan.score_hours for plan in plans)
    rows.append(("all", "", "", *_totals(plans), f"{train:,.1f}", f"{score:,.1f}", "", ""))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _totals(plans: Sequence[RunPlan]) -> tuple[str, str]:
    spent = (sum(plan.train_gflops for plan in plans), sum(plan.train_gflops_papers for plan in plans))
    return number(spent[0]), number(spent[1])


def cache_lines(latents: CachePlan, cache: Path, plans: Sequence[RunPlan], given: dict[str, str]) -> list[str]:
    found = sorted((cache / latents.data).glob("latents-*/manifest.json"))
    here = ", ".join(str(path.parent) for path in found) or f"not in {cache / latents.data}"
    settings = [f"{key}={value}" for key, value in given.items() if key.startswith(("data.", "paths.cache"))]
    own = next(plan.run.settings for plan in plans if plan.run.data == latents.data)
    named = [f"{key}={value}" for key, value in own.items() if key == "data.autoencoder"]
    words = ["prepare", latents.data, *named, *settings]
    return [
        f"{latents.data}: {latents.gigabytes:.0f} GB, {latents.hours:.1f} h of encoding; {here}",
        f"  {_command(words)}",
    ]


def run_lines(plan: RunPlan, runs: Path, given: dict[str, str]) -> list[str]:
    rows = ", ".join(f"{place.model} (cfg_scale {place.cfg_scale:g})" for place in plan.places)
    found = find_run(plan.run, runs, given)
    directory = str(found[0]) if found else f"{runs}/{run_stem(plan.run)}-*"
    lines = [
        f"{plan.run.name}: fills {rows}",
        f"  {plan.steps:,} steps x {plan.run.batch_size} images; {_memory_text(plan)}",
        f"  disk: {plan.checkpoint_gb:.1f} GB a checkpoint (two while it trains), {plan.samples_gb:.0f} GB of samples",
        f"  {_command(train_command(plan, given))}",
    ]
    lines += [f"  {_command(words)}" for words in evaluate_commands(plan, directory, given)]
    if released := plan.released:
        side = [] if plan.side == 256 else ["--resolution", str(plan.side)]
        words = ["import", released["file"], "--model", plan.run.model, "--size", plan.run.size, *side]
        devices = [word for word in device_settings(plan.machine.gpus, given) if "precision" not in word]  # float32
        words += [*devices, *(f"{key}={value}" for key, value in given.items())]
        lines.append(f"  or, without training: {_command(words)}   (official weights)")
    return lines


def _memory_text(plan: RunPlan) -> str:
    if plan.accumulate is None:
        return (
            f"one image at a time takes {plan.memory_gb(1):.0f} GB of {plan.machine.memory_gb}: it does not fit; see "
            "trainer.activation_checkpointing"
        )
    images = plan.micro_batch
    return f"{images} images a GPU at a time: {plan.memory_gb(images):.0f} of {plan.machine.memory_gb} GB"


def _command(words: Sequence[str]) -> str:
    """As a shell takes it; the * of a run's id stays open."""
    quoted = [word if word.endswith("-*") else shlex.quote(word) for word in words]
    return " ".join(["python -m bench", *quoted])


def assumptions(machine: Machine) -> list[str]:
    """What the figures rest on, one sentence each."""
    return [
        f"Hours: 2 operations a multiply-add over {machine.gpus} x {GPUS[machine.kind].bfloat16:g} Tflops (dense "
        f"bfloat16, NVIDIA's data sheet) x MFU {machine.mfu:g}, scoring, too. Training Gflops: 3 forwards an image; "
        "Gflops × images, the papers' total, is one. Scoring draws 50,000 samples a row, decodes them (311 Gflops at "
        "256 pixels, 1257 at 512) and takes Inception features (5.7).",
        f"Memory of a GPU: {PER_PARAM} bytes a parameter (float32 weights, gradients, AdamW's moments, EMA), "
        f"{DDP_PER_PARAM} more with DDP, {OVERHEAD_GB:g} GB for CUDA, and what autograd keeps under bf16-mixed, tensor "
        "by tensor (configs/counted.csv); buffers of single ops are left out.",
        f"Checkpoints: {CHECKPOINT_PER_PARAM} bytes a parameter. Samples: 3 bytes a pixel, twice that while they are "
        "packed. The * in runs/... stands for the run's id, which `train` prints; --launch print names it.",
    ]
