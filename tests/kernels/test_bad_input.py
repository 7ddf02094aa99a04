# SPDX-License-Identifier: Apache-2.0
"""Every operation refuses wrong inputs with a message of five parts, before an implementation is asked."""

from dataclasses import dataclass, replace

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.kernels import lut_linear, token_quantize, w4a8_linear, w4a16_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.token_quantize import op as token_quantize_op

N, K, M, GROUP = 24, 128, 3, 64


@dataclass(frozen=True)
class Case:
    """An operation with a legal weight and legal tokens."""

    operation: object
    problem: object
    weight: tuple
    tokens: tuple


def cases() -> dict[str, Case]:
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    wide = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    tokens = (torch.randint(-127, 128, (M, K), dtype=torch.int8), torch.rand(M))
    sizes = {"out_features": N, "in_features": K}
    groups = torch.ones(N, K // GROUP)
    return {
        "w4a8_linear": Case(
            w4a8_linear,
            LinearProblem(**sizes, group_size=GROUP),
            (codes, torch.rand(N), groups.half()),
            tokens,
        ),
        "w8a8_linear": Case(w4a8_linear, LinearProblem(**sizes, weight_bits=8), (wide, torch.rand(N)), tokens),
        "w4a16_linear": Case(
            w4a16_linear,
            LinearProblem(**sizes, group_size=GROUP, activation_bits=16),
            (codes, groups),
            (torch.randn(M, K),),
        ),
        "lut_linear": Case(
            lut_linear,
            LutProblem(**sizes, weight_bits=4, kind="codebook"),
            (codes.abs().clamp(max=7).to(torch.uint8), torch.randn(N, 1, 16).half()),
            (torch.randn(M, K),),
        ),
    }


@pytest.fixture
def no_launch(monkeypatch):
    """Fail the test when an implementation is asked to compute or to lay a weight out."""

    def refuse(*arguments, **options):
        raise AssertionError("an implementation was reached")

    for implementation in (*w4a8_linear.op.IMPLEMENTATIONS, *w4a16_linear.op.IMPLEMENTATIONS):
        monkeypatch.setattr(type(implementation), "linear", refuse)
        monkeypatch.setattr(type(implementation), "prepare", refuse)
    for implementation in lut_linear.op.IMPLEMENTATIONS:
        monkeypatch.setattr(type(implementation), "linear", refuse)
        monkeypatch.setattr(type(implementation), "prepare", refuse)
    monkeypatch.setattr(token_quantize_op, "implementation", refuse)


def spoiled(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return one tensor for each way to be wrong: dtype, device, and length along K or along the only axis."""
    return {
        "dtype": tensor.to(torch.int64),
        "device": tensor.to("meta"),
        "shape": tensor[..., :-1],
    }


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("way", ["dtype", "device", "shape"])
def test_weights_are_refused(no_launch, name, way):
    case = cases()[name]
    plan = case.operation.plan(case.problem)
    for i, tensor in enumerate(case.weight):
        if i == 0 and way == "device":
            continue  # the others are compared with the first
        wrong = [*case.weight[:i], spoiled(tensor)[way], *case.weight[i + 1 :]]
        with pytest.raises(InputError, match=rf"\.{way}=.* is not "):
            plan.prepare(*wrong)


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("way", ["dtype", "device", "shape"])
def test_tokens_are_refused(request, name, way):
    case = cases()[name]
    plan = case.operation.plan(case.problem)
    operand = plan.prepare(*case.weight)
    request.getfixturevalue("no_launch")
    for i, tensor in enumerate(case.tokens):
        wrong = [*case.tokens[:i], spoiled(tensor)[way], *case.tokens[i + 1 :]]
        with pytest.raises(InputError, match=rf"\.(?:{way})=|device=meta"):
            plan.linear(*wrong, operand)


@pytest.mark.parametrize("name", list(cases()))
def test_a_plan_for_another_device_is_refused(request, name):
    case = cases()[name]
    operand = case.operation.plan(case.problem).prepare(*case.weight)
    elsewhere = replace(case.problem, device_type="cuda", compute_capability=(9, 0))
    request.getfixturevalue("no_launch")
    with pytest.raises(InputError, match="is not a cuda device"):
        case.operation.plan(elsewhere).linear(*case.tokens, operand)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("w4a8_linear", "gluon"), ("w8a8_linear", "gluon"), ("w4a16_linear", "triton"), ("lut_linear", "lanes")],
)
def test_unsupported_groups_are_refused_when_the_layer_is_planned(no_launch, name, implementation):
    case = cases()[name]
    problem = replace(case.problem, group_size=7, device_type="cuda", compute_capability=(9, 0))
    with pytest.raises(UnsupportedError, match=r"group|at most 4 bits"):
        case.operation.plan(problem, force=implementation)
    rows = case.operation.plan(problem).explain()
    assert implementation not in {row.implementation for row in rows if row.is_chosen}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: token_quantize.token_quantize(x),
        lambda x: token_quantize.rms_norm_quantize(x, torch.ones(K), 1e-6),
        lambda x: token_quantize.silu_mul_quantize(x, x),
    ],
    ids=["token_quantize", "rms_norm_quantize", "silu_mul_quantize"],
)
@pytest.mark.parametrize(
    "x", [torch.zeros(M, K, dtype=torch.int32), torch.zeros(K), torch.zeros(1, M, K)], ids=str
)
def test_tokens_to_quantize_are_refused(no_launch, call, x):
    with pytest.raises(InputError, match=r"(x|gate)\.(dim|dtype)"):
        call(x)


def test_fused_inputs_must_fit(no_launch):
    x = torch.zeros(M, K)
    for way, other in {"dtype": x.half(), "device": x.to("meta"), "shape": x[:, 1:]}.items():
        with pytest.raises(InputError, match=rf"up\.{way}"):
            token_quantize.silu_mul_quantize(x, other)
        with pytest.raises(InputError, match=rf"residual\.{way}"):
            token_quantize.rms_norm_quantize(x, torch.ones(K), 1e-6, other)
    for way, gain in {"dtype": torch.ones(K, dtype=torch.int32), "shape": torch.ones(K - 1)}.items():
        with pytest.raises(InputError, match=rf"weight\.{way}"):
            token_quantize.rms_norm_quantize(x, gain, 1e-6)
    with pytest.raises(InputError, match="eps=0 is not positive"):
        token_quantize.rms_norm_quantize(x, torch.ones(K), 0)
