"""The main job: several architectures, one budget, one recipe, one protocol -> runs, scores, table, figure, report.

Every stage skips what is already there, so an interrupted comparison goes on where it was and a finished one does
nothing but print its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from bench import budget as budgets
from bench.config import WANDB_PROJECT, Comparison, RunConfig, sources
from bench.console import is_main_process, say
from bench.device import device_name
from bench.dotted import flatten
from bench.errors import UserError
from bench.evaluate import evaluate, score_line, scorer_of
from bench.files import atomic_write
from bench.prepare import prepare_data, require_processes
from bench.reports import report
from bench.reports.figures import grid_of, score_against_compute
from bench.reports.plotting import save
from bench.scoring.samples import Sampling
from bench.store import Result
from bench.tables import comparison as tables
from bench.tracking import Tracker
from bench.training.dry_run import budget_line, estimate_seconds
from bench.training.plan import TrainingPlan, plan_training
from bench.training.train import train


def compare(comparison: Comparison, command: str = "") -> Path:
    """Run a comparison to its end -> the path of report.html, which shows `command` as the way to repeat it.

    Raises: UserError, before anything is trained, if the rows differ by more than 2 % in training Gflops.
    """
    plans = equal_plans(comparison)
    runs, directory = comparison.runs, comparison.directory
    require_processes(runs[0].trainer)
    data = prepare_data(runs[0])
    scorer = scorer_of(runs[0])
    tracker = Tracker(runs[0].tracking, WANDB_PROJECT, directory)
    results: list[Result] = []
    for config, plan in zip(runs, plans, strict=True):
        train(config, data, tracker, group=comparison.name)
        steps = [0] if config.eval.untrained else []
        for step in [*steps, *plan.checkpoint_steps]:
            result = evaluate(config, step, comparison=comparison.name, data=data, scorer=scorer)
            results.append(result)
            say(f"  step {step:>6}: {score_line(result)}")
    path = directory / "report.html"
    if is_main_process():
        write_outputs(comparison, results, directory, tracker, command)
        say()
        say(tables.terminal(tables.build(results)))
        say(f"\nreport: {path}")
    return path


def equal_plans(comparison: Comparison) -> list[TrainingPlan]:
    """The plan of each row.

    Raises: UserError if the quantity they should share differs by more than 2 %, or they would be sampled differently.
    """
    plans = [plan_training(config) for config in comparison.runs]
    names = row_names(comparison.runs)
    rows = zip(comparison.runs, plans, strict=True)
    spent = {names[config.run_id]: getattr(plan.budget, comparison.equal) for config, plan in rows}
    budgets.require_equal(comparison.equal, spent)
    if len({Sampling.of(config) for config in comparison.runs}) > 1:
        raise UserError(
            "The rows' recipes sample differently, so their scores would not share a column. Set eval.sampler.name, "
            "eval.sampler.steps and eval.cfg_channels, which replace those of the recipes."
        )
    return plans


def row_names(runs: Sequence[RunConfig]) -> dict[str, str]:
    """run_id -> 'dit S/2', with the settings of the model that tell rows of one size apart: 'diffussm T M=4'."""
    sizes: dict[str, dict[str, dict[str, Any]]] = {}
    for config in runs:
        alike = sizes.setdefault(f"{config.use.model} {config.model.size}", {})
        alike[config.run_id] = flatten(asdict(config.model))
    names = {}
    for name, alike in sizes.items():
        for run_id, own in alike.items():
            told = [key for key in own if any(other[key] != own[key] for other in alike.values())]
            names[run_id] = " ".join([name, *(f"{key}={own[key]}" for key in told)])
    return names


def write_outputs(
    comparison: Comparison, results: list[Result], directory: Path, tracker: Tracker, command: str
) -> None:
    """Table (Markdown, CSV, LaTeX), figures, report and W&B mirror of a finished comparison."""
    tables.equalised(results, comparison.equal)
    table = tables.build(results)
    for suffix, fmt in (("md", "md"), ("csv", "csv"), ("tex", "latex")):
        with atomic_write(directory / f"table.{suffix}") as file:
            file.write(tables.render(table, fmt))
    column = next(iter(results[0].scores))  # the protocol's first metric
    figure = directory / "score-against-compute.png"
    save(score_against_compute(results, column), figure)
    runs_root, names = Path(comparison.runs[0].paths.runs), tables.labels(results)
    grids = {names[row.run_id]: grid_of(row, runs_root) for row in tables.finals(results)}
    report.write_report(
        directory / "report.html", name=comparison.name, results=results, runs=runs_root, command=command
    )
    with tracker.run(
        directory.name, group=comparison.name, config={"runs": sorted(names)}, job_type="compare"
    ) as mirror:
        for row in results:
            scores = {f"{names[row.run_id]}/{name}": value for name, value in row.scores.items()}
            mirror.log({"train/step": row.steps, "train_gflops": row.train_gflops, **scores})
        mirror.log_table("results", pd.json_normalize([asdict(result) for result in results], sep="."))
        mirror.log_image("score against compute", figure)
        for title, grid in grids.items():
            mirror.log_image(f"samples/{title}", grid)


def describe(comparison: Comparison) -> str:
    """The text of `compare --dry-run`: resolved configs, budgets, spread, estimated time."""
    plans = equal_plans(comparison)
    lines, total = [], 0.0
    for config, plan in zip(comparison.runs, plans, strict=True):
        training = estimate_seconds(config, plan)
        sampling = Sampling.of(config)
        scored = sampling.num_samples * (len(plan.checkpoint_steps) + config.eval.untrained)
        gflops = scored * sampling.gflops(plan.cost.gflops, plan.spec.num_classes)
        sampling_s = training / plan.budget.train_gflops * gflops  # as if both took the same time a Gflop
        total += training + sampling_s
        lines += [
            f"# {config.run_id}",
            f"# values from: {sources(config)}",
            config.to_yaml(),
            budget_line(config, plan),
            f"scored after steps {', '.join(map(str, plan.checkpoint_steps))}",
            f"estimated on this machine: training {training / 60:.1f} min, sampling {sampling_s / 60:.1f} min\n",
        ]
    spread = budgets.spread([getattr(plan.budget, comparison.equal) for plan in plans])
    return "\n".join(
        [
            *lines,
            f"{comparison.equal} differ by {100 * spread:.2f} % (at most {100 * budgets.TOLERANCE:.0f} % is compared)",
            f"estimated total on {device_name()}: {total / 60:.0f} min, and preparation the first time",
        ]
    )
