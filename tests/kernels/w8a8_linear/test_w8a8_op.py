# SPDX-License-Identifier: Apache-2.0
"""8-bit weights and zero points: exactness against integers, and the refusals."""

import dataclasses

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.kernels import w4a8_linear, w8a8_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
        id="gpu",
    ),
]


def zero_points(num_tokens, device):
    """Return zero points over their whole range, the extremes first."""
    z = torch.randint(-128, 128, (num_tokens,), generator=torch.Generator().manual_seed(7), dtype=torch.int8)
    z[: min(2, num_tokens)] = torch.tensor([-128, 127], dtype=torch.int8)[: min(2, num_tokens)]
    return z.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 100])
@pytest.mark.parametrize(
    ("bits", "group_size", "integer"), [(8, None, False), (4, None, False), (4, 128, True), (3, 64, False)]
)
def test_zero_points_are_subtracted_exactly(layer, inputs, device, num_tokens, bits, group_size, integer):
    made = layer(
        70,
        600,
        bits=bits,
        group_size=group_size,
        integer=integer,
        device=device,
        activation_zero_point=True,
        output_dtype=torch.float32,
    )
    problem = dataclasses.replace(made.problem, **describe_device(device))
    x_codes, x_scale = inputs(num_tokens, 600, device=device)
    z = zero_points(num_tokens, device)
    plan = w4a8_linear.plan(problem)
    operand = plan.prepare(made.codes, made.scale, made.group_scale)
    found = plan.linear(x_codes, x_scale, operand, x_zero_point=z)
    weight = made.codes.double()
    if group_size is not None:
        weight = weight * made.group_scale.double().repeat_interleave(group_size, dim=1)[:, :600]
        weight = weight.round().clamp(-128, 127)
    sums = (x_codes.double() - z.double()[:, None]) @ weight.T
    assert torch.equal(found, sums.float() * made.scale * x_scale[:, None])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 200])
def test_every_implementation_gives_the_bits_of_the_reference(layer, inputs, device, zero_point, num_tokens):
    made = layer(391, 1296, bits=8, device=device, activation_zero_point=zero_point)
    problem = dataclasses.replace(made.problem, **describe_device(device))
    x_codes, x_scale = inputs(num_tokens, 1296, device=device)
    z = zero_points(num_tokens, device) if zero_point else None
    outputs = []
    for name in ("reference", "float32", "triton"):
        try:
            plan = w8a8_linear.plan(problem, force=name)
        except UnsupportedError:
            assert (name, device) == ("triton", "cpu")
            continue
        outputs.append(plan.linear(x_codes, x_scale, plan.prepare(made.codes, made.scale), x_zero_point=z))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize(("field", "value"), [("weight_bits", 4), ("group_size", 128)])
def test_other_layers_are_refused(field, value):
    problem = LinearProblem(**{"out_features": 8, "in_features": 256, "weight_bits": 8, field: value})
    with pytest.raises(InputError, match="use w4a8_linear"):
        w8a8_linear.plan(problem)


def test_zero_points_must_fit_the_problem(layer, inputs):
    x_codes, x_scale = inputs(3, 64)
    z = torch.zeros(3, dtype=torch.int8)
    without = layer(8, 64, bits=8)
    plan = w8a8_linear.plan(without.problem)
    operand = plan.prepare(without.codes, without.scale)
    with pytest.raises(InputError, match="does not fit activation_zero_point=False"):
        plan.linear(x_codes, x_scale, operand, x_zero_point=z)
    having = w8a8_linear.plan(dataclasses.replace(without.problem, activation_zero_point=True))
    operand = having.prepare(without.codes, without.scale)
    with pytest.raises(InputError, match="does not fit activation_zero_point=True"):
        having.linear(x_codes, x_scale, operand)
    with pytest.raises(InputError, match=r"x_zero_point\.dtype"):
        having.linear(x_codes, x_scale, operand, x_zero_point=z.int())
    with pytest.raises(InputError, match=r"x_zero_point\.shape"):
        having.linear(x_codes, x_scale, operand, x_zero_point=z[:2])


def test_rows_that_could_overflow_are_refused():
    LinearProblem(out_features=1, in_features=65535, activation_zero_point=True)
    with pytest.raises(InputError, match="exceeds 65535"):
        LinearProblem(out_features=1, in_features=65536, activation_zero_point=True)
    with pytest.raises(InputError, match="is not defined with 16-bit activations"):
        LinearProblem(out_features=1, in_features=8, activation_bits=16, activation_zero_point=True)
