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
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bench import budget as budgets
from bench import registry
from bench.errors import UserError
from bench.files import atomic_write, short_digest

if TYPE_CHECKING:
    from bench.config import RunConfig
    from bench.train import Plan

EQUAL = ("train_gflops", "images", "gflops", "none")
DISTRIBUTIONS = ("uniform", "loguniform", "choice")
TARGET = "gflops"  # of one forward; a key of a sweep that picks model.size
ONE_RUN = "sweep.run"  # `sweep run <name> sweep.run=<run_id>`: one of the runs as they are

Flat = dict[str, Any]  # dotted key -> value


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
    from bench.config import (
        parse_overrides,
        read_yaml,  # torch loads here
    )

    shared, given = read_yaml(path), parse_overrides(overrides)
    settings = flatten(shared.pop("sweep", {})) | flatten(given.pop("sweep", {}))
    equal = str(given.pop("equal", shared.pop("equal", "train_gflops")))
    if equal not in EQUAL:
        raise UserError(f"{path.name}: equal '{equal}' is not known. Choose one of {', '.join(EQUAL)}.")
    models = _rows(path, shared.pop("models", {}), given.pop("models", {}))
    points = [point] if point else _points(path, settings, models)
    _require_own_keys(path, points, given, equal)
    expander = _Expander([(path.name, shared), ("command line", given)], f"{path.name}, sweep")
    runs = []
    for point in points:
        config, plan, gap = _sized(expander, point) if TARGET in point else (*expander.planned(point), None)
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
        self._plans: dict[str, Plan] = {}

    def config(self, point: Flat) -> RunConfig:
        """The configuration of a point. Raises: UserError, as `load_run`."""
        values = _nest(point)
        # Runs that set the same keys on the same files: one is merged in full, the others replace its values.
        shape = json.dumps([sorted(point), values.get("use")])
        if shape in self._templates:
            try:
                return self._varied(shape, values)
            except (ValueError, TypeError, LookupError):
                pass  # the merge in full says what is wrong, and where
        return self._merged(shape, values)

    def planned(self, point: Flat) -> tuple[RunConfig, Plan]:
        """A point's configuration and what it comes to."""
        from bench.train import plan

        config = self.config(point)
        recipe = config.recipe
        # All that a plan depends on; counting Gflops is slow.
        parts = (config.use, config.model, config.data, recipe.process, recipe.batch_size, recipe.label_dropout)
        key = repr((*parts, config.budget, config.eval.checkpoints, config.paths))
        if key not in self._plans:
            self._plans[key] = plan(config)
        return config, self._plans[key]

    def _merged(self, shape: str, values: dict[str, Any]) -> RunConfig:
        from bench.config import build_run as build

        config = build([*self.layers, (self.source, values)])
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
        (config.eval.sampler or config.recipe.sampler).require_process(config.recipe.process.name)
        return config


def _sized(expander: _Expander, point: Flat) -> tuple[RunConfig, Plan, float]:
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


def _planned(config: RunConfig, plan: Plan, values: Flat, gap: float | None) -> PlannedRun:
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
        protocol=asked_protocol(config),
        gap=gap,
    )


def asked_protocol(config: RunConfig) -> dict[str, Any]:
    """The part of a row's protocol that the configuration alone decides, by the names of `describe_protocol`."""
    from bench.samples import Sampling

    s, scored = Sampling.of(config), config.eval
    known = {key: getattr(s, key) for key in ("num_samples", "labels", "seed", "cfg_scale", "cfg_channels")}
    sampler = {f"sampler{'' if key == 'name' else '_' + key}": value for key, value in asdict(s.sampler).items()}
    asked = {"name": scored.name, "version": scored.version, **known, **sampler, "batch_size": s.batch_size}
    asked |= {"precision": scored.precision, "extractor": scored.extractor, "metrics": ",".join(scored.metrics)}
    return json.loads(json.dumps(asked))  # as a row is read back


def _rows(path: Path, rows: Any, changes: dict[str, Any]) -> list[Flat]:
    """The rows of `models`, as in a comparison: {label: {architecture: dit, size: S/2, ...}}."""
    if not isinstance(rows, dict):
        raise UserError(f"{path.name}: 'models' must list rows, such as models: {{dit: {{size: S/2}}}}.")
    for label in changes:
        if label not in rows:
            raise UserError(
                f"command line: models.{label} is not a row of {path.name}. {registry.nearest(label, list(rows))}"
            )
    found = []
    for label, row in rows.items():
        settings = flatten(row or {}) | flatten(changes.get(label) or {})
        architecture = settings.pop("architecture", label)
        found.append({"use.model": architecture} | {f"model.{key}": value for key, value in settings.items()})
    return found


def _points(path: Path, settings: Flat, models: list[Flat]) -> list[Flat]:
    """Every combination of rows, grid and draws, in the order of the file."""
    where = f"{path.name}: sweep"
    parts: dict[str, Flat] = {"grid": {}, "random": {}, "slurm": {}}
    for key, value in settings.items():
        part, _, rest = key.partition(".")
        if part not in (*parts, "list") or (part == "list") == bool(rest):
            raise UserError(f"{where}.{key} is not a setting. {registry.nearest(part, [*parts, 'list'])}")
        if rest:
            parts[part][rest] = value
    for key, values in parts["grid"].items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}.grid.{key} is {values!r}. Give a list of values, such as [1, 2].")
    rows = settings.get("list", [{}])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{where}.list must be a list of settings, such as [{{model.M: 1}}, {{model.M: 2}}].")
    grid = [dict(zip(parts["grid"], values, strict=True)) for values in itertools.product(*parts["grid"].values())]
    points = []
    for choice in itertools.product(models or [{}], map(flatten, rows), grid, _draws(where, parts["random"])):
        keys = [key for part in choice for key in part]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"{where} sets {repeated[0]} twice. Keep it in one of models, list, grid and random.")
        points.append({key: value for part in choice for key, value in part.items()})
    if not any(points):
        raise UserError(f"{where} varies nothing. Give sweep.grid, sweep.list or sweep.random.")
    return points


def _draws(where: str, settings: Flat) -> list[Flat]:
    """`count` random settings; draw i of a key depends on (seed, key, i) alone, so a longer sweep keeps the shorter."""
    settings = dict(settings)
    count, seed = settings.pop("count", None), settings.pop("seed", 0)
    if not settings and count is None:
        return [{}]
    if not isinstance(count, int) or count < 1:
        raise UserError(f"{where}.random.count is {count!r}. Say how many runs to draw.")
    draws: list[Flat] = [{} for _ in range(count)]
    for path, values in settings.items():
        key, _, name = path.rpartition(".")
        numbers = isinstance(values, list) and values and (name == "choice" or len(values) == 2)
        if name not in DISTRIBUTIONS or not key or not numbers:
            raise UserError(
                f"{where}.random.{path} is {values!r}. Write {key or path}: {{loguniform: [low, high]}}, "
                "{uniform: [low, high]} or {choice: [values]}."
            )
        if name == "loguniform" and min(values) <= 0:
            raise UserError(f"{where}.random.{path} is {values!r}; both ends must be above 0.")
        for i, draw in enumerate(draws):
            draw[key] = _draw(name, values, random.Random(f"{seed} {key} {i}"))
    return draws


def _draw(name: str, values: list[Any], source: random.Random) -> Any:
    if name == "choice":
        return source.choice(values)
    low, high = (math.log(value) if name == "loguniform" else value for value in values)
    drawn = source.uniform(low, high)
    return float(f"{math.exp(drawn) if name == 'loguniform' else drawn:.6g}")


def _require_own_keys(path: Path, points: list[Flat], given: dict[str, Any], equal: str) -> None:
    """Raises: UserError for a setting that the sweep varies and the command line fixes, or that none may vary."""
    swept = dict.fromkeys(key for point in points for key in point)
    for key in swept:
        if key.startswith(("paths.", "sweep.")) or key in ("paths", "equal"):
            raise UserError(f"{path.name}: sweep cannot vary {key}. Set it for all runs.")
        if key == TARGET and equal != TARGET:
            raise UserError(f"{path.name}: sweep sets {TARGET}, which picks sizes by cost. Set equal: {TARGET}.")
        if key == "model.size" and TARGET in swept:
            raise UserError(f"{path.name}: sweep sets model.size and {TARGET}, which picks it. Keep one.")
    for key in flatten(given):
        if any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in swept):
            raise UserError(f"command line: {key} is what {path.name} varies. Change sweep.grid.{key}=[...] instead.")
    if equal == TARGET and TARGET not in swept:
        raise UserError(f"{path.name}: equal is {TARGET}, but no target is given. Write sweep.grid.{TARGET}: [5.6].")


def _require_distinct(path: Path, runs: list[PlannedRun]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        key = json.dumps([run.run_id, run.config["eval"]], sort_keys=True)
        if key in seen:
            raise UserError(
                f"{path.name}: '{seen[key]}' and '{run.label}' are the same run. trainer.* and tracking change nothing "
                "that is computed, and a value that is the default already is no other."
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
    from bench.config import parse_overrides

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


def read_settings(path: Path) -> Flat:
    """The flat `sweep` of a file, without torch; other parts of the file are not checked."""
    values = yaml.safe_load(path.read_text())
    return flatten(values.get("sweep") or {}) | {key: value for key, value in values.items() if key == "models"}


def varied_keys(path: Path) -> list[str]:
    """The keys of a file's grid and draws."""
    found = []
    for key in read_settings(path):
        part, _, rest = key.partition(".")
        if part == "grid":
            found.append(rest)
        elif part == "random" and rest not in ("count", "seed"):
            found.append(rest.rpartition(".")[0])
    return found


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
    values = yaml.safe_load(path.read_text())
    named = values.get("paths") if isinstance(values, dict) else None
    return given[0] if given else str((named or {}).get("runs", "runs"))


def flatten(values: Any, prefix: str = "") -> Flat:
    """The leaves of nested mappings, by dotted key; an empty mapping is none."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        path: leaf
        for key, value in values.items()
        for path, leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _nest(flat: Flat) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *above, key = path.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
        node[key] = value
    return nested
