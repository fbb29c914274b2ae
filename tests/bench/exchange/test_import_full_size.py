"""Files of the released sizes: names and shapes as published, memory bounded by the file.

They hold bfloat16, where the released ones hold float32: half the bytes, 1.3 and 1 GB, written twice in each test into
a folder that is removed at its end.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.registry import ROOT

Table = dict[str, tuple[int, ...]]


def layer(name: str, out: int, *rest: int, bias: bool = True) -> Table:
    return {f"{name}.weight": (out, *rest)} | ({f"{name}.bias": (out,)} if bias else {})


def dit_xl2() -> Table:
    """The 292 tensors of DiT-XL-2-256x256.pt."""
    d = 1152
    table: Table = {"pos_embed": (1, 256, d), **layer("x_embedder.proj", d, 4, 2, 2)}
    table |= layer("t_embedder.mlp.0", d, 256) | layer("t_embedder.mlp.2", d, d)
    table |= layer("y_embedder.embedding_table", 1001, d, bias=False)
    for i in range(28):
        table |= layer(f"blocks.{i}.attn.qkv", 3 * d, d) | layer(f"blocks.{i}.attn.proj", d, d)
        table |= layer(f"blocks.{i}.mlp.fc1", 4 * d, d) | layer(f"blocks.{i}.mlp.fc2", d, 4 * d)
        table |= layer(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    return table | layer("final_layer.linear", 32, d) | layer("final_layer.adaLN_modulation.1", 2 * d, d)


def uvit_h2() -> Table:
    """The 355 tensors of imagenet256_uvit_huge.pth."""
    d = 1152
    table: Table = {"pos_embed": (1, 258, d), **layer("patch_embed.proj", d, 4, 2, 2)}
    table |= layer("label_emb", 1001, d, bias=False)
    inner, outer = [f"in_blocks.{j}" for j in range(14)], [f"out_blocks.{j}" for j in range(14)]
    for block in (*inner, "mid_block", *outer):
        table |= layer(f"{block}.norm1", d) | layer(f"{block}.norm2", d)
        table |= layer(f"{block}.attn.qkv", 3 * d, d, bias=False) | layer(f"{block}.attn.proj", d, d)
        table |= layer(f"{block}.mlp.fc1", 4 * d, d) | layer(f"{block}.mlp.fc2", d, 4 * d)
    for block in outer:
        table |= layer(f"{block}.skip_linear", d, 2 * d)
    return table | layer("norm", d) | layer("decoder_pred", 16, d)


def sincos(width: int, side: int) -> torch.Tensor:
    """DiT's positions, token by token."""
    omega = [10000 ** (-i / (width // 4)) for i in range(width // 4)]
    angles = torch.arange(side, dtype=torch.float64)[:, None] * torch.tensor(omega, dtype=torch.float64)
    half = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width/2)
    return torch.stack([torch.cat([half[c], half[r]]) for r in range(side) for c in range(side)])[None].float()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


RUN = """
import bench.exchange.imported  # torch and its friends take 0.85 GB of the memory
from bench.cli import main

def peak():
    return [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]

before = peak()
main()
print(before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "file, count, table, words, images",
    [
        ("DiT-XL-2-256x256.pt", 292, dit_xl2(), ["--model", "dit", "--size", "XL/2"], "1,792,000,000 images"),
        ("imagenet256_uvit_huge.pth", 355, uvit_h2(), ["--model", "uvit", "--size", "H/2"], "512,000,000 images"),
    ],
    ids=["DiT-XL/2", "U-ViT-H/2"],
)
def test_released_sizes_are_imported_bit_equal_in_bounded_memory(folder, file, count, table, words, images):
    noise = torch.randn(6 * 1152 * 1152, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = {name: noise[: torch.Size(shape).numel()].view(shape).clone() for name, shape in table.items()}
    if words[1] == "dit":
        state["pos_embed"] = sincos(1152, 16).bfloat16()
    assert len(state) == count
    torch.save(state, folder / file)
    del state  # the memory is for the command
    command = ["import", str(folder / file), *words, f"paths.runs={folder / 'runs'}"]
    done = subprocess.run([sys.executable, "-c", RUN, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "official weights" in done.stdout and images in done.stdout and "as published" in done.stdout
    before, peak = (1024 * int(kilobytes) for kilobytes in done.stdout.split()[-2:])
    assert peak - before < (folder / file).stat().st_size + 1e8  # its pages, once, and nothing beside
    (checkpoint,) = folder.glob("runs/*/checkpoints/*.ckpt")
    given = torch.load(folder / file, weights_only=True, mmap=True)
    found = torch.load(checkpoint, weights_only=True, mmap=True)["state_dict"]
    assert found.keys() == {f"backbone.{name}" for name in table}
    assert all(torch.equal(found[f"backbone.{name}"], value) for name, value in given.items())
