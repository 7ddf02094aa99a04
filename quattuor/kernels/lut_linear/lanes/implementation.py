# SPDX-License-Identifier: Apache-2.0
"""The operation on weights in the order of lanes: problems it takes, and the kernel for a count of tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, TokenRange
from quattuor.kernels.lut_linear.decoded import linear_rows
from quattuor.kernels.lut_linear.lanes.layout import (
    BLOCK_K,
    HALF_STEP_K,
    MAX_LOOK_UP_BITS,
    STEP_K,
    TILE_ROWS,
    prepare_lanes,
)
from quattuor.kernels.lut_linear.problem import PACKED_BITS, LutProblem
from quattuor.kernels.requirements import reason_against_triton
from quattuor.kernels.w4a8_linear.triton import processors

__all__ = ["Lanes", "choose_batch_warps", "choose_warps", "fewest_warps"]

#: Warps that keep a multiprocessor busy; most of a program that share the blocks of K.
WARPS_OF_PROCESSOR, MAX_WARPS = 16, 8
#: Up to here the products unpack the weight; beyond, it is decoded once.
MAX_BATCH = 64
#: Up to here warps need few registers for the sums of a batch.
SMALL_BATCH = 16


def choose_warps(problem: LutProblem, num_processors: int, fewest: int) -> int:
    """Return how many warps share the blocks of 16 rows: enough to keep the device busy."""
    row_tiles, num_blocks = -(-problem.out_features // TILE_ROWS), -(-problem.in_features // BLOCK_K)
    num_warps = fewest
    is_idle = row_tiles * num_warps < WARPS_OF_PROCESSOR * num_processors
    while is_idle and 2 * num_warps <= min(MAX_WARPS, num_blocks):
        num_warps *= 2
        is_idle = row_tiles * num_warps < WARPS_OF_PROCESSOR * num_processors
    return num_warps


def fewest_warps(problem: LutProblem) -> int:
    """Return how many warps share the blocks of 16 rows of a large layer, for one token; what was fastest."""
    if problem.kind == "codebook":
        return 2 if problem.weight_bits == MAX_LOOK_UP_BITS else 4
    return 2 if problem.group_size or problem.weight_bits == 3 else 4


def choose_batch_warps(problem: LutProblem, num_tokens: int, num_processors: int) -> tuple[int, int]:
    """Return the warps of a program for different rows and those that share the blocks of K.

    Programs of few warps fall out of step, so that some load while others multiply; rows in one program share the
    tokens in the first cache, which counts where these are many.
    """
    sharing = choose_warps(problem, num_processors, 2)
    if num_tokens <= SMALL_BATCH:
        return max(1, 4 // sharing), sharing
    return (4, 2) if sharing == 2 else (2, 4)


def takes_bytes(problem: LutProblem) -> bool:
    """Return whether one token meets the weight as bytes: a product takes 32 elements of one group."""
    return problem.group_size is None or problem.group_size % STEP_K == 0


class Lanes(Implementation):
    """Bytes of codes times four bytes of one token, float16 weights times a batch; decoded for more tokens."""

    name = "lanes"
    layout = "lanes"
    stored_bits = PACKED_BITS

    def supports(self, problem: LutProblem) -> str | None:
        if problem.kind == "codebook" and problem.weight_bits > MAX_LOOK_UP_BITS:
            return f"holds at most {2**MAX_LOOK_UP_BITS} entries in registers, not {2**problem.weight_bits}"
        if problem.group_size and problem.group_size % HALF_STEP_K:
            return f"needs a group size that is a multiple of {HALF_STEP_K}, not {problem.group_size}"
        if problem.kind == "codebook" and problem.table_dtype != torch.float16:
            return "looks up float16 entries, not float32 ones"
        return reason_against_triton(problem)

    def remark(self, problem: LutProblem, tokens: TokenRange) -> str:
        return f"decodes 64 MiB of rows at a time beyond {MAX_BATCH} tokens" if tokens.first > MAX_BATCH else ""

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
        from quattuor.kernels.lut_linear.lanes import batch_kernel, token_kernel
        from quattuor.kernels.lut_linear.lanes.decode_kernel import decode_rows

        (x,) = inputs
        out = torch.empty(x.shape[0], problem.out_features, dtype=out_dtype, device=x.device)
        if x.shape[0] == 0:
            return out
        x = x if x.stride(1) == 1 else x.contiguous()
        bias = bias if bias is None else bias.contiguous()
        with torch.cuda.device_of(x):
            if x.dtype == torch.float32 or len(x) > MAX_BATCH:
                linear_rows(problem, x, operand, bias, out, decode=decode_rows)
            elif len(x) == 1 and takes_bytes(problem):
                num_warps = choose_warps(problem, processors(x.device)[0], fewest_warps(problem))
                token_kernel.launch(problem, x, operand, bias, out, num_warps=num_warps)
            else:
                row_warps, k_warps = choose_batch_warps(problem, len(x), processors(x.device)[0])
                warps = {"row_warps": row_warps, "k_warps": k_warps}
                batch_kernel.launch(problem, x, operand, bias, out, **warps)
        return out
