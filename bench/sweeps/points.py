"""What varies in a sweep: its list, grid and draws -> points, each a setting by dotted key. No torch, no runs."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

from bench import registry
from bench.dotted import Flat, flatten
from bench.errors import UserError

DISTRIBUTIONS = ("uniform", "loguniform", "choice")
EXAMPLES = {
    "grid": "sweep.grid.seed=[0,1]",
    "random": "sweep.random.count=20",
    "slurm": "sweep.slurm.timeout_min=240",
}
TARGET = "gflops"  # of one forward; a key of a sweep that picks model.size


def all_points(path: Path, settings: Flat, models: list[Flat]) -> list[Flat]:
    """Every combination of rows, grid and draws, in the order of the file."""
    where = f"{path.name}: sweep"
    parts: dict[str, Flat] = {"grid": {}, "random": {}, "slurm": {}}
    for key, value in settings.items():
        part, _, rest = key.partition(".")
        if not key:
            raise UserError(f"{where} is {value!r}. Give what varies, such as sweep.grid.seed=[0,1].")
        if key in parts:
            raise UserError(f"{where}.{key} is {value!r}. Give its settings, such as {EXAMPLES[key]}.")
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
        numbers = isinstance(values, list) and values and (name == "choice" or _are_ends(values))
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


def _are_ends(values: list[Any]) -> bool:
    return len(values) == 2 and all(isinstance(value, (int, float)) for value in values)


def _draw(name: str, values: list[Any], source: random.Random) -> Any:
    if name == "choice":
        return source.choice(values)
    low, high = (math.log(value) if name == "loguniform" else value for value in values)
    drawn = source.uniform(low, high)
    return float(f"{math.exp(drawn) if name == 'loguniform' else drawn:.6g}")


def require_own_keys(path: Path, points: list[Flat], given: dict[str, Any], equal: str) -> None:
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


def read_settings(path: Path) -> Flat:
    """The flat `sweep` of a file, without torch; other parts of the file are not checked."""
    from bench.merging import read_yaml  # omegaconf loads here, which tables need not wait for

    values = read_yaml(path)
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
