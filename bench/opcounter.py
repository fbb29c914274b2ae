"""Multiply-adds of every op that a module runs on the meta device.

Convention of the DiT and U-ViT tables: a multiply and its add are one; norms, softmax, activations and elementwise
arithmetic are not counted. An op that is neither in `FORMULAS` nor free is an error, so no cost goes missing unseen.
A complex multiply-add is 4 real ones. A real FFT of length n is 2.5 n log2 n real operations, half of the radix-2
complex FFT's 5 n log2 n (Cooley and Tukey 1965); two operations make one multiply-add: 1.25 n log2 n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.errors import UserError
from models.s4d import S4DKernel

PARTS = ("linear", "attention", "convolution", "ssm_kernel", "fft")


def _product(left: Tensor, right: Tensor) -> float:
    """(.., m, k) @ (.., k, n)."""
    return left.numel() * right.shape[-1] * (4 if left.is_complex() else 1)


def _matmul(args: tuple, out: Tensor) -> float:
    return _product(args[0], args[1])


def _biased_matmul(args: tuple, out: Tensor) -> float:
    return _product(args[1], args[2])


def _convolution(args: tuple, out: Tensor) -> float:
    """weight[0] holds the taps of one output value (in / groups, *kernel); of one input value if transposed."""
    x, weight, transposed = args[0], args[1], args[6]
    return (x if transposed else out).numel() * weight[0].numel()


def _attention(args: tuple, out: Any) -> float:
    """q (B, heads, L, d), k (B, heads, S, d), v (B, heads, S, e): per head L S d for scores and L S e for the sum."""
    query, key, value = args[:3]
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _fft(args: tuple, out: Tensor) -> float:
    """Over the axes args[1]; the real side of a real transform is the longer one."""
    full = args[0] if args[0].numel() > out.numel() else out
    length = math.prod(full.shape[axis] for axis in args[1])
    return full.numel() * math.log2(length) * (2.5 if args[0].is_complex() and out.is_complex() else 1.25)


# aten op -> (part, multiply-adds of (arguments, result)).
FORMULAS: dict[str, tuple[str, Callable[[tuple, Any], float]]] = {
    "mm": ("linear", _matmul),
    "addmm": ("linear", _biased_matmul),
    "bmm": ("attention", _matmul),
    "baddbmm": ("attention", _biased_matmul),
    "convolution": ("convolution", _convolution),
    "_scaled_dot_product_flash_attention": ("attention", _attention),
    "_scaled_dot_product_flash_attention_for_cpu": ("attention", _attention),
    "_scaled_dot_product_efficient_attention": ("attention", _attention),
    "_scaled_dot_product_cudnn_attention": ("attention", _attention),
    "_scaled_dot_product_fused_attention_overrideable": ("attention", _attention),
    "_fft_r2c": ("fft", _fft),
    "_fft_c2r": ("fft", _fft),
    "_fft_c2c": ("fft", _fft),
}
# Not counted by convention, beside every view and every op that torch tags as pointwise: making, copying and moving
# tensors; norms and softmax; sums; questions of type.
FREE_OPS = """
    arange complex empty empty_like empty_strided fill_ full full_like linspace new_empty new_zeros ones ones_like polar
    scalar_tensor zeros zeros_like _to_copy _unsafe_view cat constant_pad_nd copy_ embedding flip gather index
    index_select repeat roll stack tril triu bernoulli_
    _safe_softmax _softmax native_group_norm native_layer_norm _fused_rms_norm
    amax cumsum mean sum var_mean promote_types
"""
FREE = frozenset(FREE_OPS.split())


class OpCounter(TorchDispatchMode):
    """Adds up, by part, the multiply-adds of the ops that run inside it.

    Products are "ssm_kernel" inside an `S4DKernel`, "linear" where a side is a parameter or was made of parameters
    alone, else as `FORMULAS` says.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.counts = dict.fromkeys(PARTS, 0.0)
        self.weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in module.parameters()}
        self.kernels_entered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        name = func.overloadpacket.__name__ if func.namespace == "aten" else func.name()
        of_weights = [self._is_weight(arg) for arg in tree_leaves(args) if isinstance(arg, Tensor)]
        if name in FORMULAS:
            part, multiply_adds = FORMULAS[name]
            if part in ("linear", "attention"):
                part = "ssm_kernel" if self.kernels_entered else "linear" if any(of_weights) else part
            self.counts[part] += multiply_adds(args, out)
        elif torch.Tag.pointwise not in func.tags and name not in FREE:
            raise UserError(
                f"The cost of the op '{name}' is not known. In bench/opcounter.py, give it a formula in FORMULAS, or "
                f"name it in FREE_OPS if it does no multiply-adds that the DiT and U-ViT tables count."
            )
        if of_weights and all(of_weights) and isinstance(out, Tensor):
            self.weights.add(StorageWeakRef(out.untyped_storage()))
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self.weights

    def enter_kernel(self, module: nn.Module, args: Any) -> None:
        self.kernels_entered += 1

    def leave_kernel(self, module: nn.Module, args: Any, output: Any) -> None:
        self.kernels_entered -= 1


def count_ops(module: nn.Module, *inputs: Any) -> dict[str, float]:
    """Multiply-adds of `module(*inputs)` by part. Both lie on the meta device: fused attention on a CPU shows no ops.

    Raises: UserError at an op of unknown cost, naming it.
    """
    counter = OpCounter(module)
    hooks = []
    for child in module.modules():
        if isinstance(child, S4DKernel):
            hooks += [child.register_forward_pre_hook(counter.enter_kernel)]
            hooks += [child.register_forward_hook(counter.leave_kernel)]
    try:
        with torch.no_grad(), counter:
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.counts
