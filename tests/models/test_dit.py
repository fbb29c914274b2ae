"""DiT against values made by the published code, the published tables, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from golden_recipe import fill, golden, gradient_norms, outputs
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from models.base import BackboneSpec
from models.dit import DiT, DiTConfig
from models.layers import timestep_features
from models.samplers import guided

GOLDEN = {
    "dit_tiny": (
        DiTConfig(depth=2, width=64, heads=4, patch_size=2),
        BackboneSpec(in_channels=4, latent_size=8, num_classes=10, learn_sigma=True),
    ),
    "dit_tiny_nosigma": (
        DiTConfig(depth=1, width=32, heads=2, patch_size=4, mlp_ratio=2.0),
        BackboneSpec(in_channels=3, latent_size=8, num_classes=5),
    ),
}
SMALL = BackboneSpec(latent_size=8, num_classes=10, learn_sigma=True)

# size -> (parameters in millions, multiply-adds in 1e9 as published in Table 4 of DiT)
# at 32x32x4 latents, 1000 classes and learned variance; frozen positions included
PUBLISHED = {
    "S/2": (32.963, 6.06), "S/4": (32.945, 1.41), "S/8": (33.148, 0.36),
    "B/2": (130.512, 23.01), "B/4": (130.476, 5.56), "B/8": (130.882, 1.42),
    "L/2": (458.103, 80.71), "L/4": (458.054, 19.70), "L/8": (458.595, 5.01),
    "XL/2": (675.130, 118.64), "XL/4": (675.074, 29.05), "XL/8": (675.683, 7.39),
}  # fmt: skip


def golden_net(name: str) -> DiT:
    net = DiT(*GOLDEN[name]).eval()
    fill(net, f"open-1/{name}", exempt=("pos_embed",))
    return net


def close(value: torch.Tensor, expected: np.ndarray) -> None:
    assert_close(value, torch.from_numpy(expected), atol=2e-5, rtol=1e-5)


def inputs(arrays: dict[str, np.ndarray], prefix: str = "") -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(arrays[prefix + key]) for key in ("x", "t", "y"))


def meta(size: str, spec: BackboneSpec) -> DiT:
    with torch.device("meta"):
        return DiT(DiTConfig(size=size), spec)


@pytest.mark.parametrize("name", GOLDEN)
def test_output_and_every_intermediate_match_the_published_code(name):
    net, arrays = golden_net(name), golden(name)
    blocks = {f"block{i}": block for i, block in enumerate(net.blocks)}
    named = {"patch_tokens": net.x_embedder, "t_emb": net.t_embedder, "y_emb": net.y_embedder}
    seen = outputs({**named, **blocks, "final_tokens": net.final_layer})
    close(net(*inputs(arrays)), arrays["out"])
    close(net.pos_embed.detach(), arrays["pos_embed"])
    for key, value in seen.items():
        close(value, arrays[key])


@pytest.mark.parametrize("name", GOLDEN)
def test_the_sinusoid_matches_the_published_code_for_real_timesteps_too(name):
    arrays = golden(name)
    t = torch.cat([torch.from_numpy(arrays["t"]), torch.tensor([0.5, 123.25])])
    close(timestep_features(t, 256), arrays["t_sinusoid"])


@pytest.mark.parametrize("name", GOLDEN)
def test_gradients_match_the_published_code(name):
    net, arrays = golden_net(name), golden(name)
    norms = gradient_norms(net, net(*inputs(arrays)), arrays["grad_weight"])
    assert list(norms) == arrays["grad_keys"].tolist()  # pos_embed gets none
    np.testing.assert_allclose(list(norms.values()), arrays["grad_norms"], rtol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_state_dict_has_the_published_keys_and_shapes_in_order(name):
    state, arrays = DiT(*GOLDEN[name]).state_dict(), golden(name)
    assert list(state) == arrays["param_keys"].tolist()
    assert [str(tuple(value.shape)) for value in state.values()] == arrays["param_shapes"].tolist()


@pytest.mark.parametrize("name", GOLDEN)
def test_guidance_on_three_channels_matches_the_published_code(name):
    net, arrays = golden_net(name), golden(name)
    x, t, y = (value[:2] for value in inputs(arrays, "cfg_"))  # the second half repeats x with the null label
    denoiser = guided(net, y, cfg_scale=float(arrays["cfg_scale"]), cfg_channels="3")
    close(denoiser(x, t), arrays["cfg_out"][:2])


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_of_the_published_sizes(size):
    net = meta(size, BackboneSpec(learn_sigma=True))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == PUBLISHED[size][0]


@pytest.mark.parametrize("size", ["S/8", "B/4", "XL/2"])
def test_multiply_adds_of_the_published_sizes(size):
    net = meta(size, BackboneSpec(learn_sigma=True))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    # The counter takes 2 per multiply-add and no norms; the paper prints two decimals. Attention is 3.6 % of XL/2.
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[size][1], rel=1e-3, abs=0.0055)


def test_xl2_has_the_292_tensors_of_the_released_weights_and_512_changes_the_positions_alone():
    at_256, at_512 = (meta("XL/2", BackboneSpec(latent_size=n, learn_sigma=True)).state_dict() for n in (32, 64))
    assert len(at_256) == 292
    assert [key for key in at_256 if at_256[key].shape != at_512[key].shape] == ["pos_embed"]
    assert at_512["pos_embed"].shape == (1, 1024, 1152)


def test_output_is_exactly_zero_at_initialisation():
    net = DiT(DiTConfig(size="T/2", width=128, heads=4), SMALL)
    assert not net(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 10])).any()


def test_initialisation_of_embeddings_and_linears():
    torch.manual_seed(0)
    net = DiT(DiTConfig(size="T/2", width=128, heads=4), SMALL)
    for table in (net.y_embedder.embedding_table, net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    qkv, patch = net.blocks[0].attn.qkv.weight, net.x_embedder.proj.weight  # Xavier: +-sqrt(6 / (fan in + fan out))
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / (128 + 384)), rel=1e-3)
    assert patch.abs().max().item() == pytest.approx(math.sqrt(6 / (16 + 128)), rel=1e-2)
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_unconditional_equals_a_label_embedding_of_zero():
    config, _ = GOLDEN["dit_tiny"]
    net, arrays = golden_net("dit_tiny"), golden("dit_tiny")
    free = DiT(config, BackboneSpec(latent_size=8, num_classes=0, learn_sigma=True))
    free.load_state_dict({key: value for key, value in net.state_dict().items() if "y_embedder" not in key})
    net.y_embedder.embedding_table.weight.data.zero_()
    x, t, y = inputs(arrays)
    assert_close(free(x, t, None), net(x, t, y))


def test_without_null_label_the_table_has_one_row_per_class():
    net = DiT(DiTConfig(size="T/2", width=128, heads=4), BackboneSpec(latent_size=8, num_classes=10, null_label=False))
    assert net.y_embedder.embedding_table.weight.shape == (10, 128)


def test_training_mode_changes_nothing():
    net, arrays = golden_net("dit_tiny"), golden("dit_tiny")
    assert_close(net.train()(*inputs(arrays)), net.eval()(*inputs(arrays)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_the_timestep_stays_float32_under_bfloat16_autocast(dtype):
    net = golden_net("dit_tiny")
    seen = []
    net.t_embedder.mlp[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x, t = torch.zeros(2, 4, 8, 8), torch.tensor([936, 937], dtype=dtype)  # equal in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, torch.tensor([1, 1]))
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = torch.tensor([[936.0], [937.0]], dtype=torch.float64) * frequencies
    assert_close(seen[0].double(), torch.cat([angles.cos(), angles.sin()], dim=1), atol=1e-3, rtol=0)
    assert not torch.equal(out[0], out[1])


def test_a_set_part_overrides_the_named_size():
    assert DiTConfig(size="B/4", depth=3).parts == (3, 768, 12, 4)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: DiTConfig(size="B/3"), r"model.size 'B/3' is not a DiT size. Choose one of S/2, .*XL/8"),
        (lambda: DiTConfig(width=100, heads=3), r"model.width is 100; .* multiple of 4 and of model.heads \(3\)"),
        (lambda: DiTConfig(depth=0), r"model.depth is 0; it must be above 0"),
        (lambda: DiTConfig(width=-4), r"model.width is -4; it must be above 0"),
        (lambda: DiTConfig(heads=0), r"model.heads is 0; it must be above 0"),
        (lambda: DiTConfig(patch_size=0), r"model.patch_size is 0; it must be above 0"),
        (lambda: DiTConfig(mlp_ratio=-1), r"model.mlp_ratio is -1; it must be above 0"),
        (lambda: DiT(DiTConfig(size="S/8"), BackboneSpec(latent_size=28)), r"latent size of 28 .* patches of 8"),
    ],
)
def test_wrong_configurations_say_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=words):
        make()
