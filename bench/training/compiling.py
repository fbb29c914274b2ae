"""torch.compile for the backbone of a training."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.console import say
from bench.errors import UserError
from models.base import DiffusionModule


def compile_backbone(module: DiffusionModule, device: str) -> None:
    """Compile the backbone at its first batch, in place: names of weights, and copies for EMA, stay as they are.

    Raises: UserError if nothing can be compiled for `device` here, which is tried first, on a line of code.
    """
    try:
        torch.compile(_line)(torch.zeros(8, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(line for line in str(error).splitlines() if line)
        raise UserError(
            f"trainer.compile is true, but nothing can be compiled here ({reason}). Install a C++ compiler such as g++ "
            "(on a GPU, Triton), or leave it at false: the numbers are the same."
        ) from None
    say("  compiling the backbone at the first step, which takes a minute or more")
    module.backbone.compile()


def _line(x: Tensor) -> Tensor:
    return x.sin() + 1
