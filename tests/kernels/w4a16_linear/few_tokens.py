# SPDX-License-Identifier: Apache-2.0
"""Layers for the GPU tests of the kernels for few tokens, and what every tile of them must do."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device


class Layer(NamedTuple):
    """A random layer with tokens: the kernels' operand, and outputs in float64 and by the reference."""

    problem: LinearProblem
    x: Tensor
    bias: Tensor
    tensors: dict[str, Tensor]
    exact: Tensor
    plain: Tensor

    @property
    def weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Packed codes, scales, and zero points or offsets."""
        tensors = self.tensors
        return tensors["packed"], tensors["scale"], tensors.get("zero_point", tensors.get("offset"))


def random_layer(num_tokens: int, bits: int, group_size: int | None, zero: str) -> Layer:
    """Return a layer whose zero points are "none", "integer" or "real"; the tokens are every second row."""
    out_features, in_features = 391, 1300
    low = -(2 ** (bits - 1)) if zero == "none" else 0
    codes = torch.randint(low, low + 2**bits, (out_features, in_features), device="cuda")
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        zero_point=zero != "none",
        activation_bits=16,
        output_dtype=torch.float32,
        **describe_device("cuda"),
    )
    codes = codes.to(torch.int8 if zero == "none" else torch.uint8)
    scale = torch.randn(out_features, problem.num_groups, device="cuda")
    zero_point = None
    if zero != "none":
        zero_point = torch.rand_like(scale) * 2**bits
        zero_point = zero_point if zero == "real" else zero_point.floor()
    x = torch.randn(2 * num_tokens, in_features, device="cuda").half()[::2]
    bias = torch.randn(out_features, device="cuda")
    plans = {name: w4a16_linear.plan(problem, force=name) for name in ("triton", "reference")}
    prepared = {name: plan.prepare(codes, scale, zero_point) for name, plan in plans.items()}
    plain = plans["reference"].linear(x, prepared["reference"], bias)
    group_of_k = torch.arange(in_features, device="cuda") // (group_size or in_features)
    offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
    exact = x.double() @ (scale[:, group_of_k].double() * (codes.double() - offset)).T + bias
    return Layer(problem, x, bias, prepared["triton"].layout("fields"), exact, plain)


def check_runs(layer: Layer, run: Callable[[Tensor], Tensor], row: int) -> None:
    """Assert that outputs are right and repeat, that infinity spoils its token alone, and that graphs replay."""
    x = layer.x
    out = run(x)
    error, plain_error = ((result - layer.exact).abs().max() for result in (out, layer.plain))
    assert error <= 4 * plain_error + 1e-6 * layer.exact.abs().max()
    assert all(torch.equal(run(x), out) for _ in range(3))
    x[row, 3] = torch.inf
    spoilt = run(x)
    assert spoilt[row].isnan().all()
    assert torch.equal(spoilt[row + 1 :], out[row + 1 :])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    x[row, 3] = 0.5
    graph.replay()
    assert torch.equal(captured, run(x))
