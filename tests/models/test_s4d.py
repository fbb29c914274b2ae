"""S4D against values made by the published code, float64 sums written out, and itself where a cache must not show."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from golden_recipe import golden
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.diffussm import DiffuSSMConfig
from models.s4d import DISCRETIZATIONS, INITS, S4D, S4DKernel, ssm_parameters

GOLDEN = {key: torch.from_numpy(value) for key, value in golden("s4d").items()}
ONE = torch.tensor([1.0, 0.0])  # B of S4's minimal layer
LENGTHS = [1, 15, 16, 67]
FULL = ["zoh.uni", "zoh.bi", "bilinear.uni", "bilinear.bi"]


def kernel(channels: int, d_state: int = 64, disc: str = "zoh", init: str = "lin") -> S4DKernel:
    return S4DKernel(channels, d_state, disc, init, dt_min=1e-3, dt_max=1e-1, trainable_B=True)


def setup(module: nn.Module, **values: Tensor) -> None:
    for name, value in values.items():
        module.get_parameter(name).data.copy_(value)


def minimal(module: S4DKernel) -> S4DKernel:
    """The kernel of S4's minimal layer (3 channels, N = 8)."""
    setup(module, B=ONE, **{name: GOLDEN[f"mini.{name}"] for name in ("log_dt", "log_A_real", "A_imag", "C")})
    return module


def full(module: S4DKernel, name: str) -> S4DKernel:
    """The kernel of S4's full layer: with two directions, two C on one A, B and dt. It has -i where we have +i."""
    values = {key: GOLDEN[f"full.{name}.kernel.{key}"] for key in ("inv_dt", "C", "B", "A_real", "A_imag")}
    copies = len(values["C"])
    setup(
        module,
        log_dt=values["inv_dt"][:, 0].repeat(copies),
        log_A_real=values["A_real"].repeat(copies, 1),
        A_imag=-values["A_imag"].repeat(copies, 1),
        B=values["B"][0].repeat(copies, 1, 1),
        C=values["C"].flatten(0, 1),
    )
    return module


def direct_kernel(module: S4DKernel, length: int) -> Tensor:
    """K (H, L) in float64 from the textbook formulas, every power of dA by itself."""
    p = {name: value.detach().double() for name, value in module.named_parameters()}
    dt, A = p["log_dt"].exp()[:, None], torch.complex(-p["log_A_real"].exp(), p["A_imag"])
    B, C = torch.view_as_complex(p["B"]), torch.view_as_complex(p["C"])
    if module.disc == "zoh":
        dA = (dt * A).exp()
        dB = B * (dA - 1) / A
    else:
        dA = (1 + dt * A / 2) / (1 - dt * A / 2)
        dB = B * dt / (1 - dt * A / 2)
    powers = dA[..., None] ** torch.arange(length)
    return 2 * ((C * dB)[..., None] * powers).sum(1).real


def direct_sums(module: S4D, u: Tensor) -> list[Tensor]:
    """Each direction's output (B, L, H) in float64, summed position by position."""
    length, channels = u.shape[1:]
    kernels, skips = direct_kernel(module.kernel, length), module.D.detach().double()
    results = []
    for copy_, backward in enumerate([False, True][: len(skips) // channels]):
        rows = slice(copy_ * channels, (copy_ + 1) * channels)
        K, D, out = kernels[rows], skips[rows], torch.zeros(u.shape, dtype=torch.float64)
        for t in range(length):
            for s in range(t, length) if backward else range(t + 1):
                out[:, t] += K[:, abs(t - s)] * u[:, s].double()
        results.append(out + D * u)
    return results


class Recorder(TorchDispatchMode):
    """Every tensor that an op inside it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [(func.overloadpacket.__name__, leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out


# --- kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_kernel_of_the_minimal_layer_matches_the_published_code(length):
    assert_close(minimal(kernel(3, 8))(length), GOLDEN[f"mini.K.L{length}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FULL)
def test_kernels_of_the_full_layer_match_the_published_code(name):
    expected = GOLDEN[f"full.{name}.kernel"]  # (1 or 2, 3, 16)
    module = full(kernel(3 * len(expected), 8, disc=name.split(".")[0]), name)
    assert_close(module(16).view(-1, 3, 16), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("disc", DISCRETIZATIONS)
@pytest.mark.parametrize("length", [*LENGTHS, 1024, 4096])
def test_factored_evaluation_equals_every_power_by_itself(length, disc, init):
    torch.manual_seed(length)
    module = kernel(8, disc=disc, init=init)
    expected = direct_kernel(module, length)
    assert_close(module(length).double(), expected, atol=3e-6 if (disc, init) == ("zoh", "lin") else 2e-5, rtol=0)
    assert_close(module.double()(length), expected, atol=1e-12, rtol=0)


def test_kernel_never_holds_all_powers_of_all_modes():
    module, length = kernel(16), 4096
    with Recorder() as recorder:
        module(length).sum().backward()
    side = 64  # sqrt(4096)
    assert max(tensor.numel() for _, tensor in recorder.seen) == 16 * 64 * side  # H N sqrt(L); all would be H N/2 L


@pytest.mark.parametrize("length, padded", [(1, 1), (16, 16), (67, 8 * 9), (1024, 1024)])
def test_kernel_costs_one_multiply_add_per_channel_position_and_real_state(length, padded):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        kernel(5, 8)(length)
    assert counter.get_total_flops() / 2 == 5 * 8 * padded


# --- initialisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_initial_modes_match_the_published_code(init):
    module = kernel(2, 64, init=init)
    imag, order = module.A_imag[1].detach().sort()
    expected, expected_order = GOLDEN[f"init.{init}.A_imag"].abs().sort()  # conjugate modes are the same mode
    assert_close(imag, expected, atol=1e-5, rtol=2e-6)
    assert_close(module.log_A_real.exp(), torch.full((2, 32), 0.5))
    moduli, expected_moduli = module.B[1].detach().norm(dim=1), GOLDEN[f"init.{init}.B"].norm(dim=1)
    # Moduli, because a phase goes over into C. The published code cuts the imaginary part at 2, beside a real 0.016.
    assert_close(moduli[order], expected_moduli[expected_order], atol=2e-4, rtol=0)


def test_time_steps_are_log_uniform_and_C_is_complex_normal():
    torch.manual_seed(0)
    module = S4DKernel(4096, 4, "zoh", "lin", dt_min=1e-2, dt_max=1.0, trainable_B=True)
    log10 = module.log_dt.detach() / math.log(10)
    assert -2 <= log10.min() < -1.99 < -0.01 < log10.max() <= 0
    assert log10.mean().item() == pytest.approx(-1, abs=0.03)
    assert module.C.square().sum(-1).mean().item() == pytest.approx(1, abs=0.03)
    assert module.C.mean().item() == pytest.approx(0, abs=0.03)


def test_defaults_are_those_of_s4():
    """64 real states, zero-order hold, everything trained, and time steps from 1e-3 to 1e-1."""
    torch.manual_seed(0)
    kernel = S4D(4096).kernel
    dt = kernel.log_dt.detach().exp()
    assert 0.999e-3 < dt.min() < 1.01e-3 and 0.99e-1 < dt.max() < 1.001e-1
    assert (kernel.A_imag.shape[1], kernel.disc, kernel.B.requires_grad) == (64 // 2, "zoh", True)
    config = DiffuSSMConfig()
    assert (config.d_state, config.disc, config.trainable_B) == (64, "zoh", True)
    assert (config.dt_min, config.dt_max) == (1e-3, 1e-1)


def test_a_fixed_B_takes_no_gradient():
    module = S4D(4, 8, trainable_B=False)
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == {"kernel.B"}


# --- convolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [15, 16])
def test_minimal_layer_matches_the_published_code(length):
    module, u = S4D(3, 8, direction="forward"), GOLDEN[f"mini.u.L{length}"].mT
    minimal(module.kernel)
    setup(module, D=torch.zeros(3))
    assert_close(module(u).mT, GOLDEN[f"mini.conv.L{length}"], atol=2e-6, rtol=0)
    setup(module, D=GOLDEN["mini.D"])
    weight, bias = GOLDEN["mini.output_linear.0.weight"][..., 0], GOLDEN["mini.output_linear.0.bias"]
    out = nn.functional.glu(nn.functional.linear(nn.functional.gelu(module(u)), weight, bias))
    assert_close(out.mT, GOLDEN[f"mini.layer_out.L{length}"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["zoh.uni", "bilinear.uni"])
def test_full_layer_matches_the_published_code(name):
    module = S4D(3, 8, direction="forward", disc=name.split(".")[0])
    full(module.kernel, name)
    setup(module, D=GOLDEN[f"full.{name}.D"][0])
    assert_close(module(GOLDEN[f"full.{name}.u"].mT).mT, GOLDEN[f"full.{name}.y"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["zoh.bi", "bilinear.bi"])
def test_backward_direction_matches_the_published_two_sided_kernel(name):
    """S4's own two-sided convolution leaves out the current sample backwards: there it is our output one step later."""
    module, u = S4D(3, 8, disc=name.split(".")[0]), GOLDEN[f"full.{name}.u"].mT
    full(module.kernel, name)
    setup(module, D=torch.zeros(6))
    ahead, back = module(u).chunk(2, dim=-1)
    later = torch.cat([back[:, 1:], torch.zeros(2, 1, 3)], dim=1)
    assert_close((ahead + later + GOLDEN[f"full.{name}.D"] * u).mT, GOLDEN[f"full.{name}.y"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("disc", DISCRETIZATIONS)
def test_both_directions_equal_their_sums_position_by_position(length, disc):
    torch.manual_seed(length)
    u = torch.randn(2, length, 3)
    for direction, bi_merge in (("bi", "concat"), ("bi", "sum"), ("forward", "concat")):
        module = S4D(3, 8, direction=direction, bi_merge=bi_merge, disc=disc)
        sums = direct_sums(module, u)
        expected = torch.cat(sums, -1) if bi_merge == "concat" else sum(sums)
        assert_close(module(u).double(), expected, atol=2e-6, rtol=1e-6)


def test_long_sequences_stay_exact():
    torch.manual_seed(0)
    module, u = S4D(4, 64), torch.randn(1, 4096, 4)
    with torch.no_grad():
        assert_close(module(u).double(), copy.deepcopy(module).double()(u.double()), atol=2e-5, rtol=0)


@pytest.mark.parametrize("disc", DISCRETIZATIONS)
def test_gradients_equal_finite_differences(disc):
    torch.manual_seed(0)
    module = S4D(2, 4, disc=disc, dt_min=0.1).double()
    names = [name for name, _ in module.named_parameters()]

    def output(u: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), u)

    inputs = [torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True), *module.parameters()]
    assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.parametrize("bi_merge, inverses", [("concat", 2), ("sum", 1)])
def test_one_transform_of_the_input_serves_both_directions(bi_merge, inverses):
    module = S4D(3, 8, bi_merge=bi_merge)
    with Recorder() as recorder, torch.no_grad():
        module(torch.randn(4, 16, 3))
    rows = {
        op: [t.numel() // t.shape[-1] for name, t in recorder.seen if name == op] for op in ("_fft_r2c", "_fft_c2r")
    }
    assert rows == {"_fft_r2c": [4 * 3, 2 * 3], "_fft_c2r": [4 * inverses * 3]}  # of u and of the kernels; of y


# --- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_the_type_of_the_result_and_nothing_else(dtype):
    module, u = S4D(3, 8), torch.randn(2, 15, 3).to(dtype)
    expected = module(u.float())
    with torch.autocast("cpu", torch.bfloat16), Recorder() as recorder:
        got = module(u)
    assert got.dtype == dtype
    assert_close(got, expected.to(dtype), rtol=0, atol=0)
    products = [tensor.dtype for name, tensor in recorder.seen if name in ("bmm", "_fft_r2c", "_fft_c2r", "exp")]
    assert set(products) == {torch.float32, torch.complex64}


def test_a_module_cast_to_bfloat16_still_computes_in_float32():
    module = S4D(3, 8)
    rounded = copy.deepcopy(module).bfloat16().float()  # loses digits once
    u = torch.randn(2, 15, 3).bfloat16()
    assert_close(module.bfloat16()(u), rounded(u.float()).bfloat16(), rtol=0, atol=0)


# --- cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached():
    """A module in eval mode that has run once, its input, and a list that grows with every kernel evaluation."""
    torch.manual_seed(0)
    module, u, lengths = S4D(3, 8).eval(), torch.randn(2, 9, 3), []
    module.kernel.register_forward_pre_hook(lambda _module, args: lengths.append(args[0]))
    with torch.no_grad():
        module(u)
    return module, u, lengths


def fresh(module: S4D, u: Tensor) -> Tensor:
    """The output of the module's weights without any cache."""
    return copy.deepcopy(module).train()(u).detach()


def test_kernels_are_kept_across_calls_without_gradients(cached):
    module, u, lengths = cached
    with torch.no_grad():
        again = module(2 * u)
    with torch.inference_mode():
        module(u[:1])
    assert lengths == [9]
    assert_close(again, fresh(module, 2 * u), rtol=0, atol=0)


@pytest.mark.parametrize("grad, train", [(True, False), (False, True)])
def test_kernels_are_made_anew_with_gradients_or_in_training(cached, grad, train):
    module, u, lengths = cached
    with torch.set_grad_enabled(grad):
        module.train(train)(u)
        assert module(u).requires_grad == grad
    assert lengths == [9, 9, 9]
    assert module.cached is None


def optimizer_step(module: S4D) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def swap(module: S4D) -> None:
    """As Lightning's WeightAveraging does it: through `.data`, which no version counter sees."""
    for parameter in module.parameters():
        parameter.data.copy_(0.9 * parameter.data)


def copy_one(module: S4D) -> None:
    with torch.no_grad():
        module.D[0].copy_(torch.tensor(7.0))


CHANGES = {
    "copy": copy_one,
    "swap": swap,
    "optimizer": optimizer_step,
    "load": lambda module: module.load_state_dict(S4D(3, 8).state_dict()),
    "assign": lambda module: module.load_state_dict(S4D(3, 8).state_dict(), assign=True),
    "double": lambda module: module.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(cached, change):
    module, u, lengths = cached
    CHANGES[change](module)
    with torch.no_grad():
        got = module(u)
    assert lengths == [9, 9]
    assert_close(got, fresh(module, u), rtol=0, atol=0)


def test_another_length_and_another_device_are_noticed(cached):
    module, u, lengths = cached
    with torch.no_grad():
        shorter = module(u[:, :8])
        moved = module.to("meta")(u.to("meta"))
    assert lengths == [9, 8, 9]
    assert shorter.shape == (2, 8, 6)
    assert moved.device.type == "meta"


def test_a_cache_made_in_inference_mode_can_be_copied_with_its_module(cached):
    module, u, _ = cached
    with torch.inference_mode():
        expected = module(u[:, :5])
    with torch.no_grad():
        assert_close(copy.deepcopy(module)(u[:, :5]), expected, rtol=0, atol=0)


# --- parameters ---------------------------------------------------------------------------------------------------


def test_ssm_parameters_are_found_in_copies_too():
    module = nn.Sequential(nn.Linear(3, 3), S4D(3, 8), nn.ModuleList([S4D(3, 8, direction="forward")]))
    wanted = {f"{s4d}.kernel.{name}" for s4d in ("1", "2.0") for name in ("log_dt", "log_A_real", "A_imag", "B", "C")}
    assigned = copy.deepcopy(module)
    assigned.load_state_dict(module.state_dict(), assign=True)
    for version in (module, copy.deepcopy(module), assigned):
        found = {id(p) for p in ssm_parameters(version)}
        assert {name for name, p in version.named_parameters() if id(p) in found} == wanted


def test_parameters_are_real_float32_pairs():
    module = S4D(3, 8)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "D": (6,),
        "kernel.log_dt": (6,),
        "kernel.log_A_real": (6, 4),
        "kernel.A_imag": (6, 4),
        "kernel.B": (6, 4, 2),
        "kernel.C": (6, 4, 2),
    }
    assert {p.dtype for p in module.parameters()} == {torch.float32}
