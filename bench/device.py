"""Where it is computed: one GPU, or the CPU."""

from __future__ import annotations

import torch

from bench.errors import UserError


def device_of(accelerator: str) -> torch.device:
    """The device of `trainer.accelerator`: auto and gpu take a GPU where there is one."""
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def require_device(accelerator: str) -> None:
    """Raises: UserError if a GPU is asked for where there is none."""
    if accelerator == "gpu" and not torch.accelerator.is_available():
        raise UserError("trainer.accelerator is gpu, but torch sees no GPU here. Give auto, which takes what is there.")


def device_name(accelerator: str = "auto") -> str:
    """Its kind, for the record: 'cpu (2 threads)' or the GPU's name."""
    if device_of(accelerator).type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"
