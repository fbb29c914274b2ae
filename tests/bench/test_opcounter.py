"""The op counter against closed forms of small modules on the meta device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.errors import UserError
from bench.opcounter import PARTS, count_ops
from models.s4d import S4D


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


def only(part, multiply_adds):
    return pytest.approx(dict.fromkeys(PARTS, 0.0) | {part: multiply_adds})


@pytest.mark.parametrize("bias", [True, False])
def test_linear_costs_rows_times_weights_with_and_without_bias(bias):
    layer = nn.Linear(8, 16, bias=bias, device="meta")
    assert count_ops(layer, meta(2, 5, 8)) == only("linear", 2 * 5 * 8 * 16)


def test_linear_on_a_transposed_input_costs_the_same():
    layer = nn.Linear(8, 16, device="meta")
    assert count_ops(layer, meta(2, 8, 5).mT) == only("linear", 2 * 5 * 8 * 16)


def test_batched_product_with_a_parameter_is_linear():
    weights = nn.Parameter(meta(3, 8, 16))  # one matrix for each of three positions
    module = Lambda(lambda x: torch.einsum("jd,kde->jke", x, weights))
    module.weights = weights
    assert count_ops(module, meta(5, 8)) == only("linear", 5 * 3 * 8 * 16)


def test_baddbmm_is_counted_without_its_bias():
    module = Lambda(lambda a, b, c: torch.baddbmm(a, b, c))
    assert count_ops(module, meta(2, 3, 5), meta(2, 3, 4), meta(2, 4, 5)) == only("attention", 2 * 3 * 4 * 5)


def test_attention_is_two_products_over_all_pairs():
    q, k, v = meta(1, 2, 5, 4), meta(1, 2, 7, 4), meta(1, 2, 7, 6)
    module = Lambda(nn.functional.scaled_dot_product_attention)
    assert count_ops(module, q, k, v) == only("attention", 2 * 5 * 7 * (4 + 6))


def test_the_formula_of_fused_attention_agrees_with_its_two_products():
    # On the CPU one fused op runs; on meta the same call shows its two products.
    q = torch.empty(1, 2, 5, 4)
    module = Lambda(nn.functional.scaled_dot_product_attention)
    assert count_ops(module, q, q, q) == count_ops(module, *[q.to("meta")] * 3) == only("attention", 2 * 5 * 5 * 8)


def test_convolution_costs_taps_times_outputs():
    layer = nn.Conv2d(4, 6, kernel_size=3, stride=2, groups=2, device="meta")
    assert count_ops(layer, meta(1, 4, 9, 9)) == only("convolution", 4 * 4 * 6 * (4 // 2) * 9)


def test_transposed_convolution_costs_taps_times_inputs():
    layer = nn.ConvTranspose2d(4, 6, kernel_size=3, stride=2, device="meta")
    assert count_ops(layer, meta(1, 4, 5, 5)) == only("convolution", 5 * 5 * 4 * 6 * 9)


def test_a_complex_multiply_add_is_four_real_ones():
    a, b = meta(3, 4, 5, dtype=torch.complex64), meta(3, 5, 2, dtype=torch.complex64)
    assert count_ops(Lambda(torch.bmm), a, b) == only("attention", 4 * 3 * 4 * 5 * 2)


@pytest.mark.parametrize("n", [16, 15, 2, 1])
def test_real_fft_and_its_inverse_are_each_half_a_complex_one(n):
    x = meta(3, n)
    forward = count_ops(Lambda(torch.fft.rfft), x)
    inverse = count_ops(Lambda(lambda f: torch.fft.irfft(f, n=n)), meta(3, n // 2 + 1, dtype=torch.complex64))
    both = count_ops(Lambda(torch.fft.fft), meta(3, n, dtype=torch.complex64))
    assert forward == inverse == only("fft", 3 * 1.25 * n * math.log2(n))  # 2.5 n log2 n operations, two by two
    assert both["fft"] == 2 * forward["fft"]


def test_fft_convolution_costs_three_transforms_of_twice_the_length():
    def convolve(u, kernel):  # (D, L) each
        product = torch.fft.rfft(u, n=32) * torch.fft.rfft(kernel, n=32)
        return torch.fft.irfft(product, n=32)[:, :16]

    length, width = 16, 3
    costs = count_ops(Lambda(convolve), meta(width, length), meta(width, length))
    assert costs == only("fft", 7.5 * length * math.log2(2 * length) * width)


def test_s4d_kernel_is_one_real_product_over_the_state_and_its_parts_are_apart():
    channels, state, length = 3, 8, 36  # a length of a square has no padding in the kernel's two-level product
    layer = S4D(channels, state, direction="forward").to("meta")
    costs = count_ops(layer, meta(1, length, channels))
    assert costs["ssm_kernel"] == channels * length * state
    assert costs["fft"] == pytest.approx(7.5 * length * math.log2(2 * length) * channels)
    assert costs["linear"] == costs["attention"] == costs["convolution"] == 0


def test_both_directions_share_the_transform_of_the_input():
    layer = S4D(3, 8, direction="bi").to("meta")
    costs = count_ops(layer, meta(1, 36, 3))
    assert costs["ssm_kernel"] == 2 * 3 * 36 * 8
    assert costs["fft"] == pytest.approx((1 + 2 + 2) * 2.5 * 36 * math.log2(72) * 3)


def test_two_dimensional_fft_takes_the_logarithm_of_the_whole_size():
    assert count_ops(Lambda(torch.fft.rfft2), meta(3, 8, 4)) == only("fft", 3 * 1.25 * 32 * 5)


def test_norms_activations_softmax_and_elementwise_are_free():
    module = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.SiLU(), nn.Softmax(dim=-1), Lambda(lambda x: x * x + 1))
    assert count_ops(module.to("meta"), meta(2, 8)) == dict.fromkeys(PARTS, 0.0)


def test_an_unknown_op_is_an_error_that_says_where_to_register_it():
    with pytest.raises(UserError, match=r"'cholesky_inverse' is not known.*bench/opcounter\.py.*FORMULAS.*FREE_OPS"):
        count_ops(Lambda(torch.cholesky_inverse), meta(3, 3))


def test_counts_are_half_of_torchs_counter_where_that_sees_the_op():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, device="meta").train()
    x = meta(2, 5, 16)
    with FlopCounterMode(display=False) as mode:
        layer(x)
    assert sum(count_ops(layer, x).values()) == mode.get_total_flops() / 2


def test_counting_leaves_no_hook_behind():
    layer = nn.Linear(2, 2, device="meta")
    count_ops(layer, meta(1, 2))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
