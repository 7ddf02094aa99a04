# SPDX-License-Identifier: Apache-2.0
"""Planes by table look-up, in plain PyTorch: the method of the paper, a byte of signs at a time.

For every run of 8 inputs a table holds the 256 sums of +-x; a byte of a plane then selects one of them, and the
scale of a group multiplies a sum of look-ups. No weight is ever decoded.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.dispatch import Implementation
from quattuor.kernels.lut_linear.problem import PACKED_BITS, LutProblem
from quattuor.kernels.lut_linear.reference import add_sparse, finish

__all__ = ["Tables", "sign_sums"]

RUN = 8


def sign_sums(x: Tensor) -> Tensor:
    """Return T[m, r, p] = sum_i (2 bit_i(p) - 1) x[m, 8 r + i] as [M, K / 8, 256], built by doubling."""
    x_MRI = x.float().unflatten(1, (-1, RUN))
    sums_MRP = -x_MRI.sum(dim=2, keepdim=True)
    for index in range(RUN):
        sums_MRP = torch.cat([sums_MRP, sums_MRP + 2 * x_MRI[..., index : index + 1]], dim=2)
    return sums_MRP


class Tables(Implementation):
    """256-entry tables of the inputs, gathered by the bytes of the planes; memory-hungry, for checking."""

    name = "tables"
    layout = "bytes"
    stored_bits = PACKED_BITS

    def supports(self, problem: LutProblem) -> str | None:
        if problem.kind != "planes":
            return "looks up bytes of planes, and a codebook has none"
        if problem.group_size is not None and problem.group_size % RUN:
            return f"needs a group size that is a multiple of {RUN}, not {problem.group_size}"
        return None

    def declines(self, problem: LutProblem, tokens: object) -> str | None:
        return "is slower than a decoded weight in plain PyTorch; force it to check the method"

    def prepare(self, problem: LutProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        codes, table, offset, *sparse = tensors
        padded = pad(codes, (0, -problem.in_features % RUN))
        powers = 2 ** torch.arange(RUN, device=codes.device)
        bytes_NPR = torch.stack(
            [
                (((padded >> plane) & 1).unflatten(1, (-1, RUN)) * powers).sum(dim=-1)
                for plane in range(problem.weight_bits)
            ],
            dim=1,
        )
        named = {"bytes": bytes_NPR.to(torch.uint8), "table": table.contiguous()}
        names = ("offset", "row_offsets", "columns", "values")
        rest = zip(names, (offset, *sparse), strict=True)
        return named | {name: tensor.contiguous() for name, tensor in rest if tensor is not None}

    def linear(
        self,
        problem: LutProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        (x,) = inputs
        alpha_NGP = operand["table"].float()
        num_runs = operand["bytes"].shape[2]
        runs_per_group = num_runs if problem.group_size is None else problem.group_size // RUN
        group_R = torch.arange(num_runs, device=x.device) // runs_per_group
        bytes_RC = operand["bytes"].permute(2, 0, 1).reshape(num_runs, -1).long()
        sums_MRP = sign_sums(pad(x, (0, -problem.in_features % RUN)))
        rows = []
        for sums_RP in sums_MRP:  # one token at a time: N * b * K / 8 sums
            found_RC = sums_RP.gather(1, bytes_RC)
            found_GC = found_RC.new_zeros(problem.num_groups, found_RC.shape[1]).index_add_(0, group_R, found_RC)
            found_GNP = found_GC.unflatten(1, (-1, problem.weight_bits))
            y_N = (found_GNP * alpha_NGP.transpose(0, 1)).sum(dim=(0, 2))
            if "offset" in operand:
                whole_G = sums_RP.new_zeros(problem.num_groups).index_add_(0, group_R, sums_RP[:, -1])
                y_N = y_N + operand["offset"].float() @ whole_G
            rows.append(y_N)
        out_MN = torch.stack(rows) if rows else x.new_zeros(0, problem.out_features, dtype=torch.float32)
        return finish(add_sparse(out_MN, x, operand), bias, out_dtype)
