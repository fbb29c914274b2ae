"""GPUs as NVIDIA's data sheets print them, for MFU and for plans."""

from __future__ import annotations

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """Dense Tflops (1e12, a multiply-add is two); where a sheet prints values with sparsity, half of those."""

    name: str  # a part of what the driver calls it
    float32: float  # without tensor cores
    tf32: float
    bfloat16: float
    memory_gb: int


GPUS = {
    "a100": GPU("A100", 19.5, 156.0, 312.0, 80),
    "a100-40gb": GPU("A100", 19.5, 156.0, 312.0, 40),
    "h100": GPU("H100 80GB HBM3", 66.9, 494.7, 989.4, 80),
    "h100-pcie": GPU("H100 PCIe", 51.2, 378.0, 756.0, 80),
    "h200": GPU("H200", 66.9, 494.7, 989.4, 141),
    "l40s": GPU("L40S", 91.6, 183.0, 362.0, 48),
    "l4": GPU("L4", 30.3, 60.0, 121.0, 24),
}


def peak_gflops(device: str, precision: str) -> float | None:
    """1e9 multiply-adds a second of the GPU `device`, in Lightning's `precision`; None if it is not known here."""
    import torch

    for gpu in GPUS.values():
        if re.search(rf"\b{gpu.name}\b", device):
            if precision == "bf16-mixed":
                return 1000 * gpu.bfloat16 / 2
            return 1000 * (gpu.float32 if torch.get_float32_matmul_precision() == "highest" else gpu.tf32) / 2
    return None
