# SPDX-License-Identifier: Apache-2.0
"""The operation on weights in the order of lanes: which problems it takes, and the warps of a program."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, TokenRange
from quattuor.kernels.lut_linear.lanes.layout import BLOCK_K, STEP_K, TILE_ROWS, prepare_lanes
from quattuor.kernels.lut_linear.layout import MAX_LOOK_UP_BITS
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.lut_linear.triton import MANY_TOKENS, STORED_BITS, reason_against, rows_at_once
from quattuor.kernels.w4a8_linear.triton import processors

__all__ = ["Lanes", "choose_warps"]

#: Warps that keep a multiprocessor busy; fewest and most of a program.
WARPS_OF_PROCESSOR, MIN_WARPS, MAX_WARPS = 16, 2, 8


def choose_warps(problem: LutProblem, num_processors: int) -> int:
    """Return how many warps share the blocks of 16 rows: enough to keep the device busy."""
    row_tiles, num_blocks = -(-problem.out_features // TILE_ROWS), -(-problem.in_features // BLOCK_K)
    num_warps = MIN_WARPS
    is_idle = row_tiles * num_warps < WARPS_OF_PROCESSOR * num_processors
    while is_idle and 2 * num_warps <= min(MAX_WARPS, num_blocks):
        num_warps *= 2
        is_idle = row_tiles * num_warps < WARPS_OF_PROCESSOR * num_processors
    return num_warps


class Lanes(Implementation):
    """Bytes of codes times four bytes of each activation, summed as integers; decoded for more tokens."""

    name = "lanes"
    layout = "lanes"
    stored_bits = STORED_BITS

    def supports(self, problem: LutProblem) -> str | None:
        if problem.kind == "codebook" and problem.weight_bits > MAX_LOOK_UP_BITS:
            return f"holds at most {2**MAX_LOOK_UP_BITS} entries in registers, not {2**problem.weight_bits}"
        if problem.group_size and problem.group_size % STEP_K:
            return f"needs a group size that is a multiple of {STEP_K}, not {problem.group_size}"
        return reason_against(problem)

    def declines(self, problem: LutProblem, tokens: TokenRange) -> str | None:
        # Interpreter and assembly checks are no proof: what never ran on a device is not chosen silently.
        return "has not run on a GPU in this form; force it to try it"

    def prepare(self, problem: LutProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_lanes(problem, *tensors)

    def linear(
        self,
        problem: LutProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from quattuor.kernels.lut_linear.decode_kernel import linear_rows
        from quattuor.kernels.lut_linear.lanes.decode_kernel import decode_rows
        from quattuor.kernels.lut_linear.lanes.product_kernel import launch

        (x,) = inputs
        out = torch.empty(x.shape[0], problem.out_features, dtype=out_dtype, device=x.device)
        if x.shape[0] == 0:
            return out
        x = x if x.stride(1) == 1 else x.contiguous()
        bias = bias if bias is None else bias.contiguous()
        with torch.cuda.device_of(x):
            if x.dtype == torch.float32 or x.shape[0] >= MANY_TOKENS:
                linear_rows(problem, x, operand, bias, out, rows_at_once(problem, x), decode=decode_rows)
            else:
                num_warps = choose_warps(problem, processors(x.device)[0])
                launch(problem, x, operand, bias, out, num_warps=num_warps)
        return out
