"""A grid of chosen classes, for people who want to look: `sample --classes`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bench.config import RunConfig
from bench.console import is_main_process, progress, say
from bench.device import device_of
from bench.errors import UserError
from bench.evaluate import draw, load_decoder, trained_module
from bench.files import atomic_write
from bench.scoring.samples import Sampling
from bench.training.plan import plan_training

COUNT = 4  # images of a class
GAP = 2  # white pixels between images


def parse_classes(text: str) -> list[int]:
    """'207,360' -> [207, 360]. Raises: UserError if it is no list of numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--classes {text}: give numbers with commas between them, such as 207,360.")
    return [int(part) for part in parts]


def look(config: RunConfig, classes: list[int], count: int, out: Path, step: int | None = None) -> None:
    """Write a PNG with a row of `count` images of each class, by the run's sampler and EMA weights.

    Column c of every row starts from the noise of sample c, so an image depends on (seed, c) and its class alone.
    Raises: UserError if the run has no classes or not these, `out` is no PNG, or something is missing.
    """
    if out.suffix != ".png":
        raise UserError(f"--out {out}: give a name that ends in .png.")
    if count < 1:
        raise UserError(f"--count is {count}; it must be at least 1.")
    plan = plan_training(config)
    if not plan.spec.num_classes:
        raise UserError(f"{config.directory} has no classes to choose from. Leave out --classes.")
    for label in classes:
        if label >= plan.spec.num_classes:
            raise UserError(
                f"--classes: {label} is no class of {config.use.data}; choose from 0 to {plan.spec.num_classes - 1}."
            )
    device = device_of(config.trainer.accelerator)
    module = trained_module(config, plan, plan.budget.steps if step is None else step).to(device).eval()
    autoencoder = load_decoder(config).to(device)
    s, wanted = Sampling.of(config), [(label, column) for label in classes for column in range(count)]
    images: list[Tensor] = []  # (3,H,W) uint8 each
    with progress(total=len(wanted), desc="sampling", unit="image") as bar:
        for start in range(0, len(wanted), s.batch_size):
            labels, columns = zip(*wanted[start : start + s.batch_size], strict=True)
            try:
                images += draw(module, autoencoder, s, columns, torch.tensor(labels)).cpu()
            except ValueError as error:  # guidance without a null label
                raise UserError(str(error)) from None
            bar.update(len(labels))
    if is_main_process():
        with atomic_write(out, "wb") as file:
            grid(images, count).save(file, format="PNG")
    rows = ", ".join(map(str, classes))
    how = f"{s.sampler.name} with {s.sampler.steps} steps, cfg_scale {s.cfg_scale:g}"
    say(f"{out}: from the top {count} images each of class {rows}; {how}, seed {s.seed}")


def grid(images: list[Tensor], columns: int) -> Image.Image:
    """Images (3,H,W) uint8 of one size, row by row, with white between them."""
    _, height, width = images[0].shape
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(images) // columns * (height + GAP) - GAP), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (column * (width + GAP), row * (height + GAP)))
    return sheet
