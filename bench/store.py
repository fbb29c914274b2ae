"""results.jsonl: one line per scored checkpoint, only ever added to. Tables, figures and reports are made from it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar

from bench import __version__
from bench.console import say
from bench.errors import UserError
from bench.files import room_for
from bench.registry import ROOT

MEND = "Delete the line and evaluate its run again: python -m bench evaluate runs/<run_id>"
RECORDED = ("torch", "lightning", "torchmetrics", "numpy")  # packages whose version can change a score


@dataclass(frozen=True, kw_only=True)
class Row(ABC):
    """A line of a store: scores, and how they were measured. Subclasses say of what."""

    protocol: dict[str, Any]  # flat: all that changes a score beside what is scored
    scores: dict[str, float]  # by column, such as fid or fd500[effnet-lite0]
    ci95: dict[str, float]  # half width of the 95 % interval, same keys
    world_size: int
    device: str
    versions: dict[str, str]
    git_commit: str
    created: str  # ISO time, UTC

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be alike before two rows share a column."""
        return self.protocol

    @property
    @abstractmethod
    def key(self) -> tuple[str, ...]:
        """What a store holds once."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """Raises: UserError for what is no mapping, or naming the keys that are missing or unknown."""
        if not isinstance(row, dict):
            raise UserError(f"it holds a {type(row).__name__}, not the fields of a row. {MEND}")
        known = {field.name for field in fields(cls)}
        if known != set(row):
            missing, unknown = (", ".join(sorted(keys)) or "none" for keys in (known - set(row), set(row) - known))
            raise UserError(f"missing keys: {missing}; unknown keys: {unknown}. {MEND}")
        return cls(**row)


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, kw_only=True)
class Result(Row):
    """The scores of one checkpoint under one protocol, with all that is needed to tell what was measured."""

    run_id: str
    comparison: str  # name of the comparison it was scored for, or ""
    model: str  # models/<model>.py
    title: str  # as papers write it: DiT, U-ViT, DiffuSSM
    size: str
    data: str
    recipe: str
    changed: dict[str, Any]  # dotted key -> value: settings of model, data and recipe that those names do not say
    weights: str  # ema | untrained
    seed: int  # of training
    steps: int
    images_seen: int  # steps x batch_size
    batch_size: int  # global
    params_m: float  # trainable, millions
    gflops: float  # 1e9 multiply-adds, one image, one unguided forward, backbone only
    gflops_parts: dict[str, float]  # gflops by kind: linear, attention, convolution, ssm_kernel, fft
    train_gflops: float  # 3 x gflops x images_seen
    train_gflops_papers: float  # gflops x images_seen
    sample_gflops: float  # per image: gflops x sampler steps x (2 if guided)
    train_seconds: float  # 0 for checkpoints on the way
    checkpoint: str  # relative to the runs directory, as is samples
    samples: str

    @property
    def conditions(self) -> dict[str, Any]:
        return self.protocol | {"data": self.data}

    @property
    def recipe_title(self) -> str:
        """The recipe's name, and what was set otherwise: 'paper with optimizer.lr=0.0003'."""
        return self.recipe_besides(())

    def recipe_besides(self, keys: Collection[str]) -> str:
        """`recipe_title` without these settings of the recipe, which are told elsewhere."""
        own = {key.removeprefix("recipe."): v for key, v in sorted(self.changed.items()) if key.startswith("recipe.")}
        told = ", ".join(f"{key}={json.dumps(value)}" for key, value in own.items() if key not in keys)
        return f"{self.recipe} with {told}" if told else self.recipe

    @property
    def key(self) -> tuple[str, ...]:
        """What a store holds once: a comparison's row for a checkpoint under a protocol."""
        return self.comparison, self.run_id, self.checkpoint, self.weights, json.dumps(self.protocol, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class SampleSetScore(Row):
    """The scores of a set of finished images, with all that is known of how they were measured."""

    samples: str  # path as given
    sha256: str  # of the images' bytes

    @property
    def key(self) -> tuple[str, ...]:
        return self.samples, self.sha256, json.dumps(self.protocol, sort_keys=True)


class RowStore(Generic[R]):
    """A JSONL file of rows of one type that several processes may add to at once."""

    def __init__(self, path: Path, row: type[R]) -> None:
        self.path, self.row = path, row

    def append(self, result: R) -> bool:
        """Add a line, on disk when this returns; False if a row of the same key is there already.

        Raises: UserError if the disk is full; the rows before are kept.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with room_for(self.path), self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._mend(file)
            file.seek(0)
            if result.key in {row.key for row in self._parse(file.read())}:
                return False
            file.write(json.dumps(result.to_dict()).encode() + b"\n")
            _sync(file)
        return True

    def load(self, **equals: Any) -> list[R]:
        """All rows, or those whose fields equal the given values, in the order they were stored.

        Raises: UserError naming file and line of a row that cannot be read. A last line that a crash cut off is left
        out with a warning; the next `append` sets it aside.
        """
        if self.path.parent.is_file():
            raise UserError(
                f"{self.path.parent} is a file. Give the directory that holds {self.path.name}: "
                f"{self.path.parent.parent}"
            )
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            content = file.read()
        whole, tail = _split(content)
        if tail:
            say(f"{self.path}: its last line was cut off by a crash and is left out.")
        return [row for row in self._parse(whole) if all(getattr(row, key) == value for key, value in equals.items())]

    def _parse(self, content: bytes) -> list[R]:
        rows = []
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                rows.append(self.row.from_dict(json.loads(line)))
            except UserError as error:
                raise UserError(f"{self.path}, line {number}: {error}") from None
            except ValueError as error:
                raise UserError(f"{self.path}, line {number} is damaged ({error}). {MEND}") from None
        return rows

    def _mend(self, file: BinaryIO) -> None:
        """End the file with a whole line; half a line, left by a crash, moves to a file beside it."""
        file.seek(0)
        content = file.read()
        whole, tail = _split(content)
        if tail:
            aside = self.path.with_suffix(".torn")
            with aside.open("ab") as torn:
                torn.write(tail + b"\n")
                _sync(torn)
            file.truncate(len(whole))
            say(f"{self.path}: its last line was cut off by a crash; set aside in {aside}.")
        elif content and not content.endswith(b"\n"):
            file.write(b"\n")


class ResultStore(RowStore[Result]):
    """results.jsonl."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Result)


def _split(content: bytes) -> tuple[bytes, bytes]:
    """(whole lines, half a line). A last line that merely lacks its newline, as editors leave it, is whole."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except ValueError:
        return content[:end], content[end:]
    return content, b""


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def provenance() -> dict[str, Any]:
    """`versions` of what computes a score, and the `git_commit` of this code ('+dirty' if it was changed since)."""
    versions = {"python": platform.python_version(), "isodiff": __version__}
    return {"versions": versions | {name: metadata.version(name) for name in RECORDED}, "git_commit": _git_commit()}


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top) == ROOT:  # else installed inside somebody else's repository
            return commit + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return "unknown"
