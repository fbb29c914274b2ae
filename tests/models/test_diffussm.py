"""DiffuSSM against a layer computed in float64 by direct sums, the published totals, and closed forms."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from golden_recipe import golden, outputs
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.base import BackboneSpec
from models.diffussm import READINGS, SIZES, DiffuSSM, DiffuSSMBlock, DiffuSSMConfig, DiffuSSMModule, patchify
from models.dit import DiT, DiTConfig
from models.layers import unpatchify
from models.recipe import OptimizerConfig
from models.s4d import S4D

TINY = DiffuSSMConfig(size="T", depth=3, width=32, d_state=8)
SMALL = BackboneSpec(latent_size=8, num_classes=10, learn_sigma=True)
IMAGENET = BackboneSpec(learn_sigma=True)

# reading, changes -> parameters of XL in millions, Gflops of its linear maps at 256 and at 512 (arithmetic on paper:
# D^2 (h (1 + M) + 2 y + 4 g) weights in a layer, y the width of Y / D, beside what conditioning and SSM have).
TABLE = [
    ("R4", {}, 673.09, 276.0, 1103.6),
    ("R4", {"cond": "adaln6"}, 788.7, 276.1, 1103.8),
    ("R4", {"cond": "none"}, 557.5, 275.9, 1103.5),
    ("R4", {"depth": 28}, 650.1, 266.5, 1065.6),
    ("R4", {"patch_size": 2, "M": 1}, 596.1, 118.4, 473.1),
    ("R4", {"patch_size": 2}, 673.2, 69.1, 276.0),
    ("R4", {"M": 1}, 596.1, 473.1, 1892.0),
    ("R4", {"M": 4}, 827.1, 177.5, 709.6),
    ("R1", {}, 634.6, 256.3, 1024.8),
    ("R1b", {}, 673.2, 256.3, 1024.9),
    ("R1c", {}, 750.2, 256.4, 1024.9),
    ("R2", {}, 673.2, 295.7, 1182.5),
    ("R2g", {}, 711.6, 335.1, 1340.0),
    ("R3", {}, 711.6, 295.7, 1182.5),
    ("R3b", {}, 673.1, 295.7, 1182.4),
]


def meta(config: DiffuSSMConfig, spec: BackboneSpec = IMAGENET) -> DiffuSSM:
    with torch.device("meta"):
        return DiffuSSM(config, spec)


def params_m(net: nn.Module) -> float:
    return sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6


def multiply_adds(net: nn.Module, spec: BackboneSpec) -> dict[str, float]:
    """What torch's counter sees in one forward of one image, halved, by op: linear maps are (add)mm, others bmm."""
    x = torch.zeros(1, spec.in_channels, spec.latent_size, spec.latent_size, device="meta")
    labels = torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, torch.zeros(1, device="meta"), labels)
    return {str(op).removeprefix("aten."): n / 2 for op, n in counter.get_flop_counts()["Global"].items()}


def totals(config: DiffuSSMConfig, latent_size: int) -> Tensor:
    """(parameters in millions, Gflops of the linear maps). One and two layers are built; the others cost alike."""
    spec = replace(IMAGENET, latent_size=latent_size)
    one, two = (meta(replace(config, depth=depth), spec) for depth in (1, 2))
    first, second = (
        torch.tensor([params_m(net), sum(n for op, n in multiply_adds(net, spec).items() if op != "bmm") / 1e9])
        for net in (one, two)
    )
    return first + (config.parts[0] - 1) * (second - first)


def randomized(config: DiffuSSMConfig, spec: BackboneSpec = SMALL, seed: int = 0) -> DiffuSSM:
    """A backbone whose zero-initialised weights are not zero, so that everything shows in its output."""
    torch.manual_seed(seed)
    net = DiffuSSM(config, spec)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return net


def inputs(spec: BackboneSpec = SMALL, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, spec.in_channels, spec.latent_size, spec.latent_size)
    return torch.randn(shape, generator=generator), torch.tensor([3, 900])[:batch], torch.tensor([0, 10])[:batch]


# --- one layer ----------------------------------------------------------------------------------------------------


def golden_block() -> tuple[DiffuSSMBlock, dict[str, Tensor]]:
    arrays = {key: torch.from_numpy(value) for key, value in golden("diffussm_block").items() if value.ndim}
    block = DiffuSSMBlock(DiffuSSMConfig(size="T", width=8, d_state=8))
    stored = {"w0": "W0 b0", "w_up": "Wup bup", "w_down.0": "Wdn bdn", "w_down.1": "Wdn bdn"}
    stored |= {"w1": "W1 b1", "w2": "W2 b2", "w3": "W3 b3", "adaLN_modulation.1": "Wada bada"}
    state = {}
    for name, keys in stored.items():
        weight, bias = (arrays[key] for key in keys.split())
        if name.startswith("w_down"):
            weight, bias = weight[int(name[-1])], bias[int(name[-1])]
        state |= {f"{name}.weight": weight.reshape(-1, weight.shape[-1]), f"{name}.bias": bias.flatten()}
    for key in ("log_dt", "log_A_real", "A_imag", "B", "C"):
        state[f"mixer.kernel.{key}"] = torch.cat([arrays[f"{side}.{key}"] for side in ("fwd", "bwd")])
    state["mixer.D"] = torch.cat([arrays[f"{side}.Dskip"] for side in ("fwd", "bwd")])
    block.load_state_dict(state)
    return block, arrays


@pytest.mark.parametrize("train", [True, False])
def test_one_layer_and_every_intermediate_match_direct_sums(train):
    block, arrays = golden_block()
    block.train(train)
    seen = outputs({"Y": block.mixer, "K": block.mixer.kernel, "O": block.w3})
    for key, module in (("modulated", block.w0), ("U", block.mixer), ("I_prime", block.w2)):
        module.register_forward_pre_hook(lambda _module, args, key=key: seen.update({key: args[0]}))
    with torch.set_grad_enabled(train):
        seen["out"] = block(arrays["I"], arrays["c"])
    seen["K_fwd"], seen["K_bwd"] = seen.pop("K").chunk(2)
    for key, value in seen.items():
        assert_close(value, arrays[key], atol=1e-6 if key.startswith("K") else 2e-5, rtol=1e-5)


def test_a_block_is_the_identity_at_initialisation():
    x = torch.randn(2, 32, 32)
    assert_close(DiffuSSM(TINY, SMALL).blocks[0](x, torch.randn(2, 32)), x, rtol=0, atol=0)


def test_stream_at_length_averages_into_groups_and_repeats_out_of_them():
    """With a stream that is equal within each group, the layer at L is the layer at J, up to its own norm."""
    torch.manual_seed(0)
    short = DiffuSSMBlock(TINY)
    nn.init.zeros_(short.adaLN_modulation[1].bias)
    long = DiffuSSMBlock(replace(TINY, stream="L"))
    long.load_state_dict(short.state_dict())
    x, cond = torch.randn(2, 12, 32), torch.randn(2, 32)
    assert_close(long(x.repeat_interleave(2, dim=1), cond), short(x, cond).repeat_interleave(2, dim=1))
    x = torch.randn(2, 24, 32)
    normed = []
    long.w0.register_forward_pre_hook(lambda _module, args: normed.append(args[0]))
    long(x, torch.zeros(2, 32))
    assert_close(normed[0], (long.norm(x)[:, ::2] + long.norm(x)[:, 1::2]) / 2)


@pytest.mark.parametrize("cond, vectors", [("adaln2", 2), ("adaln3", 3), ("adaln4", 4), ("adaln6", 6)])
def test_conditioning_vectors_act_where_they_are_named(cond, vectors):
    """The layer with n vectors is the unconditioned one between explicit scales, shifts and gate."""
    torch.manual_seed(0)
    block, plain = DiffuSSMBlock(replace(TINY, cond=cond)), DiffuSSMBlock(replace(TINY, cond="none"))
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if "adaLN" not in key})
    modulation = torch.randn(vectors, 1, 1, 32)
    nn.init.zeros_(block.adaLN_modulation[1].weight)
    block.adaLN_modulation[1].bias.data = modulation.flatten()
    shift, scale, gate, scale_u, shift_1, scale_1 = [*modulation, *torch.zeros(6 - vectors, 1, 1, 32)]
    if vectors == 2:
        gate = torch.ones(())
    plain.norm.register_forward_hook(lambda _module, _args, out: out * (1 + scale) + shift)
    plain.mixer.register_forward_pre_hook(lambda _module, args: args[0] * (1 + scale_u))
    plain.w1.register_forward_pre_hook(lambda _module, args: args[0] * (1 + scale_1) + shift_1)
    plain.w3.register_forward_hook(lambda _module, _args, out: gate * out)
    x = torch.randn(2, 12, 32)
    assert_close(block(x, torch.randn(2, 32)), plain(x, torch.zeros(2, 32)))


def test_gating_off_drops_w1_and_the_product():
    block, plain = DiffuSSMBlock(TINY), DiffuSSMBlock(replace(TINY, gating=False))
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if not key.startswith("w1")})
    nn.init.ones_(block.adaLN_modulation[1].bias)
    nn.init.ones_(plain.adaLN_modulation[1].bias)
    block.w1.register_forward_hook(lambda _module, _args, out: torch.full_like(out, 100))  # gelu(100) = 100
    block.w3.register_forward_pre_hook(lambda _module, args: args[0] / 100)
    x, cond = torch.randn(2, 12, 32), torch.randn(2, 32)
    assert_close(plain(x, cond), block(x, cond))


@pytest.mark.parametrize("ssm_out_linear, weights", [("linear", 1), ("glu", 2)])
@pytest.mark.parametrize("bi_merge, y", [("concat", 2), ("sum", 1)])
def test_output_layer_of_the_ssm_is_as_wide_as_Y(ssm_out_linear, weights, bi_merge, y):
    without = DiffuSSMBlock(replace(TINY, bi_merge=bi_merge))
    block = DiffuSSMBlock(replace(TINY, bi_merge=bi_merge, ssm_out_linear=ssm_out_linear))
    extra = weights * (y * 32) ** 2 + weights * y * 32  # weights, bias
    assert params_m(block) * 1e6 == pytest.approx(params_m(without) * 1e6 + extra)
    u = torch.randn(2, 24, y * 32)
    out = nn.functional.linear(nn.functional.gelu(u), block.mixer_out[1].weight, block.mixer_out[1].bias)
    expected = nn.functional.glu(out) if weights == 2 else out
    assert_close(block.mixer_out(u), expected)


@pytest.mark.parametrize("name, function", [("silu", nn.functional.silu), ("relu", torch.relu)])
def test_activation_by_name(name, function):
    block = DiffuSSMBlock(replace(TINY, activation=name))
    x = torch.randn(3, 4)
    assert_close(block.activation(x), function(x))


@pytest.mark.parametrize("width, heads", [(1152, 16), (768, 8), (384, 4), (96, 1)])
def test_attention_in_the_hourglass_costs_two_products_over_all_positions(width, heads):
    config = DiffuSSMConfig(width=width, depth=1, mixer="attention")
    net = meta(config)
    assert net.blocks[0].mixer.num_heads == heads  # 72 per head at XL, as DiT-XL has
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        nn.functional.scaled_dot_product_attention(*[torch.zeros(1, heads, 1024, width // heads)] * 3)
    assert counter.get_total_flops() / 2 == 2 * width * 1024**2
    mixer, s4d = (multiply_adds(meta(c), IMAGENET) for c in (config, replace(config, mixer="s4d")))
    assert sum(mixer.values()) - s4d["addmm"] - s4d.get("mm", 0) == 2 * width * 1024**2 + 1024 * (3 + 2) * width**2


# --- totals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, expected", [("S", 78.09), ("L", 302.45), ("XL", 673.09)])
def test_parameters_of_the_named_sizes(size, expected):
    assert params_m(meta(DiffuSSMConfig(size=size))) == pytest.approx(expected, abs=0.005)


def test_xl_has_the_published_673_million_parameters():
    assert params_m(meta(DiffuSSMConfig(size="XL"))) == pytest.approx(673, rel=5e-3)


@pytest.mark.parametrize("reading, changes, expected, at_256, at_512", TABLE)
def test_parameters_and_linear_gflops_of_every_reading(reading, changes, expected, at_256, at_512):
    config = DiffuSSMConfig(reading=reading, **changes)
    assert_close(totals(config, 32), torch.tensor([expected, at_256]), rtol=1e-3, atol=0)
    assert_close(totals(config, 64)[1], torch.tensor(at_512), rtol=1e-3, atol=0)


def test_a_fixed_B_saves_64_values_for_each_channel_and_direction():
    learned, fixed = (params_m(meta(DiffuSSMConfig(trainable_B=value))) for value in (True, False))
    assert learned - fixed == pytest.approx(29 * 2 * 1152 * 64 / 1e6)
    assert fixed == pytest.approx(668.8, rel=1e-3)


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("stream", ["J", "L"])
def test_multiply_adds_have_their_closed_form(M, patch_size, stream):
    config = DiffuSSMConfig(depth=3, width=64, d_state=16, M=M, patch_size=patch_size, stream=stream)
    spec, D = replace(IMAGENET, latent_size=16), 64
    L = (16 // patch_size) ** 2
    counts = multiply_adds(meta(config, spec), spec)
    ends = L * D * patch_size**2 * (4 + 8)  # of M positions at once, or of each
    linear = 3 * (L // M * (10 + 2 * M) * D**2 + 3 * D**2) + 256 * D + D**2 + 2 * D**2 + ends
    assert counts.pop("bmm") == 3 * 2 * D * 16 * L  # kernels of two directions, N = 16
    assert sum(counts.values()) == linear


def test_size_t_costs_about_what_the_small_transformer_costs():
    net = meta(DiffuSSMConfig(size="T"), SMALL)
    width = 48
    transforms = 4 * 5 * width * 1.25 * 128 * 7  # of U, of both kernels, of both outputs; 1.25 n log2 n each
    total = sum(multiply_adds(net, SMALL).values()) + transforms
    with torch.device("meta"):
        dit = DiT(DiTConfig(size="T/2"), SMALL)
    assert total == pytest.approx(sum(multiply_adds(dit, SMALL).values()), rel=0.12)


# --- whole network ------------------------------------------------------------------------------------------------


def test_output_is_exactly_zero_at_initialisation():
    net = DiffuSSM(DiffuSSMConfig(size="T"), SMALL)
    assert not net(*inputs()).any()


def test_initialisation():
    torch.manual_seed(0)
    net = DiffuSSM(DiffuSSMConfig(size="T", width=96), SMALL)
    for table in (net.y_embedder.embedding_table, net.t_embedder.mlp[0], net.t_embedder.mlp[2]):
        assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    block = net.blocks[0]
    bounds = {"w0": (96, 192), "w1": (96, 96), "w2": (192, 96), "w3": (96, 96), "w_up": (192, 96)}  # fan-in, fan-out
    for name, fans in bounds.items():
        assert getattr(block, name).weight.abs().max().item() == pytest.approx((6 / sum(fans)) ** 0.5, rel=1e-2)
    assert block.w_down[1].weight.abs().max().item() == pytest.approx((6 / (192 + 96)) ** 0.5, rel=1e-2)
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert not any(linear.bias.any() for linear in linears)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"M": 1},
        {"M": 4, "patch_size": 2},
        {"stream": "L"},
        {"skip": True},
        {"cond": "none", "pos_embed": "none"},
        {"direction": "forward", "gating": False},
        {"mixer": "attention"},
        {"disc": "bilinear", "init": "legs", "trainable_B": False},
        *({"reading": reading} for reading in READINGS),
    ],
    ids=str,
)
def test_every_variant_depends_on_all_its_inputs_and_weights(changes):
    net = randomized(DiffuSSMConfig(size="T", depth=3, width=32, d_state=8, **changes))
    x, t, y = inputs()
    x.requires_grad_()
    out = net(x, t, y)
    assert out.shape == (2, 8, 8, 8)
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad.abs().min() > 0
    unused = [name for name, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unused == []
    for other in (net(x, t + 1, y), net(x, t, (y + 1) % 11)):
        assert not torch.allclose(other, out, atol=1e-4)


@pytest.mark.parametrize("skip", [True, False])
def test_eval_mode_and_its_kept_kernels_change_nothing(skip):
    net = randomized(replace(TINY, skip=skip))
    expected = net.train()(*inputs()).detach()
    net.eval()
    with torch.no_grad():
        for _ in range(2):
            assert_close(net(*inputs()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("direction", ["bi", "forward"])
def test_only_the_forward_direction_alone_is_causal(direction):
    net = randomized(replace(TINY, direction=direction))
    x, t, y = inputs()
    later = x.clone()
    later[:, :, 5] += 1  # row 5 of 8: positions 40..47
    change = (net(later, t, y) - net(x, t, y)).abs().sum((0, 1))
    assert change[5:].min() > 1e-4
    assert bool(change[:5].max() < 1e-5) == (direction == "forward")


@pytest.mark.parametrize(
    "channels, side, M, patch_size", [(3, 5, 1, 1), (3, 9, 3, 1), (1, 6, 4, 1), (2, 15, 1, 5), (4, 1, 1, 1)]
)
def test_odd_sizes(channels, side, M, patch_size):
    """Groups may wrap from one row to the next (6 x 6 in fours); width 36 has columns 4, 8, ... that fit any M here."""
    spec = BackboneSpec(channels, side, num_classes=10)
    net = randomized(DiffuSSMConfig(size="T", depth=2, width=36, d_state=4, M=M, patch_size=patch_size), spec)
    out = net(*inputs(spec))
    assert out.shape == (2, channels, side, side)
    assert out.isfinite().all()
    assert out.std() > 0


def test_groups_are_consecutive_positions_of_a_row():
    """Without SSM and positions each group of two neighbours in a row is on its own."""
    net = randomized(replace(TINY, pos_embed="none"))
    for block in net.blocks:
        block.mixer.register_forward_hook(lambda _module, args, _out: torch.cat([args[0], args[0]], -1))
    x, t, y = inputs()
    changed = x.clone()
    changed[:, :, 3, 4] += 1
    touched = (net(changed, t, y) - net(x, t, y)).abs().amax((0, 1)) > 1e-5
    assert touched.nonzero().tolist() == [[3, 4], [3, 5]]


def test_patchify_is_the_inverse_of_unpatchify():
    x = torch.randn(2, 3, 6, 6)
    assert_close(unpatchify(patchify(x, 2), 2, 3, 3), x, rtol=0, atol=0)
    assert_close(patchify(x, 2)[0, 1, 5], x[0, 2, 0, 3])  # second patch; its 6th value: row 0, column 1, channel 2


def test_positions_are_those_of_the_groups_and_are_not_stored():
    net, every = DiffuSSM(TINY, SMALL), DiffuSSM(replace(TINY, stream="L"), SMALL)
    assert net.pos_embed.shape == (1, 32, 32)
    assert_close(net.pos_embed[0, 5], every.pos_embed[0, 10])
    assert not any("pos_embed" in key for key in net.state_dict())
    assert DiffuSSM(replace(TINY, pos_embed="none"), SMALL).pos_embed is None


def test_skips_are_last_in_first_out():
    net = randomized(replace(TINY, depth=5, skip=True))
    seen, merged = outputs({f"block{i}": block for i, block in enumerate(net.blocks)}), {}
    for i, linear in enumerate(net.skip_linears):
        linear.register_forward_pre_hook(lambda _module, args, i=i: merged.update({i: args[0]}))
    net(*inputs())
    assert list(merged) == [1, 0]  # linear i serves the block that is i from the end
    for i, (stream, source) in {1: ("block2", "block1"), 0: ("block3", "block0")}.items():
        assert_close(merged[i], torch.cat([seen[stream], seen[source]], dim=-1), rtol=0, atol=0)


def test_without_conditioned_blocks_the_embedding_joins_every_token():
    net = randomized(replace(TINY, cond="none"))
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x, t, y = inputs()
    net(x, t, y)
    net(x, t, torch.flip(y, [0]))
    table = net.y_embedder.embedding_table.weight
    difference = (table[0] - table[10])[None, None].expand(1, 32, 32)
    assert_close(seen[0][:1] - seen[1][:1], difference, atol=1e-5, rtol=0)


def test_unconditional_equals_a_label_embedding_of_zero():
    net = randomized(TINY)
    free = DiffuSSM(TINY, replace(SMALL, num_classes=0))
    free.load_state_dict({key: value for key, value in net.state_dict().items() if "y_embedder" not in key})
    net.y_embedder.embedding_table.weight.data.zero_()
    x, t, y = inputs()
    assert_close(free(x, t, None), net(x, t, y))


def test_learned_sigma_leaves_the_noise_channels_as_they_were():
    wide, narrow = randomized(TINY), DiffuSSM(TINY, replace(SMALL, learn_sigma=False))
    state = wide.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = state[key].unflatten(0, (2, 8))[:, :4].flatten(0, 1)  # rows (position in group, channel fastest)
    narrow.load_state_dict(state)
    assert_close(wide(*inputs())[:, :4], narrow(*inputs()))


def test_bfloat16_autocast_stays_close_and_leaves_the_ssm_in_float32():
    net = randomized(TINY)
    expected = net(*inputs()).detach()
    kinds: dict[str, set] = {"fft": set(), "kernel": set(), "stream": set()}

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "_fft" in func.overloadpacket.__name__:
                kinds["fft"].add(out.dtype)
            return out

    for block in net.blocks:
        block.mixer.kernel.register_forward_hook(lambda _module, _args, out: kinds["kernel"].add(out.dtype))
        block.register_forward_hook(lambda _module, _args, out: kinds["stream"].add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16), Spy():
        got = net(*inputs())
    assert kinds == {"fft": {torch.float32, torch.complex64}, "kernel": {torch.float32}, "stream": {torch.float32}}
    assert 0 < (got - expected).norm() / expected.norm() < 0.03
    got.float().sum().backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_the_timestep_stays_float32_under_bfloat16_autocast(dtype):
    net, (x, _, y) = randomized(TINY), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x[:1].repeat(2, 1, 1, 1), torch.tensor([936, 937], dtype=dtype), y[:1].repeat(2))  # equal in bfloat16
    assert not torch.equal(out[0], out[1])


# --- configuration and recipe -------------------------------------------------------------------------------------


def test_a_set_part_overrides_size_and_reading():
    config = DiffuSSMConfig(size="S", reading="R2", width=64, cond="none")
    assert config.parts == (29, 64, 64)
    assert config.layer == (1, "sum", 2, "linear", "none")
    assert SIZES["XL"] == DiffuSSMConfig().parts
    assert READINGS["R4"] == DiffuSSMConfig().layer
    assert replace(config) == config  # a resolved configuration resolves to itself


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: DiffuSSMConfig(size="B"), r"model.size 'B' is not a DiffuSSM size. Choose one of S, L, XL, T"),
        (lambda: DiffuSSMConfig(reading="R5"), r"model.reading 'R5' is not known. Choose one of R4, R1, .*R3b"),
        (lambda: DiffuSSMConfig(init="hippo"), r"model.init 'hippo' is not known. Choose one of lin, inv, legs"),
        (lambda: DiffuSSMConfig(cond="adaln5"), r"model.cond 'adaln5' .* none, adaln2"),
        (lambda: DiffuSSMConfig(width=102), r"model.width is 102; it must be a multiple of 4"),
        (lambda: DiffuSSMConfig(width=100, M=3), r"model.width is 100; .* model.M \(3\)"),
        (lambda: DiffuSSMConfig(d_state=15), r"model.d_state is 15; it must be even"),
        (lambda: DiffuSSMConfig(M=0), r"model.M is 0; it must be above 0"),
        (lambda: DiffuSSMConfig(dt_max=1e-4), r"model.dt_max is 0.0001; it must be at least model.dt_min \(0.001\)"),
        (lambda: DiffuSSMConfig(mixer="attention", direction="forward"), r"'forward' is for model.mixer s4d"),
        (
            lambda: DiffuSSM(DiffuSSMConfig(patch_size=2), BackboneSpec(latent_size=5)),
            r"latent size of 5 .* patches of 2",
        ),
        (
            lambda: DiffuSSM(TINY, BackboneSpec(latent_size=5)),
            r"5 x 5 positions .* groups of 2.*model.M that divides 25",
        ),
    ],
)
def test_wrong_configurations_say_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("duplicate", [False, True])
def test_ssm_parameters_have_a_group_of_their_own(duplicate):
    recipe = replace(DiffuSSMModule.paper_recipe, optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.03, ssm_lr=1e-3))
    module = DiffuSSMModule(DiffuSSM(TINY, SMALL), recipe)
    if duplicate:
        module = copy.deepcopy(module)
    rest, ssm = module.param_groups()
    names = {id(p): name for name, p in module.backbone.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in ssm["params"]} == {"log_dt", "log_A_real", "A_imag", "B", "C"}
    assert len(ssm["params"]) == 5 * 3
    assert len(rest["params"]) + len(ssm["params"]) == len(names)
    assert (ssm["lr"], ssm["weight_decay"], rest["lr"], rest["weight_decay"]) == (1e-3, 0.0, 1e-2, 0.03)


def test_the_mixer_of_each_block_is_the_configured_ssm():
    config = replace(TINY, disc="bilinear", dt_min=0.02, dt_max=0.03)
    mixer = DiffuSSM(config, SMALL).blocks[0].mixer
    assert isinstance(mixer, S4D)
    assert mixer.kernel.disc == "bilinear"
    assert mixer.kernel.A_imag.shape == (2 * 32, 4)
    assert 0.02 <= mixer.kernel.log_dt.exp().min() <= mixer.kernel.log_dt.exp().max() <= 0.0301
