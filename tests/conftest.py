"""Lies at the root of the tests so that pytest puts this folder on sys.path (`from golden_recipe import ...`)."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # golden values were made on one thread; sums keep one order
