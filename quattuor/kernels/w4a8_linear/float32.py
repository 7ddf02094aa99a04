# SPDX-License-Identifier: Apache-2.0
"""The operation through float32 matrix products: fast on any CPU, and exact.

A product of |x| <= 128 (255 when a zero point is subtracted) and |w| <= max_w is an integer below 2^24 after any
order of at most 2^24 / (128 * max_w) additions, and float32 holds such integers exactly. So K is cut into chunks
of that many columns, each chunk is one float32 product, and the chunks are added as integers in float64.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem
from quattuor.kernels.w4a8_linear.reference import finish, int8_weight

__all__ = ["Float32"]


def uses_tf32() -> bool:
    """Return whether float32 products on CUDA devices are set to TF32."""
    return torch.get_float32_matmul_precision() != "highest"


def chunk_size(problem: LinearProblem) -> int:
    """Return the columns of K whose partial sums stay at or below 2^24 in absolute value."""
    max_weight = problem.max_code if problem.group_size is None else 128
    max_token = 255 if problem.activation_zero_point else 128
    return 2**24 // (max_token * max_weight)


class Float32(Implementation):
    """Exact integer sums by float32 products over chunks of K; keeps the weight as float32, 4 bytes each."""

    name = "float32"
    layout = "float32"
    stored_bits = dict.fromkeys(range(2, 9), 32)

    def supports(self, problem: LinearProblem) -> str | None:
        if problem.device_type == "cuda" and uses_tf32():
            return "float32 products on this device are set to TF32, whose sums need not be exact"
        return None

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        codes, scale, group_scale = tensors
        return {"weight": int8_weight(problem, codes, group_scale).float(), "scale": scale.contiguous()}

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        x_codes, x_scale, x_zero_point = inputs
        x_MK, weight_NK = x_codes.float(), operand["weight"]
        if x_zero_point is not None:
            x_MK = x_MK - x_zero_point[:, None]
        chunk = chunk_size(problem)
        if problem.in_features <= chunk:
            sum_MN = x_MK @ weight_NK.T
        else:
            sum_MN = torch.zeros(x_MK.shape[0], problem.out_features, dtype=torch.float64, device=x_MK.device)
            for start in range(0, problem.in_features, chunk):
                sum_MN += x_MK[:, start : start + chunk] @ weight_NK[:, start : start + chunk].T
        return finish(sum_MN, operand["scale"], x_scale, bias, out_dtype)
