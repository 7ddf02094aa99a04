# SPDX-License-Identifier: Apache-2.0
"""The definition of the operation in plain PyTorch: decode the weight, multiply in float32."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem

__all__ = ["Reference", "decoded_weight", "multiply"]


def decoded_weight(problem: LinearProblem, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return scale * (codes - zero_point) in float32, scales and zero points repeated over their groups."""
    group_size = problem.group_size or problem.in_features
    value_NK = codes.float()
    if zero_point is not None:
        value_NK = value_NK - spread(zero_point, group_size, problem.in_features)
    return spread(scale, group_size, problem.in_features) * value_NK


def spread(value_NG: Tensor, group_size: int, in_features: int) -> Tensor:
    """Repeat one value per group over the K weights of each row, in float32."""
    return value_NG.float().repeat_interleave(group_size, dim=1)[:, :in_features]


def multiply(x: Tensor, weight_NK: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Return x @ W.T (+ bias) in float32, rounded once to the output dtype."""
    out_MN = x.float() @ weight_NK.T
    if bias is not None:
        out_MN = out_MN + bias.float()
    return out_MN.to(out_dtype)


class Reference(Implementation):
    """y = x @ (scale * (codes - zero_point)).T (+ bias), decoding the weight anew for each call."""

    name = "reference"
    layout = "codes"
    stored_bits = dict.fromkeys(range(2, 9), 8)

    def supports(self, problem: LinearProblem) -> str | None:
        return None

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        codes, scale, zero_point = tensors
        named = {"codes": codes.contiguous(), "scale": scale.contiguous()}
        return named if zero_point is None else named | {"zero_point": zero_point.contiguous()}

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        weight_NK = decoded_weight(problem, operand["codes"], operand["scale"], operand.get("zero_point"))
        return multiply(inputs[0], weight_NK, bias, out_dtype)
