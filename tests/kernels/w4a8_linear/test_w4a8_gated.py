# SPDX-License-Identifier: Apache-2.0
"""The product of gate and up with its gate: the bits of both calls, whatever computes them."""

import dataclasses

import pytest
import torch

from quattuor.errors import InputError
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import describe_device
from quattuor.kernels.token_quantize import silu_mul_quantize


def both_ways(plan, made, tokens, bias, out_dtype):
    """Return codes and scales of one call and of two."""
    operand = plan.prepare(made.codes, made.scale, made.group_scale)
    both = plan.linear(*tokens, operand, bias, out_dtype)
    half = both.shape[1] // 2
    found = w4a8_linear.gated_linear(plan, *tokens, operand, bias, out_dtype)
    return found, silu_mul_quantize(both[:, :half], both[:, half:])


def compare_on_gpu(made, out_dtype, inputs):
    """Compare one call with two, of the kernel for one token and of the plan."""
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    bias = torch.randn(problem.out_features, device="cuda", dtype=torch.float16)
    for plan in (w4a8_linear.plan(problem, force="lanes"), w4a8_linear.plan(problem)):
        for num_tokens in (1, 3):
            for some in (None, bias):
                tokens = inputs(num_tokens, problem.in_features, device="cuda")
                found, expected = both_ways(plan, made, tokens, some, out_dtype)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fields", [{}, {"group_size": 128, "integer": True}])
def test_one_call_gives_the_bits_of_two(num_tokens, out_dtype, fields, layer, inputs):
    made = layer(96, 256, **fields)
    bias = torch.randn(96, generator=torch.Generator().manual_seed(0))
    found, expected = both_ways(w4a8_linear.plan(made.problem), made, inputs(num_tokens, 256), bias, out_dtype)
    assert found[0].shape == (num_tokens, 48)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_wrong_inputs_are_refused(layer, inputs):
    made = layer(97, 256)
    plan = w4a8_linear.plan(made.problem)
    operand = plan.prepare(made.codes, made.scale)
    with pytest.raises(InputError, match="odd"):
        w4a8_linear.gated_linear(plan, *inputs(1, 256), operand)
    made = layer(96, 256)
    plan = w4a8_linear.plan(made.problem)
    with pytest.raises(InputError, match="operand"):
        w4a8_linear.gated_linear(plan, *inputs(1, 256), dataclasses.replace(operand, entries={}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out_features", "in_features"), [(32, 256), (96, 1280), (600, 512), (27648, 5120)])
def test_gpu_gives_the_bits_of_two_calls(out_features, in_features, out_dtype, layer, inputs):
    compare_on_gpu(layer(out_features, in_features, device="cuda"), out_dtype, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("out_features", "in_features", "out_dtype", "fields"),
    [
        (96, 1280, torch.bfloat16, {"group_size": 64, "integer": True}),
        (600, 512, torch.float32, {"group_size": 32}),
        (22016, 4096, torch.float16, {"group_size": 128, "integer": True}),
    ],
)
def test_gpu_gates_groups_as_two_calls(out_features, in_features, out_dtype, fields, layer, inputs):
    made = layer(out_features, in_features, device="cuda", **fields)
    # float16 holds what gate and up multiply to
    compare_on_gpu(dataclasses.replace(made, scale=made.scale * 0.1), out_dtype, inputs)
