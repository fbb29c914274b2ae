"""The command line with NaN in the latents at one position of the data: `NAN_AT=53 python tests/planted.py train ...`.

Lightning starts the other processes by the same words in the same environment, so all of them have it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.cli import main
from datamodules.base import Batch, LatentStream


def plant(position: int) -> None:
    whole = LatentStream.batch

    def batch(self: LatentStream, positions) -> Batch:
        found = whole(self, positions)
        found.latents[found.positions == position] = torch.nan
        return found

    LatentStream.batch = batch


if __name__ == "__main__":
    plant(int(os.environ["NAN_AT"]))
    main()
