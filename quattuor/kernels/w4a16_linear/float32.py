# SPDX-License-Identifier: Apache-2.0
"""The operation with the weight decoded once: the reference's product without its decoding."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem
from quattuor.kernels.w4a16_linear.reference import decoded_weight, multiply

__all__ = ["Float32"]


class Float32(Implementation):
    """Keeps the decoded weight as float32, 4 bytes each: fast on CPU, where half precision is not."""

    name = "float32"
    layout = "float32"
    stored_bits = dict.fromkeys(range(2, 9), 32)

    def supports(self, problem: LinearProblem) -> str | None:
        if problem.device_type != "cpu":
            return "a decoded float32 weight would take more memory than the layer before quantization"
        return None

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        codes, scale, zero_point = tensors
        return {"weight": decoded_weight(problem, codes, scale, zero_point)}

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return multiply(inputs[0], operand["weight"], bias, out_dtype)
