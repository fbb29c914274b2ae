"""Names to objects: an architecture, a data set, a YAML file. The file name is the name; nothing is registered."""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # models/, datamodules/ and configs/ lie beside bench/
CONFIGS = ROOT / "configs"
# Modules of these packages that hold machinery; every other one ends in ARCHITECTURE or DATASET.
BUNDLE = {"models": "ARCHITECTURE", "datamodules": "DATASET"}


def nearest(name: str, allowed: list[str]) -> str:
    """'Did you mean ...?' where something is close, else the list of what is allowed."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(sorted(allowed))}."


@cache
def names(package: str) -> list[str]:
    """The architectures in `models` or the data sets in `datamodules`, by file name and without importing them."""
    bundle = f"\n{BUNDLE[package]} = "
    return sorted(path.stem for path in (ROOT / package).glob("*.py") if bundle in path.read_text())


def architecture(name: str) -> Any:
    """The `Architecture` of models/<name>.py. Raises: UserError if there is none."""
    return _bundle("models", name, "an architecture")


def dataset(name: str) -> Any:
    """The `DataSet` of datamodules/<name>.py. Raises: UserError if there is none."""
    return _bundle("datamodules", name, "a data set")


def config_file(group: str, name: str) -> Path:
    """`name` as a path to a YAML file, or configs/<group>/<name>.yaml. Raises: UserError if neither exists."""
    for path in (Path(name), CONFIGS / group / f"{name}.yaml"):
        if path.suffix == ".yaml" and path.is_file():
            return path
    known = [path.stem for path in (CONFIGS / group).glob("*.yaml")]
    if (Path(name) / "config.yaml").is_file():
        raise UserError(f"{name} is a run directory. Give its file: {Path(name) / 'config.yaml'}")
    if Path(name).suffix == ".yaml" or "/" in name:
        raise UserError(
            f"There is no file {name}. Give a path to a YAML file, or a name of configs/{group}/. "
            f"{nearest(Path(name).stem, known)}"
        )
    raise UserError(f"There is no configs/{group}/{name}.yaml. {nearest(name, known)}")


def _bundle(package: str, name: str, kind: str) -> Any:
    if name not in names(package):
        raise UserError(f"'{name}' is not {kind} ({package}/{name}.py). {nearest(name, names(package))}")
    return getattr(_import(package, name), BUNDLE[package])


def _import(package: str, name: str) -> ModuleType:
    module = importlib.import_module(f"{package}.{name}")
    if Path(module.__file__ or "").resolve().parent != ROOT / package:
        raise UserError(
            f"Another package named '{package}' shadows IsoDiff's: {module.__file__}. "
            f"Start Python in {ROOT}, or uninstall that package."
        )
    return module
