"""Tables of papers as files: configs/table/<name>.yaml -> its rows, and the runs of ours that belong beside them.

title, paper, data       what the table shows; `data` is the name in published.csv, unless a row has its own
sources                  whose cells it prints: the table itself first, then where cells that it leaves open come from
columns                  keys of `COLUMNS`
runs                     name -> a training of ours: model, size, data, recipe, budget; what the recipe says of
                         batch_size, sampler, sampler_steps and cfg_channels; `set` has other settings
rows                     in print order: model, resolution, guidance, scale, variant as in published.csv; `run` is the
                         training that fills a row of ours, `cfg_scale` its guidance where no scale is printed; `also`
                         is another name of the model in the sources
sweep                    or a file of configs/sweep/, whose runs are the rows; nothing is printed of them
notes                    sentences below the table
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench import budget as budgets
from bench import registry
from bench.budget import BudgetConfig
from bench.dotted import flatten
from bench.errors import UserError
from bench.sweeps.points import all_points
from models.recipe import Recipe

RUN_FILE = "imagenet256"  # of configs/run/: shared recipe, protocol fid50k; what differs is said by overrides
BUDGETS = ("steps", "images", "train_gflops")


@dataclass(frozen=True)
class PaperRun:
    """One training of ours and how it is sampled, in the words of the configuration."""

    name: str
    model: str  # models/<model>.py
    size: str
    data: str  # datamodules/<data>.py
    recipe: str
    budget: Mapping[str, Any]  # one of `BUDGETS` -> how much
    batch_size: int  # of the recipe, as are the next three
    sampler: str
    sampler_steps: int
    cfg_channels: str = "all"
    settings: Mapping[str, Any] = field(default_factory=dict)  # other dotted keys

    @property
    def model_settings(self) -> str:
        """What differs from the named size, such as 'M=4 patch_size=1'."""
        own = {key: value for key, value in sorted(self.settings.items()) if key.startswith("model.")}
        return " ".join(f"{key.removeprefix('model.')}={_text(value)}" for key, value in own.items())

    @property
    def point(self) -> dict[str, Any]:
        """All settings by dotted key, as a line of a sweep has them."""
        named = {"use.model": self.model, "use.data": self.data, "use.recipe": self.recipe, "model.size": self.size}
        return {**named, **self.settings, **{f"budget.{key}": self.budget.get(key) for key in BUDGETS}}

    @property
    def overrides(self) -> list[str]:
        """The settings over configs/run/<RUN_FILE>.yaml."""
        unset = [f"budget.{key}" for key in BUDGETS if key not in self.budget and key != "steps"]
        return [f"{key}={_text(value)}" for key, value in self.point.items() if key not in unset]

    @property
    def decoder(self) -> str:
        """The autoencoder, of which scores see the decoder."""
        name = f"configs/data/{self.data}.yaml"
        return str(self.settings.get("data.autoencoder") or _read(registry.ROOT / name).get("autoencoder"))

    def images(self, gflops: float) -> int:
        """Training images, whole steps; `gflops` is one forward's."""
        return budgets.resolve(BudgetConfig(**self.budget), gflops, self.batch_size).images


@dataclass(frozen=True)
class Place:
    """One printed row, or one of a sweep, and the run that belongs beside it."""

    model: str
    resolution: int
    data: str
    guidance: str = "none"
    scale: str = ""
    variant: str | None = None  # None: whatever it is
    run: str | None = None
    cfg_scale: float = 1.0  # by which a run of ours is sampled for this row
    also: str = ""  # another name of it in `sources`


@dataclass(frozen=True)
class TableSpec:
    """A file of configs/table/."""

    name: str
    title: str
    paper: str
    sources: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Place, ...]
    runs: Mapping[str, PaperRun]
    notes: tuple[str, ...]
    sweep: str | None

    def places_of(self, run: str) -> list[Place]:
        return [place for place in self.rows if place.run == run]


COLUMNS = {  # key -> title; scores get their direction where they are printed
    "data": "data",
    "resolution": "pixels",
    "variant": "variant",
    "guidance": "guidance",
    "sampler": "sampler",
    "params_m": "params (M)",
    "images_m": "images (M)",
    "gflops": "Gflops",
    "counted": "Gflops counted",
    "train_gflops_papers": "Gflops × images",
    "fid": "fid",
    "sfid": "sfid",
    "inception_score": "inception_score",
    "precision": "precision",
    "recall": "recall",
}


def paper_tables() -> list[str]:
    """The names of all files of configs/table/."""
    return sorted(path.stem for path in (registry.CONFIGS / "table").glob("*.yaml"))


def is_paper_table(name: str) -> bool:
    return name in paper_tables() or (name.endswith(".yaml") and Path(name).is_file())


def load_table(name: str) -> TableSpec:
    """The table of configs/table/<name>.yaml, or of a path. Raises: UserError for a file that is not well formed."""
    path = registry.config_file("table", name)
    values = _read(path)
    _require_keys(
        path, values, ("title", "paper", "columns"), ("sources", "data", "runs", "rows", "sweep", "notes"), "table"
    )
    for column in values["columns"]:
        if column not in COLUMNS:
            raise UserError(f"{path.name}: '{column}' is not a column. {registry.nearest(column, list(COLUMNS))}")
    if ("sweep" in values) == ("rows" in values):
        raise UserError(f"{path.name}: give either rows or a sweep, whose runs are the rows.")
    if sweep := values.get("sweep"):
        runs = _sweep_runs(registry.config_file("sweep", sweep))
        rows = [Place(label, _resolution(run.data), "", run=label) for label, run in runs.items()]
    else:
        runs = {key: _run(path, key, run) for key, run in (values.get("runs") or {}).items()}
        rows = [_place(path, row, values.get("data", ""), runs) for row in values["rows"]]
    return TableSpec(
        path.stem,
        values["title"],
        values["paper"],
        tuple(values.get("sources", ())),
        tuple(values["columns"]),
        tuple(rows),
        runs,
        tuple(values.get("notes", ())),
        sweep,
    )


def _run(path: Path, name: str, values: Any) -> PaperRun:
    keys = ("model", "size", "data", "recipe", "budget", "batch_size", "sampler", "sampler_steps")
    _require_keys(path, values, keys, ("set", "cfg_channels"), f"runs.{name}")
    budget = values["budget"]
    if not isinstance(budget, dict) or len(budget) != 1 or set(budget) - set(BUDGETS):
        raise UserError(f"{path.name}: runs.{name}.budget is {budget!r}. Give one of {', '.join(BUDGETS)}.")
    settings, channels = dict(values.get("set", {})), values.get("cfg_channels", "all")
    return PaperRun(name, **{key: values[key] for key in keys}, cfg_channels=channels, settings=settings)


def _place(path: Path, values: Any, data: str, runs: Mapping[str, PaperRun]) -> Place:
    allowed = ("data", "guidance", "scale", "variant", "run", "cfg_scale", "also")
    _require_keys(path, values, ("model", "resolution"), allowed, "a row")
    if (run := values.get("run")) is not None and run not in runs:
        raise UserError(f"{path.name}: row {values['model']} names the run '{run}'. {registry.nearest(run, [*runs])}")
    scale = str(values.get("scale", ""))
    guided = values.get("guidance", "none") == "cfg" and scale
    values = {"data": data, "cfg_scale": float(scale) if guided else 1.0} | values | {"scale": scale}
    return Place(**values)


def _sweep_runs(path: Path) -> dict[str, PaperRun]:
    """The runs of a sweep with a list or a grid, by what it sets."""
    values = _read(path)
    settings = flatten(values.pop("sweep"))
    varied = {key: value for key, value in settings.items() if not key.startswith("slurm.")}
    shared = flatten({key: value for key, value in values.items() if key != "trainer"})
    recipe, runs = _recipe(shared["use.recipe"]), {}
    for point in all_points(path, varied, []):
        flat = shared | point
        label = " ".join(f"{key.removeprefix('model.')}={_text(value)}" for key, value in point.items())
        budget = {key: flat.pop(f"budget.{key}") for key in BUDGETS if f"budget.{key}" in flat}
        flat.pop("use.eval")
        runs[label] = PaperRun(
            label,
            flat.pop("use.model"),
            flat.pop("model.size"),
            flat.pop("use.data"),
            flat.pop("use.recipe"),
            budget,
            recipe.batch_size,
            recipe.sampler.name,
            recipe.sampler.steps,
            settings=flat,
        )
    return runs


def _recipe(name: str) -> Recipe:
    """The parts of configs/recipe/<name>.yaml that a plan needs, over the defaults."""
    values = flatten(_read(registry.config_file("recipe", name)))
    own = sorted(set(values) & {"batch_size", "sampler.name", "sampler.steps"})
    if own:
        raise UserError(f"configs/recipe/{name}.yaml sets {own[0]}: name the runs of the table one by one instead.")
    return Recipe()


def _resolution(data: str) -> int:
    return int("".join(sign for sign in data if sign.isdigit()))


def _require_keys(path: Path, values: Any, required: Sequence[str], optional: Sequence[str], where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{path.name}: {where} is {values!r}; it must be 'key: value' pairs.")
    if missing := [key for key in required if key not in values]:
        raise UserError(f"{path.name}: {where} lacks {missing[0]}.")
    allowed = [*required, *optional]
    if unknown := [key for key in values if key not in allowed]:
        raise UserError(f"{path.name}: {where} has '{unknown[0]}'. {registry.nearest(unknown[0], allowed)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}.")
    return values


def _text(value: Any) -> str:
    """A value as an override has it."""
    return value if isinstance(value, str) else json.dumps(value)
