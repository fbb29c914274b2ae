"""Configuration: dataclass defaults, then YAML files, then `key=value` overrides. That order is all there is to know.

`use: {model: dit, recipe: shared, ...}` names what each group starts from (configs/<group>/<name>.yaml); the run file
comes next, the command line last. The result is plain frozen dataclasses; each component receives its own and never the
whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bench import registry
from bench.budget import BudgetConfig
from bench.dotted import flatten
from bench.errors import UserError
from bench.files import short_digest
from bench.merging import Layer, merge, origin_of, parse_overrides, read_yaml
from bench.metrics import METRICS
from datamodules.base import MACHINE_FIELDS, DataConfig
from models.recipe import Recipe, SamplerConfig, require, require_positive, require_size

WANDB_PROJECT = "isodiff"
CHANGEABLE = ("model.", "data.", "recipe.")  # settings that a name stands for
# Samples that a metric needs at least, and the extractors of bench/scoring/features.py: told before any training.
SAMPLES_NEEDED = dict.fromkeys(METRICS, 3) | {
    **dict.fromkeys(("inception_score", "class_accuracy"), 2),
    **dict.fromkeys(("recall", "recall_float16"), 5),
    **dict.fromkeys(("precision", "precision_float16"), 2),
}
EXTRACTORS = ("inception", "dinov2", "effnet-lite0", "random")
PAPER = "paper"  # use.recipe: paper = the recipe the architecture's paper published; it has no YAML file


def require_seed(value: object, key: str) -> None:
    """Raises: ValueError if it is not one of the seeds that Lightning takes."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ValueError(f"{key} is {value!r}; give a whole number from 0 to 2^32 - 1.")


@dataclass(frozen=True)
class UseConfig:
    """Which file of each group a run starts from."""

    model: str = "dit"  # models/<name>.py
    data: str = "digits"  # datamodules/<name>.py
    recipe: str = "shared"  # shared: one recipe for all architectures; paper: each as published
    eval: str = "digits"


@dataclass(frozen=True)
class EvalConfig:
    """The protocol of a score: everything that changes the number and is not the trained weights."""

    name: str = "fid50k"
    version: int = 1  # raised when the meaning of a protocol changes
    num_samples: int = 50_000
    batch_size: int = 64  # samples per forward; blocks of this size are what processes share out
    seed: int = 0  # sample i depends on (seed, i) alone
    labels: str = "iid"  # iid: uniform and independent, as DiT and ADM draw them | balanced: i mod num_classes
    cfg_scale: float = 1.0  # eps_u + cfg_scale (eps_c - eps_u); 1 = unguided (U-ViT prints cfg_scale - 1)
    cfg_channels: str | None = None  # 3 | all; None: the recipe's
    sampler: SamplerConfig | None = None  # None: the recipe's
    extractor: str = "inception"
    extractor_weights: str | None = None  # file of the extractor's weights, where no package brings them
    fetch_weights: bool = False  # consent to fetch such weights once, into the user's cache
    compile: bool = False  # compile the extractor: same features, worth its start-up for tens of thousands of images
    precision: str = "float32"  # of the extractor: float32 | bf16, which marks its columns as approximate
    reference: str | None = None  # npz (ADM's or ours) or folder of real images; None: the data set's own
    metrics: list[str] = field(default_factory=lambda: ["fid", "sfid", "inception_score", "precision", "recall"])
    checkpoints: int = 1  # checkpoints scored along training, each at half the compute of the next
    untrained: bool = False  # also score the weights before the first step

    def __post_init__(self) -> None:
        require(self.labels, ("iid", "balanced"), "eval.labels")
        require(self.cfg_channels, (None, "3", "all"), "eval.cfg_channels")
        require(self.precision, ("float32", "bf16"), "eval.precision")
        require_seed(self.seed, "eval.seed")
        for key in ("num_samples", "batch_size", "checkpoints"):
            require_positive(getattr(self, key), f"eval.{key}")
        if self.cfg_scale < 0:
            raise ValueError(f"eval.cfg_scale is {self.cfg_scale}; it must be at least 0, and 1 is unguided.")
        require(self.extractor, EXTRACTORS, "eval.extractor")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"eval.metrics is {self.metrics}; give at least one, and each once, such as [fid].")
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"eval.metrics has {name!r}, which is no metric. {registry.nearest(name, [*METRICS])}")
        self.require_samples(self.num_samples, "eval.num_samples")

    def require_samples(self, num_samples: int, key: str) -> None:
        """Raises: ValueError if a metric needs more samples than the setting `key` gives."""
        for name in self.metrics:
            if num_samples < SAMPLES_NEEDED[name]:
                raise ValueError(
                    f"{key} is {num_samples}, and {name} needs at least {SAMPLES_NEEDED[name]} samples. Raise it, or "
                    "leave that metric out of eval.metrics."
                )


@dataclass(frozen=True)
class TrainerConfig:
    """The machine side of a run: changes speed, and what is computed by rounding alone.

    That of `precision` is large, so it makes another run.
    """

    accelerator: str = "auto"  # auto | cpu | gpu; auto takes a GPU where there is one
    devices: int = 1  # processes per node
    num_nodes: int = 1
    precision: str = "32-true"  # Lightning's names: 32-true | bf16-mixed
    accumulate: int = 1  # micro-batches per optimizer step; batch_size stays global
    checkpoint_minutes: float = 1.0  # what a crash loses at most
    log_every: int = 20  # optimizer steps between lines of metrics.jsonl
    compile: bool = False  # compile the backbone: same numbers within rounding; a minute or more at the start
    activation_checkpointing: bool = False  # compute activations of blocks twice instead of keeping them: same bits
    stop_above_grad_norm: float | None = None  # stop at a larger gradient norm; null: only at one that is not finite
    grid_every: int = 0  # optimizer steps between sample grids of the EMA weights; 0 = none
    score_every: int = 0  # optimizer steps between quick scores of the EMA weights; 0 = none
    score_samples: int = 500  # of a quick score; the rest of its protocol is the run's

    def __post_init__(self) -> None:
        require(self.accelerator, ("auto", "cpu", "gpu"), "trainer.accelerator")
        require(self.precision, ("32-true", "bf16-mixed"), "trainer.precision")
        for key in ("devices", "num_nodes", "accumulate", "checkpoint_minutes", "log_every", "score_samples"):
            require_positive(getattr(self, key), f"trainer.{key}")
        for key in ("grid_every", "score_every"):
            if getattr(self, key) < 0:
                raise ValueError(f"trainer.{key} is {getattr(self, key)}; it must be at least 1, or 0 for none.")
        if self.stop_above_grad_norm is not None:
            require_positive(self.stop_above_grad_norm, "trainer.stop_above_grad_norm")


@dataclass(frozen=True)
class PathsConfig:
    runs: str = "runs"  # run directories, comparisons and results.jsonl
    cache: str = "cache"  # autoencoder, latents, reference features: made once, shared by all runs


@dataclass(frozen=True)
class RunConfig:
    """One training run and how it is scored."""

    use: UseConfig
    seed: int
    model: Any  # the architecture's own dataclass, models/<use.model>.py
    data: Any  # datamodules.base.DataConfig
    recipe: Recipe
    budget: BudgetConfig
    eval: EvalConfig
    trainer: TrainerConfig
    paths: PathsConfig
    tracking: str  # off | offline | online (Weights & Biases; without a key, online becomes offline)

    def __post_init__(self) -> None:
        if self.tracking == "False":  # YAML reads a bare `off` as false
            object.__setattr__(self, "tracking", "off")
        require(self.tracking, ("off", "offline", "online"), "tracking")
        require_seed(self.seed, "seed")
        if self.trainer.score_every:
            self.eval.require_samples(self.trainer.score_samples, "trainer.score_samples")
        for key, value in flatten(asdict(self)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} is {value}; it must be a finite number.")

    @property
    def trained(self) -> dict[str, Any]:
        """All that changes the trained weights, as JSON has it."""
        trained = {
            key: value for key, value in asdict(self).items() if key in ("model", "data", "recipe", "budget", "seed")
        }
        trained["data"] = {key: value for key, value in trained["data"].items() if key not in MACHINE_FIELDS}
        return _plain(trained | {"architecture": self.use.model, "precision": self.trainer.precision})

    @property
    def run_id(self) -> str:
        """Readable name and a hash of everything that changes the trained weights."""
        digest = short_digest(json.dumps(self.trained, sort_keys=True))
        return f"{self.use.model}-{self.model.size.replace('/', '-')}-{self.use.data}-{digest}".lower()

    @property
    def directory(self) -> Path:
        return Path(self.paths.runs) / self.run_id

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def changed_settings(config: RunConfig) -> dict[str, Any]:
    """What changes the trained weights and is not said by the names of model, size, data and recipe.

    Dotted key -> value, of `model`, `data` and `recipe`; against the files under configs/ as they are now.
    """
    layer = {"use": asdict(config.use), "model": {"size": config.model.size}, "budget": {"steps": 1}}
    named = flatten(build_run([("names", layer)]).trained)
    own = {key: value for key, value in flatten(config.trained).items() if key.startswith(CHANGEABLE)}
    return {
        key: value
        for key, value in own.items()
        if value != named[key] and not key.startswith(("recipe.sampler.", "recipe.cfg_channels"))
    }


EVAL_MACHINE = ("extractor_weights", "fetch_weights", "compile")  # settings of `eval` that change no score
# The settings of `eval` that count where samples are finished: the extractor's, and how they are scored.
EXTRACTING = ("extractor", "extractor_weights", "fetch_weights", "compile")
SCORING = (*EXTRACTING, "num_samples", "batch_size", "precision", "reference", "metrics")


@dataclass(frozen=True)
class ScoringConfig:
    """How finished images are scored, or become a reference."""

    eval: EvalConfig
    paths: PathsConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    num_samples: int | None = None  # as asked for; None: all
    extractor: str | None = None  # as asked for; None: the reference's


@dataclass(frozen=True)
class Comparison:
    """Several architectures with one budget, one recipe and one protocol."""

    name: str
    equal: str  # the quantity every row spends alike: train_gflops | images
    runs: tuple[RunConfig, ...]

    @property
    def directory(self) -> Path:
        """The comparison's own directory, named by what is compared and how it is scored."""
        protocols = [{k: v for k, v in asdict(run.eval).items() if k not in EVAL_MACHINE} for run in self.runs]
        scored = json.dumps([[r.run_id, p] for r, p in zip(self.runs, protocols, strict=True)], sort_keys=True)
        return Path(self.runs[0].paths.runs) / f"compare-{self.name}-{short_digest(scored)}"


def load_run(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of configs/run/<name>.yaml, or of a path such as runs/<run_id>/config.yaml.

    Raises: UserError naming file, key and nearest match for an unknown key, a wrong type, a value out of its range or
    a budget given twice.
    """
    path = registry.config_file("run", name)
    return build_run([(path.name, read_yaml(path)), ("command line", parse_overrides(overrides))])


def load_scoring(overrides: Sequence[str] = ()) -> ScoringConfig:
    """How finished images are scored. Raises: UserError, as `load_run`, and for settings of how samples are drawn."""
    return _scoring({"eval": EvalConfig, "trainer": TrainerConfig, "paths": PathsConfig}, SCORING, overrides)


def load_reference(overrides: Sequence[str] = ()) -> ScoringConfig:
    """How a reference is made from real images. Raises: UserError, as `load_scoring`."""
    return _scoring({"eval": EvalConfig, "data": DataConfig, "paths": PathsConfig}, EXTRACTING, overrides)


def _scoring(groups: dict[str, type], allowed: Sequence[str], overrides: Sequence[str]) -> ScoringConfig:
    given = parse_overrides(overrides)
    base = OmegaConf.create({key: OmegaConf.structured(group) for key, group in groups.items()})
    OmegaConf.set_struct(base, True)
    scored = given.get("eval", {})
    merged = merge(base, given, "command line")
    for key in scored:
        if key not in allowed:
            raise UserError(
                f"command line: eval.{key} changes nothing here. Settings of eval that do: {', '.join(allowed)}."
            )
    try:
        return ScoringConfig(
            **{str(key): _object(merged, str(key)) for key in merged},
            num_samples=scored.get("num_samples"),
            extractor=scored.get("extractor"),
        )
    except ValueError as error:
        raise UserError(f"command line: {error}") from None


def load_comparison(name: str, overrides: Sequence[str] = ()) -> Comparison:
    """The comparison of configs/compare/<name>.yaml: a run file whose `models` names the rows.

    `models: {label: {architecture: dit, size: S/2, ...}}`; the architecture defaults to the label. The override
    `models.<label>.size=B/2` changes one row, any other override changes all rows.
    Raises: UserError, as `load_run`.
    """
    path = registry.config_file("compare", name)
    shared = read_yaml(path)
    given = parse_overrides(overrides)
    rows, changes = shared.pop("models", None), given.pop("models", {})
    equal = given.pop("equal", shared.pop("equal", "train_gflops"))
    if equal not in ("train_gflops", "images"):
        raise UserError(f"{path.name}: equal '{equal}' is not known. Choose one of train_gflops, images.")
    runs = []
    for architecture, row, change in model_rows(path.name, rows, changes):
        layers = [(path.name, shared), (path.name, {"model": row}), ("command line", given)]
        runs.append(build_run([*layers, ("command line", {"use": {"model": architecture}, "model": change})]))
        require_even_batches(runs[-1])
    return Comparison(path.stem, equal, tuple(runs))


def require_even_batches(config: RunConfig) -> None:
    """Raises: UserError if the processes of a training cannot share its global batch evenly; scoring has no batch."""
    machine, batch_size = config.trainer, config.recipe.batch_size
    parts = machine.devices * machine.num_nodes * machine.accumulate
    if batch_size % parts:
        near = max(part for part in range(1, min(batch_size, parts) + 1) if batch_size % part == 0)
        raise UserError(
            f"recipe.batch_size is {batch_size}, which trainer.devices x trainer.num_nodes x trainer.accumulate = "
            f"{machine.devices} x {machine.num_nodes} x {machine.accumulate} = {parts} does not divide. Give a "
            f"multiple of {parts}, or trainer.* whose product is {near}."
        )


def model_rows(file: str, rows: Any, changes: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The rows of `models` -> (architecture, the row's settings of the model, those of the command line) of each.

    Raises: UserError if there are none, or the command line changes a row that is not there.
    """
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"{file}: 'models' must list the rows to compare, such as models: {{dit: {{size: S/2}}}}.")
    example = next(iter(rows))
    if not isinstance(changes, dict):
        raise UserError(
            f"command line: models is {json.dumps(changes)}; change a row by its label, such as "
            f"models.{example}.size=S/2."
        )
    for label in changes:
        if label not in rows:
            raise UserError(f"command line: models.{label} is not a row of {file}. {registry.nearest(label, [*rows])}")
    found = []
    for label, row in rows.items():
        for source, given in ((file, row), ("command line", changes.get(label))):
            if not isinstance(given, dict | None):
                raise UserError(
                    f"{source}: models.{label} is {given!r}; give the row's settings, such as models.{label}.size=S/2."
                )
        row, change = dict(row or {}), dict(changes.get(label) or {})
        found.append((change.pop("architecture", row.pop("architecture", label)), row, change))
    return found


def sources(config: RunConfig) -> str:
    """Where the values of a configuration come from, later ones winning; for `--dry-run`."""
    files = [source for _, source in _group_files(config.use)]
    paper = [f"paper_recipe of models/{config.use.model}.py"] if config.use.recipe == PAPER else []
    return " < ".join(["dataclass defaults", *paper, *files, "the named file", "command line"])


def _group_files(use: UseConfig) -> list[tuple[str, str]]:
    """(group, file below the root): model and data need no file, the recipe and the protocol have one."""
    found = []
    for group in ("model", "data"):
        source = f"configs/{group}/{getattr(use, group)}.yaml"
        if (registry.ROOT / source).is_file():
            found.append((group, source))
    for group in ("recipe", "eval") if use.recipe != PAPER else ("eval",):
        path = registry.config_file(group, getattr(use, group))
        found.append((group, f"configs/{group}/{path.name}"))
    return found


def build_run(layers: Sequence[Layer]) -> RunConfig:
    """Merge (source, values) layers over the group files they name, then make the frozen dataclasses."""
    use = OmegaConf.structured(UseConfig)
    for source, values in layers:
        use = merge(use, values.get("use", {}), source, "use")
    use = UseConfig(**use)
    architecture = registry.architecture(use.model)
    registry.dataset(use.data)  # must exist
    recipe: Any = Recipe
    below = [(source, {group: read_yaml(registry.ROOT / source)}) for group, source in _group_files(use)]
    if use.recipe == PAPER:
        recipe = architecture.module.recipe_for(model_config(architecture, [*below, *layers]))
    base = OmegaConf.create(
        {
            "use": OmegaConf.structured(use),
            "seed": 0,
            "model": OmegaConf.structured(architecture.config),
            "data": OmegaConf.structured(DataConfig),
            "recipe": OmegaConf.structured(recipe),
            "budget": OmegaConf.structured(BudgetConfig),
            "eval": OmegaConf.structured(EvalConfig),
            "trainer": OmegaConf.structured(TrainerConfig),
            "paths": OmegaConf.structured(PathsConfig),
            "tracking": "offline",
        }
    )
    OmegaConf.set_struct(base, True)
    merged = base
    for source, values in [*below, *layers]:
        merged = merge(merged, values, source)
    try:
        config = RunConfig(**{str(key): _object(merged, str(key)) for key in merged})
        require_size(config.model.size, architecture.sizes, architecture.title)
        (config.eval.sampler or config.recipe.sampler).require_process(config.recipe.process.name)
        return config
    except ValueError as error:
        raise UserError(f"{origin_of(str(error), [*below, *layers], layers[0][0])}: {error}") from None


def model_config(architecture: Any, layers: Sequence[Layer]) -> Any:
    """The model's dataclass alone: a paper's recipe may depend on the size."""
    node = OmegaConf.structured(architecture.config)
    for source, values in layers:
        node = merge(node, values.get("model", {}), source, "model")
    try:
        config: Any = OmegaConf.to_object(node)
        require_size(config.size, architecture.sizes, architecture.title)
        return config
    except ValueError as error:
        raise UserError(f"{origin_of(str(error), layers)}: {error}") from None


def _object(merged: Any, key: str) -> Any:
    try:
        value = OmegaConf.to_object(merged[key]) if OmegaConf.is_config(merged[key]) else merged[key]
    except OmegaConfBaseException as error:  # of a ${reference}
        raise ValueError(
            f"{error.full_key or key} refers to what is not there ({(error.msg or '').splitlines()[0]}). "
            "Write the value itself."
        ) from None
    return str(value) if key == "tracking" else value


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML stays free of Python tags."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
