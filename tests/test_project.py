"""The project's own rules: who imports whom, a light command line, configuration files that load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bench", "models", "datamodules")
# What a package may import of the others.
ALLOWED = {"bench": {"models", "datamodules"}, "models": set(), "datamodules": set()}
# Modules behind which no torch may load: they serve tables and --help.
LIGHT = """
    bench.budget bench.cli bench.dotted bench.errors bench.gpus bench.locks bench.metrics bench.plans.command
    bench.plans.plan bench.plans.printed bench.plans.runs bench.registry bench.reports.curves bench.reports.data
    bench.reports.facts bench.reports.figures bench.reports.plotting bench.reports.report bench.reports.selection
    bench.signals bench.store bench.sweeps.jobs bench.sweeps.launch bench.sweeps.points bench.sweeps.printed
    bench.sweeps.status bench.sweeps.sweep bench.tables.command bench.tables.comparison bench.tables.counted
    bench.tables.own_rows bench.tables.paper bench.tables.printed_cells bench.tables.published bench.tables.specs
    bench.tables.stored bench.training.run_record models.recipe
"""


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, inside functions too; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_lies_below_them(package):
    forbidden = set(PACKAGES) - ALLOWED[package] - {package}
    found = {name(path): sorted(tops(path) & forbidden) for path in sources(package) if tops(path) & forbidden}
    assert found == {}


def test_only_tracking_imports_wandb():
    assert [name(path) for path in sources(*PACKAGES) if "wandb" in tops(path)] == ["bench/tracking.py"]


def test_every_imported_package_is_pinned():
    tests = sorted((ROOT / "tests").rglob("*.py"))
    ours = {*PACKAGES, *(path.stem for path in tests)}
    pinned = {line.partition("==")[0] for line in requirements()}
    imported = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
    known = ours | set(sys.stdlib_module_names)
    missing = {}
    for path in [*sources(*PACKAGES), *tests]:
        packages = {imported.get(top, top.replace("_", "-")) for top in tops(path) - known}
        if packages - pinned:
            missing[name(path)] = sorted(packages - pinned)
    assert missing == {}


@pytest.mark.parametrize("module", LIGHT.split())
def test_light_modules_load_no_torch(module):
    result = python(
        "-c", f"import sys, {module}; print(sorted({{'torch', 'lightning', 'torchmetrics'}} & set(sys.modules)))"
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_help_loads_neither_torch_nor_omegaconf():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['bench', '--help']\n"
        "try:\n    runpy.run_module('bench', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    print('exit', end.code, sorted({'torch', 'omegaconf'} & set(sys.modules)))\n"
    )
    result = python("-c", code)
    assert result.stdout.strip().endswith("exit 0 []"), result.stderr
    assert "usage: python -m bench" in result.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=name)
def test_yaml_files_are_mappings_under_a_header(path):
    text = path.read_text()
    assert isinstance(yaml.safe_load(text), dict)
    assert text.startswith("# ")


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("line", requirements())
def test_requirements_pin_what_the_tests_run_with(line):
    package, pinned = re.fullmatch(r"([a-z0-9-]+)==([0-9.]+)", line).groups()
    assert version(package).partition("+")[0] == pinned
