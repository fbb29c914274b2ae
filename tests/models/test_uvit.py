"""U-ViT against values made by the published code, the published tables, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from golden_recipe import fill, golden, gradient_norms, outputs
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from models.base import BackboneSpec
from models.samplers import guided
from models.uvit import UViT, UViTConfig, UViTModule

GOLDEN = {
    "uvit_cond": (
        UViTConfig(depth=5, width=64, heads=4, patch_size=2),
        BackboneSpec(in_channels=4, latent_size=8, num_classes=10),
    ),
    "uvit_uncond_mlptime": (
        UViTConfig(depth=4, width=48, heads=3, patch_size=2, mlp_time_embed=True),
        BackboneSpec(in_channels=3, latent_size=8, num_classes=0),
    ),
    "uvit_noconv_noskip": (
        UViTConfig(depth=3, width=32, heads=2, patch_size=4, conv=False, skip=False, qkv_bias=True),
        BackboneSpec(in_channels=4, latent_size=8, num_classes=5),
    ),
}
CONDITIONAL = ["uvit_cond", "uvit_noconv_noskip"]
TINY = UViTConfig(size="T/2", width=128, heads=4)
SMALL = BackboneSpec(latent_size=8, num_classes=10)

# (size, ends, parameters in millions)
PUBLISHED = [
    ("S/2", BackboneSpec(3, 32, num_classes=0), 44.255),  # CIFAR-10
    ("S/4", BackboneSpec(3, 64, num_classes=0), 44.292),  # CelebA
    ("M/4", BackboneSpec(3, 64, null_label=False), 130.940),  # ImageNet 64x64
    ("L/4", BackboneSpec(3, 64, null_label=False), 286.828),
    ("L/2", BackboneSpec(4, 32), 286.763),  # ImageNet 256
    ("H/2", BackboneSpec(4, 32), 500.832),
    ("L/4", BackboneSpec(4, 64), 286.862),  # ImageNet 512
    ("H/4", BackboneSpec(4, 64), 500.943),
]


def golden_net(name: str) -> UViT:
    net = UViT(*GOLDEN[name]).eval()
    fill(net, f"open-1/{name}")
    return net


def close(value: torch.Tensor, expected: np.ndarray) -> None:
    assert_close(value, torch.from_numpy(expected), atol=2e-5, rtol=1e-5)


def inputs(arrays: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x, t = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["t"])
    return x, t, torch.from_numpy(arrays["y"]) if "y" in arrays else None


def meta(size: str, spec: BackboneSpec) -> UViT:
    with torch.device("meta"):
        return UViT(UViTConfig(size=size), spec)


def params(net: UViT) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", GOLDEN)
def test_output_and_every_intermediate_match_the_published_code(name):
    net, arrays = golden_net(name), golden(name)
    seen = outputs(
        {
            "in0": net.in_blocks[0],
            "mid": net.mid_block,
            "out0": net.out_blocks[0],
            "normed": net.norm,
            "decoded": net.decoder_pred,
        }
    )
    net.in_blocks[0].register_forward_pre_hook(lambda _module, args: seen.update(tokens=args[0]))
    close(net(*inputs(arrays)), arrays["out"])
    for key, value in seen.items():
        close(value, arrays[key])


@pytest.mark.parametrize("name", GOLDEN)
def test_gradients_match_the_published_code(name):
    net, arrays = golden_net(name), golden(name)
    norms = gradient_norms(net, net(*inputs(arrays)), arrays["grad_weight"])
    assert list(norms) == arrays["grad_keys"].tolist()
    np.testing.assert_allclose(list(norms.values()), arrays["grad_norms"], rtol=1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_state_dict_has_the_published_keys_and_shapes_in_order(name):
    state, arrays = UViT(*GOLDEN[name]).state_dict(), golden(name)
    assert list(state) == arrays["param_keys"].tolist()
    assert [str(tuple(value.shape)) for value in state.values()] == arrays["param_shapes"].tolist()


@pytest.mark.parametrize("name", CONDITIONAL)
def test_guidance_matches_the_published_code(name):
    net, arrays = golden_net(name), golden(name)
    assert arrays["cfg_null"] == net.spec.num_classes
    x, t, y = inputs(arrays)
    denoiser = guided(net, y, cfg_scale=1 + float(arrays["cfg_scale"]), cfg_channels="all")  # U-ViT's s is one less
    close(denoiser(x, t), arrays["cfg_out"])


@pytest.mark.parametrize("size, spec, params_m", PUBLISHED)
def test_parameter_counts_of_the_published_models(size, spec, params_m):
    assert round(params(meta(size, spec)) / 1e6, 3) == params_m


@pytest.mark.parametrize("size, params_m", [("S/2", 44.693), ("S/2-Deep", 58.346)])
def test_the_text_models_are_these_trunks_plus_77_text_tokens(size, params_m):
    trunk = params(meta(size, BackboneSpec(4, 32, num_classes=0)))
    text = 77 * 512 + (768 * 512 + 512)  # positions, and the linear layer from CLIP's width
    assert round((trunk + text) / 1e6, 3) == params_m


@pytest.mark.parametrize("size, spec, tensors", [("H/2", BackboneSpec(), 355), ("S/2", PUBLISHED[0][1], 164)])
def test_tensor_counts_of_the_released_weights(size, spec, tensors):
    assert len(meta(size, spec).state_dict()) == tensors


def test_initialisation():
    torch.manual_seed(0)
    net = UViT(TINY, SMALL)
    block = net.out_blocks[0]
    for weight in (net.pos_embed, block.attn.qkv.weight, block.skip_linear.weight, net.decoder_pred.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert weight.abs().max() > 3 * 0.02  # the cut lies at +-2, far out
    assert net.label_emb.weight.std().item() == pytest.approx(1, rel=0.05)  # torch's default
    bound = 1 / math.sqrt(4 * 2 * 2)  # torch's default for a convolution: +-1 / sqrt(fan in)
    assert net.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert net.patch_embed.proj.bias.any()
    linears = [module for module in net.modules() if isinstance(module, torch.nn.Linear) and module.bias is not None]
    assert not any(linear.bias.any() for linear in linears)


def test_skips_are_last_in_first_out():
    net = golden_net("uvit_cond")
    seen, merged = outputs({"in0": net.in_blocks[0], "in1": net.in_blocks[1]}), []
    for block in net.out_blocks:
        block.register_forward_pre_hook(lambda _module, args: merged.append(args[0]))
    net(*inputs(golden("uvit_cond")))
    for x, source in zip(merged, ("in1", "in0"), strict=True):
        assert_close(x[..., 64:], seen[source], rtol=0, atol=0)  # [stream | skip], D = 64


@pytest.mark.parametrize("conv", [True, False])
def test_learned_sigma_doubles_the_channels_in_decoder_and_convolution(conv):
    config = UViTConfig(size="T/2", width=128, heads=4, conv=conv)
    state = UViT(config, BackboneSpec(latent_size=8, num_classes=10, learn_sigma=True)).state_dict()
    assert state["decoder_pred.weight"].shape == (2 * 2 * 8, 128)
    assert ("final_layer.weight" in state) == conv
    if conv:
        assert state["final_layer.weight"].shape == (8, 8, 3, 3)


@pytest.mark.parametrize("conv", [True, False])
def test_learned_sigma_leaves_the_noise_channels_as_they_were(conv):
    """With the variance half's weights set aside, channels 0..C-1 are the network without learned variance."""
    config, spec = (
        UViTConfig(size="T/2", width=128, heads=4, conv=conv),
        BackboneSpec(latent_size=8, num_classes=10, learn_sigma=True),
    )
    wide, narrow = UViT(config, spec), UViT(config, SMALL)
    state = wide.state_dict()
    noise = torch.arange(32).view(2, 2, 8)[..., :4].flatten()  # decoder rows (row, column, channel fastest)
    state["decoder_pred.weight"] = state["decoder_pred.weight"][noise]
    state["decoder_pred.bias"] = state["decoder_pred.bias"][noise]
    if conv:
        wide.final_layer.weight.data[:4, 4:] = 0  # noise channels do not read variance channels
        state["final_layer.weight"] = state["final_layer.weight"][:4, :4]
        state["final_layer.bias"] = state["final_layer.bias"][:4]
    narrow.load_state_dict(state)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 800.0]), torch.tensor([0, 10])
    assert_close(wide(x, t, y)[:, :4], narrow(x, t, y))


def test_training_mode_changes_nothing():
    net, arrays = golden_net("uvit_cond"), golden("uvit_cond")
    assert_close(net.train()(*inputs(arrays)), net.eval()(*inputs(arrays)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_the_timestep_stays_float32_under_bfloat16_autocast(dtype):
    net = golden_net("uvit_cond")
    net.pos_embed.data.zero_()  # so that the time token is the sinusoid alone
    seen = []
    net.in_blocks[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0][:, 1]))
    x, t = torch.zeros(2, 4, 8, 8), torch.tensor([936, 937], dtype=dtype)  # equal in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, torch.tensor([1, 1]))
    frequencies = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    angles = torch.tensor([[936.0], [937.0]], dtype=torch.float64) * frequencies
    assert_close(seen[0].double(), torch.cat([angles.cos(), angles.sin()], dim=1), atol=1e-3, rtol=0)
    assert not torch.equal(out[0], out[1])


def test_multiply_adds_of_h2_match_the_published_figure():
    net = meta("H/2", BackboneSpec())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    # The counter takes 2 per multiply-add and no norms. Attention over 258 tokens is 3.3 % of it.
    assert counter.get_total_flops() / 2e9 == pytest.approx(133.25, rel=1e-3)


def test_a_set_part_overrides_the_named_size():
    config = UViTConfig(size="H/2", depth=4, conv=True)
    assert (config.parts, config.conv, UViTConfig(size="H/2").conv) == ((4, 1152, 16, 2), True, False)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: UViTConfig(size="B/2"), r"model.size 'B/2' is not a U-ViT size. Choose one of S/2, .*H/4"),
        (lambda: UViTConfig(width=100, heads=3), r"model.width is 100; .* multiple of model.heads \(3\)"),
        (lambda: UViTConfig(depth=-1), r"model.depth is -1; it must be above 0"),
        (lambda: UViTConfig(width=0), r"model.width is 0; it must be above 0"),
        (lambda: UViTConfig(heads=0), r"model.heads is 0; it must be above 0"),
        (lambda: UViTConfig(patch_size=0), r"model.patch_size is 0; it must be above 0"),
        (lambda: UViTConfig(mlp_ratio=-1), r"model.mlp_ratio is -1; it must be above 0"),
        (lambda: UViT(UViTConfig(size="L/4"), BackboneSpec(latent_size=30)), r"latent size of 30 .* patches of 4"),
    ],
)
def test_wrong_configurations_say_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_weight_decay_reaches_every_parameter():
    module = UViTModule(UViT(TINY, SMALL), UViTModule.recipe_for(TINY))
    (group,) = module.param_groups()
    assert group["weight_decay"] == 0.03
    assert {id(p) for p in group["params"]} == {id(p) for p in module.backbone.parameters()}
