# SPDX-License-Identifier: Apache-2.0
"""The reference against the definition written with Python integers."""

import pytest
import torch

from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.planes import group_scale_of, prepare_planes, stays_in_int8


@pytest.mark.parametrize(("bits", "group_size", "integer"), [(4, None, False), (3, 4, False), (4, 4, True)])
def test_reference_equals_the_definition(layer, inputs, bits, group_size, integer):
    made = layer(5, 10, bits=bits, group_size=group_size, integer=integer)
    x_codes, x_scale = inputs(3, 10)
    bias = torch.randn(5)
    plan = w4a8_linear.plan(made.problem, force="reference")
    out = plan.linear(x_codes, x_scale, plan.prepare(made.codes, made.scale, made.group_scale), bias)
    for m in range(3):
        for n in range(5):
            total = 0
            for k in range(10):
                w8 = int(made.codes[n, k])
                if made.group_scale is not None:
                    # Python's round is half to even, and the product is exact in double precision
                    product = round(w8 * float(made.group_scale[n, k // group_size]))
                    w8 = max(-128, min(127, product))
                total += int(x_codes[m, k]) * w8
            expected = torch.tensor(float(total)) * made.scale[n] * x_scale[m] + bias[n]
            assert out[m, n] == expected.half()


def test_group_products_round_half_to_even_and_clamp():
    problem = LinearProblem(out_features=1, in_features=4, weight_bits=4, group_size=1, output_dtype=torch.float32)
    plan = w4a8_linear.plan(problem, force="reference")
    codes = torch.tensor([[1, 3, -8, -8]], dtype=torch.int8)
    group_scale = torch.tensor([[0.5, 0.5, -20.0, 20.0]], dtype=torch.float16)  # 0.5 -> 0, 1.5 -> 2
    operand = plan.prepare(codes, torch.ones(1), group_scale)
    out = plan.linear(torch.eye(4, dtype=torch.int8), torch.ones(4), operand)
    assert out.flatten().tolist() == [0.0, 2.0, 127.0, -128.0]


@pytest.mark.parametrize(
    ("low", "high", "is_inside"),
    [(-15.875, 16.0625, True), (0.0, 15.0, True), (-15.9375, 0.0, False), (0.0, 16.078125, False)],
)
def test_products_are_clamped_exactly_where_a_scale_takes_one_out_of_int8(low, high, is_inside):
    scale = torch.tensor([[low, high]], dtype=torch.float16)
    product = (torch.arange(-8, 8).float()[:, None] * scale.float()).round()
    assert (product.min() >= -128 and product.max() <= 127) == is_inside
    assert stays_in_int8(scale, 8) == is_inside
    problem = LinearProblem(out_features=1, in_features=256, group_size=128)
    tensors = (torch.zeros(1, 256, dtype=torch.int8), torch.ones(1), scale)
    mode, group_scale = group_scale_of(problem, prepare_planes(problem, *tensors))
    assert mode == ("unclamped" if is_inside else "half")
    assert torch.equal(group_scale[:, 0], scale[0])


def test_every_other_mode_runs_as_it_is_named(layer):
    for fields, mode in (({}, "channel"), ({"group_size": 128, "integer": True}, "integer")):
        made = layer(64, 256, **fields)
        prepared = prepare_planes(made.problem, made.codes, made.scale, made.group_scale)
        found, group_scale = group_scale_of(made.problem, prepared)
        assert (found, group_scale is None) == (mode, mode == "channel")


def test_unclamped_unpacking_by_its_definition():
    """1536 + code * s, rounded once to float16, ends in the product in two's complement, for every scale."""
    scale = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scale = scale[(scale > -127.5 / 8) & (scale <= 128.5 / 8)]
    for code in range(-8, 8):
        exact = code * scale.double()
        found = (exact + 1536).half().view(torch.int16).to(torch.int8)
        assert torch.equal(found, exact.round().to(torch.int8))
