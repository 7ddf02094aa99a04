# SPDX-License-Identifier: Apache-2.0
"""The operation by decoding rows to the dtype of the tokens, on a GPU, from a byte for each code."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.lut_linear.reference import Reference
from quattuor.kernels.requirements import reason_against_triton

__all__ = ["Decoded", "linear_rows"]

#: Of the decoded rows that exist at a time.
SCRATCH_BYTES = 1 << 26

Decode = Callable[[LutProblem, Mapping[str, Tensor], int, Tensor], None]


def linear_rows(
    problem: LutProblem,
    x: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    *,
    decode: Decode,
) -> None:
    """Fill `out` [M, N] by decoding 64 MiB of rows at a time; `decode` fills rows from a given one on."""
    num_rows = max(1, SCRATCH_BYTES // (128 * problem.in_features * x.element_size())) * 128
    scratch = torch.empty(min(num_rows, problem.out_features), problem.in_features, dtype=x.dtype, device=x.device)
    for first in range(0, problem.out_features, num_rows):
        last = min(first + num_rows, problem.out_features)
        dense = scratch[: last - first]
        decode(problem, operand, first, dense)
        if bias is None and out.dtype == x.dtype:
            torch.mm(x, dense.T, out=out[:, first:last])
            continue
        y = torch.mm(x, dense.T) if x.dtype == torch.float32 else torch.mm(x, dense.T, out_dtype=torch.float32)
        out[:, first:last] = y if bias is None else y + bias[first:last].float()


class Decoded(Implementation):
    """Decodes 64 MiB of rows at a time to the tokens' dtype, single entries included; then dense products."""

    name = "decoded"
    layout = Reference.layout
    stored_bits = Reference.stored_bits

    def supports(self, problem: LutProblem) -> str | None:
        return reason_against_triton(problem)

    def prepare(self, problem: LutProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return Reference().prepare(problem, *tensors)

    def linear(
        self,
        problem: LutProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from quattuor.kernels.lut_linear.decode_kernel import decode_rows

        (x,) = inputs
        out = torch.empty(x.shape[0], problem.out_features, dtype=out_dtype, device=x.device)
        if x.shape[0]:
            with torch.cuda.device_of(x):
                linear_rows(problem, x, operand, bias, out, decode=decode_rows)
        return out
