# SPDX-License-Identifier: Apache-2.0
"""The operation for one token by products of four bytes at a time: which problems it takes, and the tile."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem, TokenRange
from quattuor.kernels.requirements import reason_against_triton
from quattuor.kernels.w4a8_linear import measured
from quattuor.kernels.w4a8_linear.lane_scales import STEP_BLOCKS, reason_against_groups
from quattuor.kernels.w4a8_linear.narrow import width_of
from quattuor.kernels.w4a8_linear.planes import (
    BLOCK_K,
    PLANE_K,
    STORED_BITS,
    LanesTile,
    group_scale_of,
    prepare_planes,
    remark_on_clamps,
)

__all__ = ["MAX_TOKENS", "Lanes", "choose_lanes_tile"]

#: Beyond, tensor cores add products of more tokens in the same time.
MAX_TOKENS = 1
#: Outputs beyond which programs of 8 rows are more than fit an H200 at once.
MANY_OUTPUTS = 8448
#: Steps over K from which more of them are loaded ahead, and up to which registers hold most of K.
MANY_STEPS, FEW_STEPS = 10, 4


def choose_lanes_tile(out_features: int, num_blocks: int) -> LanesTile:
    """Return the tile of a layer that was not measured, by its outputs and the blocks of its K."""
    steps = -(-num_blocks // STEP_BLOCKS)
    if steps <= FEW_STEPS and out_features > MANY_OUTPUTS:
        return LanesTile(rows=16, num_warps=4, ahead=min(2, steps))
    return LanesTile(rows=8, num_warps=4, ahead=min(5 if steps >= MANY_STEPS else 3, steps))


@functools.lru_cache(maxsize=4096)
def tile_for(problem: LinearProblem, is_gated: bool = False) -> LanesTile:
    """Return the measured tile of a layer, or the one that the rule gives; for gates, warps take rows by twos.

    Shorter groups take the tile of groups of a plane: they only bring more scales.
    """
    if problem.group_size is not None and problem.group_size % PLANE_K:
        problem = replace(problem, group_size=PLANE_K)
    choice = measured.find(problem, MAX_TOKENS)
    if choice is not None and isinstance(choice.tile, LanesTile):
        own_rows = choice.tile.rows // choice.tile.num_warps
        if not is_gated or own_rows % 2 == 0:
            return choice.tile
    return choose_lanes_tile(problem.out_features, problem.in_features // BLOCK_K)


class Lanes(Implementation):
    """Each thread adds products of four bytes at a time, and weights go straight to registers: one token."""

    name = "lanes"
    layout = "planes"
    stored_bits = STORED_BITS

    def supports(self, problem: LinearProblem) -> str | None:
        reason = reason_against_triton(problem)
        if reason is not None:
            return reason
        if width_of(problem) != 4:
            return f"unpacks nibbles, in which codes of {problem.weight_bits} bits are not kept"
        if problem.activation_zero_point:
            return "subtracts no zero points of activations"
        return reason_against_groups(problem)

    def declines(self, problem: LinearProblem, tokens: TokenRange) -> str | None:
        if tokens.last is None or tokens.last > MAX_TOKENS:
            return "adds up token by token, where tensor cores take several at once"
        choice = measured.find(problem, tokens.last)
        if choice is not None and choice.implementation != self.name:
            return f"{choice.implementation} was measured to be faster on this layer"
        return None

    def remark(self, problem: LinearProblem, tokens: TokenRange) -> str:
        return remark_on_clamps(problem)

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_planes(problem, *tensors)

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        x_codes, x_scale, _ = inputs
        return multiply(problem, x_codes, x_scale, operand, bias, out_dtype, is_gated=False)

    def gates(self, problem: LinearProblem) -> bool:
        """Return whether a program can hold a gate and what it multiplies."""
        return problem.out_features % tile_for(problem, is_gated=True).rows == 0

    def gated(
        self,
        problem: LinearProblem,
        x_codes: Tensor,
        x_scale: Tensor,
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Return silu(gate) * up [M, N / 2], each rounded to `out_dtype`, of the outputs [gate, up]."""
        return multiply(problem, x_codes, x_scale, operand, bias, out_dtype, is_gated=True)


def multiply(
    problem: LinearProblem,
    x_codes: Tensor,
    x_scale: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    is_gated: bool,
) -> Tensor:
    """Launch the kernel; with `force` for any number of tokens, one by one."""
    from quattuor.kernels.w4a8_linear.lanes_kernel import launch_lanes

    features = problem.out_features // 2 if is_gated else problem.out_features
    out = torch.empty(x_codes.shape[0], features, dtype=out_dtype, device=x_codes.device)
    if x_codes.shape[0] == 0:
        return out
    if x_codes.stride(1) != 1 or x_codes.stride(0) % 16 or x_codes.data_ptr() % 16:
        x_codes = x_codes.clone(memory_format=torch.contiguous_format)
    with torch.cuda.device_of(x_codes):
        launch_lanes(
            x_codes,
            x_scale.contiguous(),
            operand["packed"],
            operand["scale"],
            bias if bias is None else bias.contiguous(),
            out,
            tile=tile_for(problem, is_gated),
            mode=group_scale_of(problem, operand)[0],
            lane_scales=operand.get("lane_scales"),
            is_gated=is_gated,
        )
    return out
