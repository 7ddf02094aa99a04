# SPDX-License-Identifier: Apache-2.0
"""The operation in Triton: which problems it takes, the weight layout, the tile for each token count."""

import importlib.util
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.dispatch import Implementation, LinearProblem
from quattuor.kernels.w4a8_linear.planes import (
    BLOCK_K,
    MAX_SPLIT_TILES,
    PLANE_K,
    STORED_BITS,
    TILE_ROWS,
    Tile,
    pack_planes,
    pad_weight,
    tile_rows,
)
from quattuor.kernels.w4a8_linear.triton import processors

__all__ = ["Triton", "choose_tile", "prepare_tensors"]

#: Elements of K that one tensor-core product takes: a shorter piece of a group would not fill it.
MIN_PIECE = 16


def piece_of(problem: LinearProblem) -> int:
    """Return the longest run of K, at most a plane, that never crosses a group."""
    return math.gcd(problem.group_size, PLANE_K) if problem.group_size else PLANE_K


def choose_tile(
    num_tokens: int,
    out_features: int,
    num_blocks: int,
    num_processors: int,
    has_warpgroups: bool,
    element_size: int = 2,
) -> Tile:
    """Return the tile for a token count: small, with K split, while tiles are few; wide otherwise.

    Activations of 4 bytes leave shared memory for 16 tokens, and for two stages when codes take a byte.
    """
    if element_size == 4:
        rows, tokens, num_warps, num_stages, per_processor = 64, 16, 4, 2, 3
    elif num_tokens <= 16:
        rows, tokens, num_warps, num_stages, per_processor = 64, 16, 4, 4, 3
    elif num_tokens <= 64 or not has_warpgroups:
        rows, tokens, num_warps, num_stages, per_processor = 64, 64, 4, 3, 2
    else:
        # 128 tokens would need more registers than there are: the sums of a group and of all groups coexist
        rows, tokens, num_warps, num_stages, per_processor = 128, 64, 8, 3, 1
    tiles = -(-out_features // rows) * -(-num_tokens // tokens)
    # a part shorter than 4 blocks costs more in partial sums than it gains in occupancy
    split = max(1, min(num_processors * per_processor // tiles, num_blocks // 4))
    return Tile(rows=rows, tokens=tokens, split=split, num_warps=num_warps, num_stages=num_stages)


def prepare_tensors(
    problem: LinearProblem, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> dict[str, Tensor]:
    """Return the padded tensors of the kernel.

    packed       int8 tiles of nibbles up to 4 bits, of bytes above; unsigned codes are stored less 2^(b-1)
    scale        float32 [G', N']
    zero_point   float32 [G', N'], shifted like the codes; absent where it is zero throughout
    arrivals     int32 zeros: counters of programs that share a tile, zero again after every launch
    """
    shift = problem.max_code if codes.dtype == torch.uint8 else 0
    signed = (codes.to(torch.int16) - shift).to(torch.int8)
    packed = pack_planes(signed) if problem.weight_bits <= 4 else tile_rows(pad_weight(signed))
    padded_features = problem.in_features + -problem.in_features % BLOCK_K
    groups = -(-padded_features // (problem.group_size or padded_features))
    padding = (0, packed.shape[0] * TILE_ROWS - problem.out_features, 0, groups - problem.num_groups)
    named = {
        "packed": packed,
        "scale": pad(scale.float().T, padding).contiguous(),
        "arrivals": torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=codes.device),
    }
    if zero_point is not None or shift:
        zero = torch.zeros_like(scale, dtype=torch.float32) if zero_point is None else zero_point.float()
        named["zero_point"] = pad((zero - shift).T, padding).contiguous()
    return named


class Triton(Implementation):
    """Plain Triton: codes unpacked in registers, scaled after the product of each group."""

    name = "triton"
    layout = "planes"
    stored_bits = STORED_BITS

    def supports(self, problem: LinearProblem) -> str | None:
        if problem.device_type != "cuda":
            return f"runs on CUDA devices, not on {problem.device_type}"
        if problem.compute_capability is None or problem.compute_capability < (8, 0):
            return f"needs compute capability 8.0, not {problem.compute_capability}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if piece_of(problem) < MIN_PIECE:
            return f"needs a group size that is a multiple of {MIN_PIECE}, not {problem.group_size}"
        return None

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_tensors(problem, *tensors)

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from quattuor.kernels.w4a16_linear.triton_kernel import launch

        (x,) = inputs
        num_tokens = x.shape[0]
        out = torch.empty(num_tokens, problem.out_features, dtype=out_dtype, device=x.device)
        if num_tokens == 0:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        num_blocks = -(-problem.in_features // BLOCK_K)
        with torch.cuda.device_of(x):
            launch(
                x,
                operand["packed"],
                operand["scale"],
                operand.get("zero_point"),
                operand["arrivals"],
                bias if bias is None else bias.contiguous(),
                out,
                nibbles=problem.weight_bits <= 4,
                group_size=problem.group_size or num_blocks * BLOCK_K,
                piece=piece_of(problem),
                tile=choose_tile(
                    num_tokens, problem.out_features, num_blocks, *processors(x.device), x.element_size()
                ),
            )
        return out
