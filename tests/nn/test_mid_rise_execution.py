# SPDX-License-Identifier: Apache-2.0
"""Levels between codes run through the kernel of uniform codes, in their packed form, where there is a GPU."""

import pytest
import torch

from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.nn import execution
from quattuor.nn.execution import DecodedExecution, FloatExecution, make_execution
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.solvers import WeightToQuantize
from quattuor.systems import quip


def quantized(bits: int, generator: torch.Generator) -> QuantizedTensor:
    inputs = torch.randn(256, 96, generator=generator)
    weight = torch.randn(48, 96, generator=generator)
    item = WeightToQuantize(name="linear", weight=weight, statistics={})
    return quip(bits).weights.solve([item], {"hessian": inputs.T @ inputs})[0].tensor


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_kernel_computes_the_decoded_codes(bits: int, generator: torch.Generator) -> None:
    tensor = quantized(bits, generator)
    problem = LinearProblem(out_features=48, in_features=96, weight_bits=bits, zero_point=True, activation_bits=16)
    x = torch.randn(5, 96, generator=generator)
    expected = x.double() @ tensor.decode_codes().double().T
    assert expected.abs().max() > 1
    for name in ("reference", "float32"):
        linear = FloatExecution(w4a16_linear.plan(problem, name)).prepared(tensor)
        torch.testing.assert_close(linear.linear(x, None, torch.float32).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_gpu_multiplies_packed_codes_and_a_cpu_the_decoded_weight(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = quantized(2, generator)
    options = {"force": None, "dtype": torch.float16, "name": "linear"}
    assert isinstance(make_execution(tensor, None, device=torch.device("cpu"), **options), DecodedExecution)
    hopper = {"device_type": "cuda", "compute_capability": (9, 0)}
    monkeypatch.setattr(execution, "describe_device", lambda device: hopper)
    chosen = make_execution(tensor, None, device=torch.device("cuda"), **options)
    assert isinstance(chosen, FloatExecution)
    assert chosen.plan.implementation(1) == "triton"
    assert chosen.plan.problem.zero_point
