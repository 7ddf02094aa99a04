# SPDX-License-Identifier: Apache-2.0
"""The public wrapper: errors before any computation, strides, batches, the framework's operator check."""

import dataclasses

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import TOKEN_RANGES, LinearProblem, Operand
from quattuor.kernels.w4a8_linear.op import IMPLEMENTATIONS


def test_plan_explains_itself_on_cpu(layer):
    plan = w4a8_linear.plan(layer(8, 64).problem)
    assert {plan.implementation(m) for m in (0, 1, 17, 5000)} == {"float32"}
    rows = plan.explain()
    assert {row.implementation for row in rows} == {item.name for item in IMPLEMENTATIONS}
    assert sum(row.is_chosen for row in rows) == len(TOKEN_RANGES)


def test_non_contiguous_inputs_give_the_same_bits(layer, inputs):
    made = layer(24, 96, group_size=32)
    x_codes, x_scale = inputs(10, 96)
    plan = w4a8_linear.plan(made.problem)
    operand = plan.prepare(made.codes.T.contiguous().T, made.scale, made.group_scale)
    strided = x_codes.T.contiguous().T[::2]
    assert not strided.is_contiguous()
    out = plan.linear(strided, x_scale[::2], operand)
    assert torch.equal(out, plan.linear(x_codes, x_scale, operand)[::2])


def test_restored_operand_computes_the_same(layer, inputs):
    made = layer(8, 64)
    plan = w4a8_linear.plan(made.problem)
    operand = plan.prepare(made.codes, made.scale)
    assert operand.nbytes == sum(t.nbytes for t in operand.tensors().values()) > 0
    restored = Operand({name: t.clone() for name, t in operand.tensors().items()})
    x_codes, x_scale = inputs(2, 64)
    assert torch.equal(plan.linear(x_codes, x_scale, restored), plan.linear(x_codes, x_scale, operand))


def test_wrong_weights_are_refused(layer):
    made = layer(8, 64, group_size=32)
    plan = w4a8_linear.plan(made.problem)
    codes, scale, group_scale = made.codes, made.scale, made.group_scale
    for match, arguments in {
        "codes.dtype": (codes.int(), scale, group_scale),
        "codes.shape": (codes[:, :63], scale, group_scale),
        "codes=": ((codes.int() * 2).to(torch.int8), scale, group_scale),
        "scale.dtype": (codes, scale.half(), group_scale),
        "scale.shape": (codes, scale[:7], group_scale),
        "scale.device": (codes, scale.to("meta"), group_scale),
        "group_scale=None": (codes, scale, None),
        "group_scale.dtype": (codes, scale, group_scale.float()),
        "group_scale.shape": (codes, scale, group_scale[:, :1]),
        "group_scale=NaN or infinite": (codes, scale, group_scale * torch.inf),
    }.items():
        with pytest.raises(InputError, match=match):
            plan.prepare(*arguments)
    with pytest.raises(InputError, match="scale=NaN or infinite is not finite"):
        plan.prepare(codes, scale / 0, group_scale)


@pytest.mark.parametrize("value", [0.0, 17.0, 2.5, -16.0])
def test_promised_integer_group_scales_are_checked(layer, value):
    made = layer(8, 64, group_size=32, integer=True)
    group_scale = made.group_scale.clone()
    group_scale[3, 1] = value
    with pytest.raises(InputError, match=r"integers in -15 \.\. -1 or 1 \.\. 16"):
        w4a8_linear.plan(made.problem).prepare(made.codes, made.scale, group_scale)


def test_wrong_inputs_are_refused(layer, inputs):
    made = layer(8, 64)
    plan = w4a8_linear.plan(made.problem)
    operand = plan.prepare(made.codes, made.scale)
    x, s = inputs(2, 64)
    for match, arguments in {
        "x_codes.dim": (x[0], s, operand),
        "x_codes.dtype": (x.float(), s, operand),
        "x_codes.shape": (x[:, :32], s, operand),
        "x_scale.dtype": (x, s.double(), operand),
        "x_scale.shape": (x, s[:, None], operand),
        "x_scale.device": (x, s.to("meta"), operand),
        "bias.shape": (x, s, operand, torch.zeros(7)),
        "bias.dtype": (x, s, operand, torch.zeros(8, dtype=torch.int32)),
        "out_dtype": (x, s, operand, None, torch.int32),
        "x_codes.device": (x.to("meta"), s.to("meta"), operand),
        "operand": (x, s, Operand({})),
    }.items():
        with pytest.raises(InputError, match=match):
            plan.linear(*arguments)


def test_forcing_needs_a_known_and_able_implementation(layer, monkeypatch):
    problem = layer(8, 64).problem
    with pytest.raises(InputError, match="names no implementation"):
        w4a8_linear.plan(problem, force="cutlass")
    monkeypatch.setattr("quattuor.kernels.w4a8_linear.float32.uses_tf32", lambda: True)
    on_gpu = dataclasses.replace(problem, device_type="cuda", compute_capability=(9, 0))
    with pytest.raises(UnsupportedError, match="TF32"):
        w4a8_linear.plan(on_gpu, force="float32")


def test_sixteen_bit_activations_are_sent_elsewhere():
    problem = LinearProblem(out_features=8, in_features=8, activation_bits=16)
    with pytest.raises(InputError, match="use w4a16_linear"):
        w4a8_linear.plan(problem)


@pytest.mark.parametrize("name", ["float32", "reference"])
def test_framework_operator_check(layer, inputs, name):
    made = layer(6, 40, group_size=8)
    plan = w4a8_linear.plan(made.problem, force=name)
    operand = plan.prepare(made.codes, made.scale, made.group_scale).layout(plan.schedule.chosen[0].layout)
    x_codes, x_scale = inputs(3, 40)
    arguments = (x_codes, x_scale, None, list(operand.values()), ",".join(operand), torch.randn(6), torch.float16)
    results = torch.library.opcheck(torch.ops.quattuor.w4a8_linear, (*arguments, name, 6, 4, 8, False))
    assert set(results.values()) == {"SUCCESS"}
