"""Are these the weights of that architecture, size and resolution? If not: what are they instead?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import registry
from bench.config import RunConfig
from bench.errors import UserError
from models.base import BackboneSpec
from models.pretrained import differences

Shapes = dict[str, tuple[int, ...]]


def require_architecture(tensors: Mapping[str, Tensor], file: Path, name: str) -> None:
    """Raises: UserError if the names of the tensors are rather those of another architecture than `name`."""
    found = {key.partition(".")[0] for key in tensors}
    shared = {}
    for other in registry.names("models"):
        architecture = registry.architecture(other)
        spec = BackboneSpec(learn_sigma=architecture.module.paper_recipe.process.learn_sigma)
        known = {key.partition(".")[0] for key in _shapes(architecture, _shallow(architecture.config()), spec)}
        shared[other] = len(found & known) / len(found | known)
    best = max(shared, key=lambda other: shared[other])
    if shared[best] > shared[name]:
        title, asked = registry.architecture(best).title, registry.architecture(name).title
        raise UserError(f"{file} holds weights of {title}, not of {asked}. Give --model {best} and its --size.")


def require_fit(tensors: Mapping[str, Tensor], file: Path, config: RunConfig, spec: BackboneSpec) -> dict[str, Tensor]:
    """The tensors in the order of the run's backbone.

    Raises: UserError naming those that are missing, unexpected, of another shape, or no longer the fixed table they
    should be, and the size, resolution or classes that would fit.
    """
    architecture = registry.architecture(config.use.model)
    needed = _shapes(architecture, config.model, spec)
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if different := differences(given, needed):
        side = registry.dataset(config.use.data).side(config.data)
        raise UserError(
            " ".join(
                [
                    f"{file} does not hold {architecture.title}-{config.model.size} at resolution {side}: {different}.",
                    *_hints(given, config, spec, side),
                ]
            )
        )
    _require_tables(tensors, file, config, spec)
    return {name: tensors[name] for name in needed}


def _shallow(model: Any) -> Any:
    """The same network with one block: quick to build, and all that is outside of blocks is as it was."""
    return replace(model, depth=1)


def _shapes(architecture: Any, model: Any, spec: BackboneSpec) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in architecture.backbone(model, spec).state_dict().items()}


def _hints(given: Shapes, config: RunConfig, spec: BackboneSpec, side: int) -> list[str]:
    """Sentences that say which settings the shapes fit."""
    architecture = registry.architecture(config.use.model)
    for size in dict.fromkeys([config.model.size, *architecture.sizes]):
        model = config.model if size == config.model.size else architecture.config(size=size)
        try:
            needed, short = _shapes(architecture, model, spec), _shallow(model)
            larger = _shapes(architecture, short, replace(spec, latent_size=2 * spec.latent_size))
            richer = _shapes(architecture, short, replace(spec, num_classes=spec.num_classes + 1))
        except ValueError:  # its patches do not divide the latents
            continue
        positions = [name for name, shape in larger.items() if shape != needed[name]]
        labels = [name for name in richer if richer[name] != needed.get(name) and name not in positions]
        rest = {name: shape for name, shape in needed.items() if name not in (*positions, *labels)}
        if rest.items() <= given.items():
            break
    else:
        return []
    hints = [f"It fits --size {size}."] if size != config.model.size else []
    for name in positions:
        found = _latent_side(given.get(name), needed[name], larger[name], spec.latent_size)
        if found not in (None, spec.latent_size):
            resolution = side // spec.latent_size * found
            hints.append(
                f"It has positions for {found}x{found} latents, that is resolution {resolution}: give --resolution "
                f"{resolution}."
            )
    for name in given.keys() & labels:
        rows = given[name][0]
        if rows == spec.num_classes and spec.null_label:
            hints.append("It has no row for 'no class': give recipe.label_dropout=0.")
        elif rows != spec.label_rows:
            hints.append(
                f"It has labels for {rows - spec.null_label} classes{' and none' if spec.null_label else ''}, "
                f"{config.use.data} has {spec.num_classes}: give --data, and data.classes or data.root, to match."
            )
    return hints


def _latent_side(
    given: tuple[int, ...] | None, needed: tuple[int, ...], larger: tuple[int, ...], side: int
) -> int | None:
    """Side of the latents behind a table of length a + b side^2; `needed` is that of `side`, `larger` of twice it."""
    axis = next(i for i, (a, b) in enumerate(zip(needed, larger, strict=True)) if a != b)
    if given is None or len(given) != len(needed):
        return None
    per_pixel = (larger[axis] - needed[axis]) / (3 * side**2)
    pixels = side**2 + (given[axis] - needed[axis]) / per_pixel
    root = math.isqrt(max(0, round(pixels)))
    return root if root**2 == pixels else None


def _require_tables(tensors: Mapping[str, Tensor], file: Path, config: RunConfig, spec: BackboneSpec) -> None:
    """Raises: UserError if a table that is a formula, such as DiT's positions, holds other numbers."""
    architecture = registry.architecture(config.use.model)
    for name, table in architecture.backbone(_shallow(config.model), spec).named_parameters():
        if table.requires_grad:
            continue
        error = (tensors[name].float() - table).abs().max().item()
        if not error <= 4 * torch.finfo(tensors[name].dtype).eps:  # values lie in [-1, 1]
            raise UserError(
                f"{file}: {name} is not the table of {architecture.title}, which is a formula; they differ by "
                f"{error:.3g}. These weights were trained with other positions."
            )
