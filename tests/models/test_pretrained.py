"""Files of weights: every form people have gives the same tensors, what is none is told, and no code in a file runs.

DiT is held against diffusers' own network with the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from golden_recipe import fill
from safetensors.torch import save_file
from torch.testing import assert_close

from models.base import BackboneSpec
from models.diffusers_dit import from_diffusers, scheduler_card, to_diffusers, transformer_card
from models.dit import DiT, DiTConfig
from models.pretrained import STATE_DICT, TRAINER, differences, read_weights
from models.recipe import ProcessConfig
from models.schedules import cosine_betas, linear_betas

CONFIG = DiTConfig(depth=3, width=48, heads=4, patch_size=2)
SPEC = BackboneSpec(latent_size=8, num_classes=10, learn_sigma=True)


@pytest.fixture(scope="module")
def dit() -> DiT:
    net = DiT(CONFIG, SPEC).eval()
    fill(net, "pretrained", exempt=("pos_embed",))
    return net


@pytest.fixture
def state(dit) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in dit.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- forms ----------------------------------------------------------------------------------------------------------


def raw(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in state.items()}


@pytest.mark.parametrize(
    "name, stored, form, taken",
    [
        ("DiT-XL-2-256x256.pt", lambda s: s, STATE_DICT, "all of it"),
        (
            "0400000.pt",
            lambda s: {"model": raw(s), "ema": s, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)},
            TRAINER,
            "ema",
        ),
        ("ddp.pt", lambda s: {f"module.{name}": value for name, value in s.items()}, STATE_DICT, "all of it"),
        (
            "step-00000500.ckpt",
            lambda s: {
                "state_dict": {f"backbone.{name}": value for name, value in s.items()},
                "current_model_state": {f"backbone.{name}": value for name, value in raw(s).items()},
            },
            TRAINER,
            "state_dict",
        ),
        ("500.ckpt/nnet_ema.pth", lambda s: s, TRAINER, "nnet_ema.pth"),
    ],
)
def test_ema_weights_are_taken_from_every_form(tmp_path, state, name, stored, form, taken):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save(stored(state), path)
    if name.endswith("nnet_ema.pth"):
        torch.save(raw(state), path.with_name("nnet.pth"))
        path = path.parent
    weights = read_weights(path)
    assert same(weights.tensors, state)
    assert (weights.form, weights.taken) == (form, taken)


def test_safetensors_and_torchs_old_format_are_read(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "a.safetensors").tensors, state)
    assert same(read_weights(tmp_path / "a.pt").tensors, state)


class Code:
    """What a pickle with code holds: it would make a folder when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path / "code ran"),)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_file(kind: str, path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A file that is no weights, by what is the matter with it."""
    file = path / "weights.pt"
    if kind == "lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2700611775\n")
    elif kind == "page":
        file.write_text("\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>")
    elif kind == "code":
        torch.save(state | {"extra": Code(path)}, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Code(path), protocol=4))
    elif kind == "old cut":
        torch.save(state, file, _use_new_zipfile_serialization=False)
        cut(file)
    elif kind == "safetensors cut":
        file = path / "weights.safetensors"
        save_file(state, file)
        cut(file)
    elif kind == "raw folder":
        torch.save(state, path / "nnet.pth")
        return path
    elif kind in ("folder", "none"):
        return path if kind == "folder" else path / "none.pt"
    elif kind in ("text", "markdown"):
        file.write_text("hello" if kind == "text" else "# IsoDiff\n")
    elif kind == "empty":
        file.touch()
    else:
        stored = {
            "raw": {"model": state, "opt": {}, "args": argparse.Namespace(lr=1e-4)},
            "list": [torch.zeros(2)],
            "no tensors": {"a": 1, "b": 2},
            "integers": {"a": torch.zeros(2, dtype=torch.int8)},
            "cut": state,
        }
        torch.save(stored[kind], file)
        if kind == "cut":
            cut(file)
    return file


@pytest.mark.parametrize(
    "kind, words",
    [
        ("none", "There is no file or folder"),
        ("folder", "holds no weights that are known. Expected is one of model.safetensors, nnet_ema.pth"),
        ("raw", r"raw weights only \(model, opt, args\).* has 'ema'"),
        ("raw folder", r"raw weights only \(nnet.pth\).* nnet_ema.pth"),
        ("lfs", "is a Git LFS pointer.* git lfs pull"),
        ("page", "is a web page"),
        ("empty", "cut off after 0 bytes"),
        ("cut", "is cut off after [0-9,]+ bytes. Fetch it again"),
        ("old cut", "damaged, cut off, or another kind of file"),
        ("safetensors cut", "incomplete metadata.*damaged, cut off"),
        ("code", r"holds more than tensors \(posix.mkdir\), which could run code and is not loaded"),
        ("pickle", "is a pickle, but not one of torch's; it could run code and is not loaded"),
        ("text", "cannot be read as weights: damaged, cut off, or another kind of file"),
        ("markdown", "holds no weights: it is a file neither of torch nor of safetensors"),
        ("list", "holds a list, not named tensors"),
        ("no tensors", "holds no named tensors, but a, b"),
        ("integers", "a is torch.int8"),
    ],
)
def test_what_is_no_weights_is_told_and_never_run(tmp_path, state, kind, words):
    with pytest.raises(ValueError, match=words):
        read_weights(wrong_file(kind, tmp_path, state))
    assert not (tmp_path / "code ran").exists()


def test_trainers_arguments_are_the_only_objects_let_in(tmp_path, state):
    torch.save({"ema": state, "args": argparse.Namespace(where=Code(tmp_path))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="could run code"):
        read_weights(tmp_path / "a.pt")
    assert not (tmp_path / "code ran").exists()


def test_differences_name_each_kind_and_count_what_is_too_many():
    needed = dict.fromkeys("abcdefgh", (2, 2))
    assert differences(needed, needed) == ""
    assert differences({"a": (2, 3), "x": (1,)}, needed) == (
        "7 missing (b, c, d, e, and 3 more), 1 unexpected (x), 1 of another shape (a is (2, 3), not (2, 2))"
    )


# --- diffusers ------------------------------------------------------------------------------------------------------


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 7, 10])  # 10 is "no class"


def theirs(tensors: dict[str, torch.Tensor]) -> DiTTransformer2DModel:
    net = DiTTransformer2DModel.from_config(transformer_card(CONFIG, SPEC)).eval()
    net.load_state_dict(tensors)
    return net


@torch.no_grad()
def test_diffusers_network_computes_the_same_from_our_tensors(dit, state):
    net, (x, y) = theirs(to_diffusers(state, CONFIG)), inputs()
    zero, t = torch.zeros(3, dtype=torch.long), torch.tensor([1, 250, 999])
    # Every frequency gives the same sinusoid of 0. Other timesteps need DiT's frequencies, 10000^(-i/128).
    assert_close(net(x, zero, y).sample, dit(x, zero, y), atol=1e-5, rtol=1e-4)
    assert (net(x, t, y).sample - dit(x, t, y)).abs().max() > 1e-2
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert_close(net(x, t, y).sample, dit(x, t, y), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_network_of_diffusers_is_read(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DiTTransformer2DModel.from_config(transformer_card(CONFIG, SPEC) | {"norm_eps": 1e-5}).eval()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        first = net.transformer_blocks[0].norm1.emb.state_dict()
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    net.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    ours = DiT(CONFIG, SPEC).eval()
    ours.load_state_dict(from_diffusers(weights.tensors, weights.file, CONFIG))
    (x, y), zero = inputs(), torch.zeros(3, dtype=torch.long)
    assert_close(ours(x, zero, y), net(x, zero, y).sample, atol=1e-4, rtol=1e-4)


def folder(path: Path, state: dict[str, torch.Tensor], **changes) -> Path:
    """A transformer's folder of diffusers with these tensors."""
    path.mkdir(exist_ok=True)
    save_file(to_diffusers(state, CONFIG), path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps(transformer_card(CONFIG, SPEC) | changes))
    return path / "diffusion_pytorch_model.safetensors"


def test_there_and_back_is_bit_equal(tmp_path, state):
    folder(tmp_path / "transformer", state)
    for path in (tmp_path, tmp_path / "transformer"):  # the pipeline, and its transformer
        weights = read_weights(path)
        assert same(from_diffusers(weights.tensors, weights.file, CONFIG), state)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_attention_heads": 2}, "num_attention_heads is 2; DiT-XL/2 has 4"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'; DiT-XL/2 has 'gelu-approximate'"),
        ({"num_layers": None}, "no configuration of a DiTTransformer2DModel"),
    ],
)
def test_another_network_of_diffusers_is_refused(tmp_path, state, changes, words):
    file = folder(tmp_path, state, **changes)
    with pytest.raises(ValueError, match=words):
        from_diffusers(read_weights(file).tensors, file, CONFIG)


def test_blocks_with_embedders_of_their_own_are_refused(tmp_path, state):
    file = folder(tmp_path, state)
    tensors = read_weights(file).tensors
    key = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(ValueError, match=r"transformer_blocks.2.*differs from that of the first block"):
        from_diffusers(tensors | {key: tensors[key] + 1}, file, CONFIG)
    (file.parent / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json beside it"):
        from_diffusers(tensors, file, CONFIG)


@pytest.mark.parametrize("betas, ours", [("linear", linear_betas), ("cosine", cosine_betas)])
def test_the_scheduler_has_the_noise_of_the_process(betas, ours):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(scheduler_card(ProcessConfig(betas=betas)))
    assert_close(scheduler.alphas_cumprod.double(), torch.cumprod(1 - ours(1000), 0), atol=1e-6, rtol=2e-4)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: transformer_card(CONFIG, BackboneSpec(latent_size=8, num_classes=0)), "has classes.* safetensors"),
        (lambda: transformer_card(DiTConfig(mlp_ratio=2.0), SPEC), "mlp_ratio 4, this run 2.0"),
        (lambda: scheduler_card(ProcessConfig(name="vp")), "is an IDDPM, this run's process is vp"),
    ],
)
def test_what_diffusers_has_no_network_for_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
