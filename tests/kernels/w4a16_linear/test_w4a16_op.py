# SPDX-License-Identifier: Apache-2.0
"""The weight-only linear: definition, float32 against reference, errors, operator check."""

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem


def make(out_features, in_features, *, bits=4, group_size=None, unsigned=False, seed=0):
    """Random codes, scales of both signs, and zero points when the codes are unsigned."""
    generator = torch.Generator().manual_seed(seed)
    low = 0 if unsigned else -(2 ** (bits - 1))
    codes = torch.randint(low, low + 2**bits, (out_features, in_features), generator=generator)
    codes = codes.to(torch.uint8 if unsigned else torch.int8)
    groups = 1 if group_size is None else -(-in_features // group_size)
    scale = torch.randn(out_features, groups, generator=generator)
    zero_point = torch.randint(0, 2**bits, (out_features, groups), generator=generator) if unsigned else None
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        zero_point=unsigned,
        activation_bits=16,
        output_dtype=torch.float32,
    )
    return problem, codes, scale, None if zero_point is None else zero_point.to(torch.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_product_with_the_decoded_weight(bits, group_size, unsigned, num_tokens):
    problem, codes, scale, zero_point = make(9, 50, bits=bits, group_size=group_size, unsigned=unsigned)
    x, bias = torch.randn(num_tokens, 50), torch.randn(9)
    group_of_k = torch.arange(50) // (group_size or 50)
    offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
    weight = scale[:, group_of_k].double() * (codes.double() - offset)
    expected = x.double() @ weight.T + bias
    outputs = []
    for name in ("float32", "reference"):
        plan = w4a16_linear.plan(problem, force=name)
        outputs.append(plan.linear(x, plan.prepare(codes, scale, zero_point), bias))
        # float32 sums of 50 products: at most 50 roundings of relative size 2^-24 of the summed magnitudes
        bound = 50 * 2**-23 * (x.double().abs() @ weight.abs().T + bias.abs())
        assert ((outputs[-1] - expected).abs() <= bound).all()
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    problem, codes, scale, _ = make(9, 64)
    x = torch.randn(5, 64).to(dtype)
    plan = w4a16_linear.plan(problem)
    operand = plan.prepare(codes, scale.half())
    exact = plan.linear(x.float(), operand, out_dtype=torch.float32)
    assert torch.equal(plan.linear(x, operand, out_dtype=dtype), exact.to(dtype))


def test_non_contiguous_input():
    problem, codes, scale, _ = make(9, 64)
    plan = w4a16_linear.plan(problem)
    operand = plan.prepare(codes, scale)
    x = torch.randn(64, 6).T[::2]
    torch.testing.assert_close(plan.linear(x, operand), plan.linear(x.contiguous(), operand))


def test_plan_on_a_gpu_never_keeps_a_float32_weight():
    problem = LinearProblem(out_features=8, in_features=8, activation_bits=16, device_type="cuda")
    plan = w4a16_linear.plan(problem)
    assert plan.implementation(1) != "float32"
    assert any("memory" in row.reason for row in plan.explain() if row.implementation == "float32")
    with pytest.raises(UnsupportedError, match="memory"):
        w4a16_linear.plan(problem, force="float32")


def test_wrong_arguments_are_refused():
    problem, codes, scale, zero_point = make(8, 64, unsigned=True)
    plan = w4a16_linear.plan(problem)
    for match, arguments in {
        "codes.dtype": (codes.int(), scale, zero_point),
        "codes.shape": (codes[:4], scale, zero_point),
        "codes=": (codes * 2, scale, zero_point),
        "scale.shape": (codes, scale.repeat(1, 2), zero_point),
        "scale.dtype": (codes, scale.double(), zero_point),
        "scale=": (codes, scale / 0, zero_point),
        "zero_point=None": (codes, scale, None),
        "zero_point.shape": (codes, scale, zero_point[:4]),
    }.items():
        with pytest.raises(InputError, match=match):
            plan.prepare(*arguments)
    operand = plan.prepare(codes, scale, zero_point)
    x = torch.randn(2, 64)
    for match, arguments in {
        "x.dim": (x[0], operand),
        "x.shape": (x[:, :32], operand),
        "x.dtype": (x.double(), operand),
        "bias.shape": (x, operand, torch.zeros(7)),
        "out_dtype": (x, operand, None, torch.int8),
        "x.device": (x.to("meta"), operand),
        "operand": (x, type(operand)({})),
    }.items():
        with pytest.raises(InputError, match=match):
            plan.linear(*arguments)
    with pytest.raises(InputError, match="use w4a8_linear"):
        w4a16_linear.plan(LinearProblem(out_features=8, in_features=8))


def test_framework_operator_check():
    problem, codes, scale, zero_point = make(6, 40, group_size=8, unsigned=True)
    plan = w4a16_linear.plan(problem, force="reference")
    operand = plan.prepare(codes, scale, zero_point).layout("codes")
    arguments = (torch.randn(3, 40), list(operand.values()), ",".join(operand), torch.randn(6))
    results = torch.library.opcheck(
        torch.ops.quattuor.w4a16_linear, (*arguments, torch.float16, "reference", 6, 4, 8)
    )
    assert set(results.values()) == {"SUCCESS"}
