"""Golden arrays and the recipe that rebuilds the weights behind them.

`tests/golden/<name>.npz` holds inputs and expected values, never weights. A weight is a function of a salt and its
state-dict key: SHA-256 of "salt:key" keys a Philox stream, whose uniform numbers are scaled by the tensor's shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    """Every array of tests/golden/<name>.npz by its name."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def fill(module: nn.Module, salt: str, exempt: Collection[str] = ()) -> None:
    """Overwrite every state-dict entry of `module`, except the keys in `exempt`, with the golden weights.

    salt is "open-1/" + the golden file's name. DiT's `pos_embed` is exempt: it keeps its sin-cos values.
    """
    for key, tensor in module.state_dict().items():
        if key not in exempt:
            tensor.copy_(weight(salt, key, tuple(tensor.shape)))  # the state dict shares storage with the module


def weight(salt: str, key: str, shape: Sequence[int]) -> Tensor:
    """The golden weight of this salt, state-dict key and shape -> float32."""
    v = uniform(salt, key, shape)
    if len(shape) == 1:
        v = 1 + 0.2 * v if key.endswith("weight") else 0.2 * v
    elif not ("embedding_table" in key or "label_emb" in key or key == "pos_embed"):
        v = v * math.sqrt(3 / math.prod(shape[1:]))
    return torch.from_numpy(v.astype(np.float32))


def draw(tag: str, j: int, shape: Sequence[int]) -> Tensor:
    """Noise draw number `j` (from 0, in call order) of the golden sampler run `tag` -> float32, variance 1."""
    return torch.from_numpy((math.sqrt(3) * uniform("open-1", f"data:{tag}.noise{j}", shape)).astype(np.float32))


def uniform(salt: str, key: str, shape: Sequence[int]) -> np.ndarray:
    """Uniform numbers in [-1, 1), float64, from the stream of "salt:key"."""
    seed = int.from_bytes(hashlib.sha256(f"{salt}:{key}".encode()).digest()[:8], "little")
    raw = np.random.Philox(key=seed).random_raw(math.prod(shape))  # 64-bit words
    return (2 * ((raw >> np.uint64(11)) * 2.0**-53) - 1).reshape(shape)


def outputs(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A dict that the next forward fills with each module's output, under the name given to it here."""
    seen: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name: out}))
    return seen


def gradient_norms(module: nn.Module, out: Tensor, weights: np.ndarray) -> dict[str, float]:
    """L2 norm (float64) of the gradient of mean(out * weights), by parameter name in sorted order."""
    (out * torch.from_numpy(weights)).mean().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: grads[name].double().norm().item() for name in sorted(grads)}
