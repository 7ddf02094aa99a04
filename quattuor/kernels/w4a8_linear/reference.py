# SPDX-License-Identifier: Apache-2.0
"""The definition of the operation in plain PyTorch; every other implementation must agree bit for bit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem

__all__ = ["Reference", "finish", "int8_weight"]


def int8_weight(problem: LinearProblem, codes: Tensor, group_scale: Tensor | None) -> Tensor:
    """Return the int8 weight that the integer product uses.

    Per channel it is the codes. With groups, w8 = clamp(rne(code * group_scale), -128, 127): the product has
    at most 19 significant bits, exact in float32, so there is one rounding.
    """
    if group_scale is None:
        return codes
    scale_NK = group_scale.float().repeat_interleave(problem.group_size, dim=1)[:, : problem.in_features]
    return torch.round(codes.float() * scale_NK).clamp_(-128, 127).to(torch.int8)


def finish(sum_MN: Tensor, scale: Tensor, x_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Scale exact integer sums in float32, in this order, and round once to the output dtype."""
    out_MN = sum_MN.to(torch.float32) * scale * x_scale[:, None]
    if bias is not None:
        out_MN = out_MN + bias.float()
    return out_MN.to(out_dtype)


class Reference(Implementation):
    """y = float32((x_codes - z) @ w8.T) * scale * x_scale (+ bias); the product in float64, exact below 2^53."""

    name = "reference"
    layout = "codes"
    stored_bits = dict.fromkeys(range(2, 9), 8)

    def supports(self, problem: LinearProblem) -> str | None:
        return None

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        codes, scale, group_scale = tensors
        named = {"codes": codes.contiguous(), "scale": scale.contiguous()}
        return named if group_scale is None else named | {"group_scale": group_scale.contiguous()}

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        x_codes, x_scale, x_zero_point = inputs
        weight_NK = int8_weight(problem, operand["codes"], operand.get("group_scale"))
        x_MK = x_codes.double()
        if x_zero_point is not None:
            x_MK = x_MK - x_zero_point[:, None]
        sum_MN = x_MK @ weight_NK.double().T
        return finish(sum_MN, operand["scale"], x_scale, bias, out_dtype)
