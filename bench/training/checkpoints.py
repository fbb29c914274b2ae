"""Checkpoint files: written whole or not at all, checked before they are trusted, and matched with their run.

A checkpoint says what it was trained with (`SETTINGS`: all that changes the weights but the budget, for no schedule
knows the end, and the fingerprint of the latents), so one that was put into another run's folder is told by its own
words and not by the file beside it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from bench.config import RunConfig
from bench.console import is_main_process, say
from bench.dotted import flatten
from bench.errors import UserError
from bench.files import atomic_write
from models.base import DiffusionModule

SETTINGS = "isodiff"  # the key of a checkpoint under which they stand
LAST = "last.ckpt"


class CheckpointFiles(TorchCheckpointIO):
    """Writes beside the old file, to the disk, and renames: a kill or a full disk leaves the old file.

    Lightning's own writes through a copy in memory and through the folder for temporary files, from where a move to
    another disk is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with atomic_write(Path(path), "wb") as file:
            torch.save(checkpoint, file)


class Damaged(Exception):
    """A checkpoint that is not whole, or not there any more."""


class Stamp(L.Callback):
    """Puts the settings of the run into each of its checkpoints.

    Lightning counts micro-batches, and steps where their number is a multiple of `trainer.accumulate`; a checkpoint
    knows those of the process that wrote it. All are saved after a whole step, so the count begins anew from there.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[SETTINGS] = self.settings

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):  # a batch is completed after the callbacks that save
            counts |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}


def checkpoint_path(directory: Path, steps: int) -> Path:
    return directory / "checkpoints" / f"step-{steps:08d}.ckpt"


def settings_of(config: RunConfig, latents: str) -> dict[str, Any]:
    """What must be alike for one run to go on from another's checkpoint; `latents` is their fingerprint."""
    return {key: value for key, value in config.trained.items() if key != "budget"} | {"latents": latents}


def newest_checkpoint(directory: Path, settings: Mapping[str, Any], steps: int) -> Path | None:
    """The checkpoint of the most steps, to resume from; None if there is none.

    One that is not whole is set aside by name, by the first process, and the one before is taken.

    Raises: UserError for one of other settings, of more than `steps` steps, or that holds code.
    """
    found = {}
    for path in checkpoints(directory):
        try:
            found[path] = opened(path)
        except Damaged as problem:
            _set_aside(path, problem)
    for path in sorted(found, key=lambda path: found[path]["global_step"], reverse=True):
        try:
            require_whole(path)
        except Damaged as problem:
            _set_aside(path, problem)
            continue
        require_settings(path, found[path], settings)
        if found[path]["global_step"] > steps:
            raise UserError(
                f"{path} is of step {found[path]['global_step']}, but this run ends at {steps}: it belongs to one with "
                "a larger budget. Move it away."
            )
        return path
    return None


def checkpoints(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("*.ckpt"))


def opened(path: Path) -> dict[str, Any]:
    """A checkpoint, its tensors still on disk.

    Raises: Damaged if it cannot be read; UserError if it holds anything but numbers, text and containers, for loading
    that could run any code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "global_step" not in checkpoint:
            raise ValueError("no checkpoint of a training")
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) and _pickle_is_whole(path):
            raise UserError(
                f"{path} holds more than numbers and text ({_global(str(error))}): loading it could run any code, so "
                "it was left alone. No training here writes such a file; remove it."
            ) from None
        raise Damaged("its contents are damaged") from None
    except Exception as error:  # a torn file raises whatever its broken part happens to hit
        raise Damaged(" ".join(str(error).split())[:200]) from None
    return checkpoint


def require_whole(path: Path) -> None:
    """Raises: Damaged unless every byte is as it was written, by the CRC-32 of each tensor, which torch.load ignores.

    It reads the file once: 1 GB takes about a second.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    # The last for a header whose damaged byte names a compression or version that zipfile does not know.
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise Damaged(str(error)) from None
    if member is not None:
        raise Damaged(f"its {member} is not as it was written")


def require_settings(path: Path, checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises: UserError, naming what differs, if a checkpoint was trained with other settings."""
    if SETTINGS not in checkpoint:
        raise UserError(
            f"{path} does not say what it was trained with: another program, or an older version, wrote it. Move it "
            "away to train anew."
        )
    theirs, ours = flatten(checkpoint[SETTINGS]), flatten(settings)
    differing = [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]
    if differing:
        listed = ", ".join(f"{key} {theirs.get(key)}, not {ours.get(key)}" for key in differing)
        raise UserError(
            f"{path} is of another run: it was trained with {listed}. Move it away, or undo the change to config.yaml."
        )


def require_unchanged(directory: Path, config: RunConfig) -> None:
    """`config` is that of a run directory. Raises: UserError, naming the keys, if it was changed after training."""
    found = checkpoints(directory)
    if config.run_id == directory.resolve().name or not found:
        return
    for path in found:
        with suppress(Damaged):
            if SETTINGS in (checkpoint := opened(path)):
                require_settings(path, checkpoint, settings_of(config, checkpoint[SETTINGS]["latents"]))
    raise UserError(
        f"{directory}/config.yaml is of the run {config.run_id}, which its folder is not. Undo the change of its "
        "budget or of the folder's name; another budget is given on the command line."
    )


def checked(path: Path, config: RunConfig) -> dict[str, Any]:
    """The checkpoint of a run, its tensors still on disk.

    Raises: UserError if it is damaged, or was trained with other settings.
    """
    try:
        require_whole(path)
        checkpoint = opened(path)
    except Damaged as problem:
        raise UserError(
            f"{path} is damaged ({problem}). Remove it and run.json beside its folder, then train the run again."
        ) from None
    if SETTINGS in checkpoint:  # imported weights have none
        require_settings(path, checkpoint, settings_of(config, checkpoint[SETTINGS]["latents"]))
    return checkpoint


def load_weights(module: DiffusionModule, path: Path, config: RunConfig) -> None:
    """The EMA weights of a checkpoint into `module`. Raises: UserError, as `checked`, or if they do not fit."""
    checkpoint = checked(path, config)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its config.yaml: {' '.join(str(error).split())}") from None


def _set_aside(path: Path, problem: Damaged) -> None:
    if is_main_process() and path.exists():
        aside = path.with_suffix(".broken")
        say(f"{path} cannot be used ({problem}); set aside as {aside.name}, using the one before.")
        path.rename(aside)


def _pickle_is_whole(path: Path) -> bool:
    """Whether the part that is not tensors is as it was written, so that what it asks for was meant."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            archive.read(name)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return True


def _global(message: str) -> str:
    """What torch's refusal names, such as posix.system."""
    words = message.partition("GLOBAL ")[2].split()
    return words[0] if words else "an object"
