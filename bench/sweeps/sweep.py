"""Sweeps: one file and the settings that vary in it -> runs with stable ids, checked before anything is computed.

configs/sweep/<name>.yaml is a run file, or a comparison with its `models`, and
  equal: train_gflops | images | gflops | none      what all runs have in common
  sweep:
    grid: {model.M: [1, 2, 4], seed: [0, 1]}        every combination, the last key varies fastest
    list: [{model.mixer: s4d}, {model.mixer: attention}]       settings that belong together
    random: {recipe.optimizer.lr: {loguniform: [1e-4, 1e-2]}, count: 20, seed: 0}      uniform | loguniform | choice
    slurm: {partition: main, timeout_min: 240}      `Slurm` has all of them
Rows of `models`, of `list`, the grid and the draws multiply. With `equal: gflops`, the key `gflops` is a target: the
size of the architecture nearest to it is taken, and how far it is off is reported.

runs/sweep-<name>-<digest>/sweep.json keeps the runs and what they cost, so that only the first look at a sweep needs
torch, for counting Gflops.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bench import budget as budgets
from bench import registry
from bench.dotted import Flat, flatten, nest
from bench.errors import UserError
from bench.files import atomic_write, short_digest
from bench.sweeps.points import TARGET, all_points, require_own_keys, varied_keys

if TYPE_CHECKING:
    from bench.config import RunConfig
    from bench.training.plan import TrainingPlan

EQUAL = ("train_gflops", "images", "gflops", "none")
ONE_RUN = "sweep.run"  # `sweep run <name> sweep.run=<run_id>`: one of the runs as they are


@dataclass(frozen=True)
class Slurm:
    """What a job asks of SLURM; nodes and tasks are those of `trainer`, so a job is one DDP training."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int = 240  # of one start; a job that needs longer is requeued and goes on
    max_timeouts: int = 100  # starts that may run out of time
    gpus_per_node: int | None = None  # None: trainer.devices, or 0 with trainer.accelerator=cpu
    cpus_per_task: int = 4
    mem_gb: float | None = None  # per node; None: the partition's default
    setup: list[str] = field(default_factory=list)  # shell lines before each job, such as "module load cuda"

    def __post_init__(self) -> None:
        for key, least in (("timeout_min", 1), ("max_timeouts", 1), ("cpus_per_task", 1), ("gpus_per_node", 0)):
            value = getattr(self, key)
            if value is None and key == "gpus_per_node":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"sweep.slurm.{key} is {value!r}; give a whole number of at least {least}.")
        if self.mem_gb is not None and (not isinstance(self.mem_gb, (int, float)) or not self.mem_gb > 0):
            raise UserError(f"sweep.slurm.mem_gb is {self.mem_gb!r}; give a number above 0, or null.")
        if not isinstance(self.setup, list):
            raise UserError(
                f"sweep.slurm.setup is {self.setup!r}; give a list of shell lines, such as [module load x]."
            )
        # A signal comes 90 s before the limit; the imports alone may take 15 s.
        if self.timeout_min < 5:
            raise UserError(f"sweep.slurm.timeout_min is {self.timeout_min}; a job needs at least 5 minutes.")


@dataclass(frozen=True)
class PlannedRun:
    """One line of a sweep: a training and a protocol. Lines of one run_id share the training."""

    run_id: str
    values: Flat  # what the sweep set
    config: dict[str, Any]  # the resolved RunConfig
    gflops: float  # of one forward
    train_gflops: float
    steps: int
    images: int
    scored_steps: list[int]
    protocol: dict[str, Any]  # what the configuration says of the protocol; rows of results.jsonl have it and more
    gap: float | None  # gflops over the target, less 1; None without a target

    @property
    def label(self) -> str:
        """The values that set it apart, such as 'M=2 patch_size=1'."""
        return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items()) or self.run_id

    @property
    def processes(self) -> tuple[int, int]:
        """(nodes, processes per node)."""
        return self.config["trainer"]["num_nodes"], self.config["trainer"]["devices"]


@dataclass(frozen=True)
class Sweep:
    """A sweep with all its runs, as sweep.json keeps it."""

    name: str
    equal: str
    inputs: str  # digest of all that the runs follow from: files, code, overrides
    slurm: Slurm
    runs: tuple[PlannedRun, ...]
    root: str  # the runs directory

    @cached_property  # of a thousand runs, and asked for by each
    def directory(self) -> Path:
        """Named by what is trained and how it is scored."""
        scored = json.dumps([[run.run_id, run.protocol] for run in self.runs], sort_keys=True)
        return Path(self.root) / f"sweep-{self.name}-{short_digest(scored)}"

    def trainings(self) -> dict[str, list[PlannedRun]]:
        """The lines of each training, in order."""
        found: dict[str, list[PlannedRun]] = {}
        for run in self.runs:
            found.setdefault(run.run_id, []).append(run)
        return found

    def save(self) -> None:
        with atomic_write(self.directory / "sweep.json") as file:
            json.dump(asdict(self), file)


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of configs/sweep/<name>.yaml: as stored, where nothing has changed since, else expanded and stored.

    Raises: UserError, as `bench.config.load_run`, for what the sweep sets as well; for a sweep that is not well formed,
    the same run twice, or runs that differ by more than 2 % in what they should have in common.
    """
    path = registry.config_file("sweep", name)
    inputs = _inputs(path, overrides)
    for stored in stored_sweeps(path.stem, _root(path, overrides)):
        if stored.inputs == inputs:
            return stored
    sweep = expand(path, overrides, inputs)
    sweep.save()
    return sweep


def stored_sweeps(name: str, root: str | Path = "runs") -> list[Sweep]:
    """The sweeps of that name that have been looked at or launched in `root`, the latest first."""
    files = sorted(Path(root).glob(f"sweep-{name}-????????/sweep.json"), key=lambda path: path.stat().st_mtime)
    return [read_sweep(file.parent) for file in reversed(files)]


def read_sweep(directory: Path) -> Sweep:
    values = json.loads((directory / "sweep.json").read_text())
    runs = tuple(PlannedRun(**run) for run in values.pop("runs"))
    return Sweep(**values | {"slurm": Slurm(**values["slurm"]), "runs": runs})


def expand(path: Path, overrides: Sequence[str] = (), inputs: str = "", point: Flat | None = None) -> Sweep:
    """All runs of a sweep file, or the one at `point`. Raises: UserError, as `load_sweep`."""
    from bench.config import model_rows, require_even_batches  # torch loads here
    from bench.merging import parse_overrides, read_yaml

    shared, given = read_yaml(path), parse_overrides(overrides)
    settings = flatten(shared.pop("sweep", {})) | flatten(given.pop("sweep", {}))
    equal = str(given.pop("equal", shared.pop("equal", "train_gflops")))
    if equal not in EQUAL:
        raise UserError(f"{path.name}: equal '{equal}' is not known. Choose one of {', '.join(EQUAL)}.")
    rows, changes = shared.pop("models", None), given.pop("models", {})
    models = [
        {"use.model": architecture} | {f"model.{key}": value for key, value in (flatten(row) | flatten(change)).items()}
        for architecture, row, change in (model_rows(path.name, rows, changes) if rows or changes else ())
    ]
    points = [point] if point else all_points(path, settings, models)
    require_own_keys(path, points, given, equal)
    expander = _Expander([(path.name, shared), ("command line", given)], f"{path.name}, sweep")
    runs = []
    for point in points:
        config, plan, gap = _sized(expander, point) if TARGET in point else (*expander.planned(point), None)
        require_even_batches(config)
        runs.append(_planned(config, plan, point, gap))
    _require_distinct(path, runs)
    _require_equal(path, equal, runs)
    slurm = _slurm(path, {key.partition(".")[2]: v for key, v in settings.items() if key.startswith("slurm.")})
    return Sweep(path.stem, equal, inputs, slurm, tuple(runs), runs[0].config["paths"]["runs"])


class _Expander:
    """Runs that differ in a few settings: what they share is merged once, and what a group comes to is remembered."""

    def __init__(self, layers: list[tuple[str, dict[str, Any]]], source: str) -> None:
        self.layers, self.source = layers, source
        self._templates: dict[str, RunConfig] = {}
        self._parts: dict[tuple[str, str, str], Any] = {}
        self._nodes: dict[tuple[str, str], Any] = {}
        self._plans: dict[str, TrainingPlan] = {}

    def config(self, point: Flat) -> RunConfig:
        """The configuration of a point. Raises: UserError, as `load_run`."""
        values = nest(point)
        # Runs that set the same keys on the same files: one is merged in full, the others replace its values.
        shape = json.dumps([sorted(point), values.get("use")])
        if shape in self._templates:
            try:
                return self._varied(shape, values)
            except (ValueError, TypeError, LookupError):
                pass  # the merge in full says what is wrong, and where
        return self._merged(shape, values)

    def planned(self, point: Flat) -> tuple[RunConfig, TrainingPlan]:
        """A point's configuration and what it comes to."""
        from bench.training.plan import plan_training

        config = self.config(point)
        recipe = config.recipe
        # All that a plan depends on; counting Gflops is slow.
        parts = (config.use, config.model, config.data, recipe.process, recipe.batch_size, recipe.label_dropout)
        key = repr((*parts, config.budget, config.eval.checkpoints, config.paths))
        if key not in self._plans:
            self._plans[key] = plan_training(config)
        return config, self._plans[key]

    def _merged(self, shape: str, values: dict[str, Any]) -> RunConfig:
        from bench.config import build_run

        config = build_run([*self.layers, (self.source, values)])
        self._templates.setdefault(shape, config)
        for group in values:
            if group != "use":
                self._parts[shape, group, json.dumps(values[group])] = getattr(config, group)
        return config

    def _varied(self, shape: str, values: dict[str, Any]) -> RunConfig:
        """Raises: an error of OmegaConf or of a dataclass for what does not fit, LookupError for a new model.

        A model's own dataclass fills in what its size names, and a recipe "paper" may follow the size: neither can be
        told from a finished configuration.
        """
        from omegaconf import OmegaConf

        template, changes = self._templates[shape], {}
        for group, given in values.items():
            key = (shape, group, json.dumps(given))
            if group == "use":
                continue
            if key not in self._parts:
                if group == "model" or template.use.recipe == "paper":
                    raise LookupError(group)
                if isinstance(given, dict):
                    if (shape, group) not in self._nodes:
                        self._nodes[shape, group] = OmegaConf.structured(getattr(template, group))
                    self._parts[key] = OmegaConf.to_object(OmegaConf.merge(self._nodes[shape, group], given))
                else:
                    self._parts[key] = given
            changes[group] = self._parts[key]
        if template.use.recipe == "paper" and "model" in values and "recipe" in values:
            raise LookupError("recipe")
        config = replace(template, **changes)
        if template.use.recipe == "paper" and config.model != template.model:
            raise LookupError("recipe")  # it may follow the size, and this is the template's
        (config.eval.sampler or config.recipe.sampler).require_process(config.recipe.process.name)
        return config


def _sized(expander: _Expander, point: Flat) -> tuple[RunConfig, TrainingPlan, float]:
    """The point with the named size nearest to its Gflops target (by ratio), and by how much it is off."""
    rest = {key: value for key, value in point.items() if key != TARGET}
    target = point[TARGET]
    if not isinstance(target, (int, float)) or not 0 < target < math.inf:
        raise UserError(f"{expander.source}: {TARGET} is {target!r}; give the Gflops of one forward, above 0.")
    name = expander.config(rest).use.model
    found = []
    for size in registry.architecture(name).sizes:
        try:
            config, plan = expander.planned(rest | {"model.size": size})
        except ValueError as error:  # does not fit the latents, or costs more than the budget
            problem = error
        else:
            found.append((abs(math.log(plan.cost.gflops / target)), size, config, plan))
    if not found:
        raise UserError(f"{expander.source}: no size of {name} can be trained: {problem}")
    _, _, config, plan = min(found, key=lambda entry: entry[:2])
    return config, plan, plan.cost.gflops / target - 1


def _asked_protocol(config: RunConfig) -> dict[str, Any]:
    """The part of a row's protocol that the configuration alone decides, as a row is read back."""
    from bench.scoring.features import PRECISIONS
    from bench.scoring.samples import sampling_protocol

    scored = config.eval
    extractor = {"precision": PRECISIONS[scored.precision], "extractor": scored.extractor}
    asked = sampling_protocol(config) | extractor | {"metrics": ",".join(scored.metrics)}
    return json.loads(json.dumps(asked))


def _planned(config: RunConfig, plan: TrainingPlan, values: Flat, gap: float | None) -> PlannedRun:
    untrained = [0] if config.eval.untrained else []
    return PlannedRun(
        run_id=config.run_id,
        values=values,
        config=json.loads(json.dumps(asdict(config))),
        gflops=plan.cost.gflops,
        train_gflops=plan.budget.train_gflops,
        steps=plan.budget.steps,
        images=plan.budget.images,
        scored_steps=[*untrained, *plan.checkpoint_steps],
        protocol=_asked_protocol(config),
        gap=gap,
    )


def _require_distinct(path: Path, runs: list[PlannedRun]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        key = json.dumps([run.run_id, run.config["eval"]], sort_keys=True)
        if key in seen:
            raise UserError(
                f"{path.name}: '{seen[key]}' and '{run.label}' are the same run. trainer.* (but for precision) and "
                "tracking make no other run, and neither does a value that is the default already."
            )
        seen[key] = run.label


def _require_equal(path: Path, equal: str, runs: list[PlannedRun]) -> None:
    """Raises: UserError if runs of one budget and one target differ by more than 2 % in what should be equal.

    With `equal: gflops` the sizes are as near as they come, and the budget's own quantity must be equal.
    """
    if equal == "none":
        return
    groups: dict[str, dict[str, float]] = {}
    for run in runs:
        quantity = equal if equal != TARGET else "images" if run.config["budget"]["images"] else "train_gflops"
        if equal == TARGET and run.config["budget"]["steps"]:
            quantity = "images"
        asked = [quantity, [v for key, v in run.values.items() if key == TARGET or key.startswith("budget.")]]
        groups.setdefault(json.dumps(asked), {})[run.label] = getattr(run, quantity)
    for group, spent in groups.items():
        ends = (min(spent, key=spent.__getitem__), max(spent, key=spent.__getitem__))
        try:
            budgets.require_equal(json.loads(group)[0], {label: spent[label] for label in ends})
        except UserError as error:
            raise UserError(f"{path.name}: {error}") from None


def _slurm(path: Path, settings: Flat) -> Slurm:
    known = [entry.name for entry in fields(Slurm)]
    for key in settings:
        if key not in known:
            raise UserError(f"{path.name}: sweep.slurm.{key} is not a setting. {registry.nearest(key, known)}")
    return Slurm(**settings)


def one_run(name: str, overrides: Sequence[str]) -> tuple[str, PlannedRun]:
    """(name of the sweep, one run): `sweep.run=<run_id>` of its runs, or a value for every key of its grid and draws.

    Raises: UserError if that is no run of the sweep.
    """
    from bench.merging import parse_overrides  # omegaconf loads here, which tables need not wait for

    path = registry.config_file("sweep", name)
    given = flatten(parse_overrides(overrides))
    if ONE_RUN in given:
        runs = load_sweep(name, [word for word in overrides if not word.startswith(f"{ONE_RUN}=")]).runs
        known = {run.run_id: run for run in runs}
        if given[ONE_RUN] not in known:
            raise UserError(f"{path.name} has no run {given[ONE_RUN]}. {registry.nearest(given[ONE_RUN], [*known])}")
        return path.stem, known[given[ONE_RUN]]
    varied = varied_keys(path)
    point = {key: given[key] for key in varied if key in given}
    if len(point) < len(varied):
        raise UserError(f"Give {', '.join(key for key in varied if key not in point)}, which {path.name} varies.")
    rest = [word for word in overrides if word.partition("=")[0] not in varied]
    return path.stem, expand(path, rest, point=point).runs[0]


def _inputs(path: Path, overrides: Sequence[str]) -> str:
    """Digest of all that the runs of a sweep follow from: its file, the other configs, our code, the overrides."""
    digest = hashlib.sha256(json.dumps([*overrides]).encode())
    code = (registry.ROOT / package for package in ("bench", "models", "datamodules"))
    for file in (
        path,
        *sorted(registry.CONFIGS.rglob("*.yaml")),
        *(f for folder in code for f in sorted(folder.rglob("*.py"))),
    ):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _root(path: Path, overrides: Sequence[str]) -> str:
    """paths.runs, without torch."""
    given = [word.partition("=")[2] for word in overrides if word.startswith("paths.runs=")]
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError):
        values = None  # `expand` says what is wrong
    named = values.get("paths") if isinstance(values, dict) else None
    return given[0] if given else str(named.get("runs", "runs") if isinstance(named, dict) else "runs")
