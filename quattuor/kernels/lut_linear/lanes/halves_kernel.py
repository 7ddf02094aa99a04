# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that writes tokens as float16 in the order of the tensor cores, and beside it transposed."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.lanes.layout import BLOCK_K
from quattuor.kernels.lut_linear.lanes.limbs_kernel import MAX_SEARCH, power_of_two

__all__ = ["TOKENS_OF_COLUMNS", "Halves", "halves_kernel", "halves_of"]

#: Columns of one product.
TOKENS_OF_COLUMNS = 8
#: Bits of a bfloat16 token's largest element in float16.
LARGEST_BITS = 15


@dataclass(frozen=True, slots=True)
class Halves:
    """Tokens as float16: `words` for the tensor cores, `unit` of a token, and `transposed` as they came.

    words       int32 [blocks, 8, tiles, 32, 4]: word 2 h + i of lane 4 g + t holds places i and i + 2 of token g
    unit        float32 [8 * tiles]; NaN for a token with an element that is not finite
    transposed  int32 [256 * blocks, 4, tiles]: word [t, i] of an element holds tokens 8 i + 2 t and the next
    """

    words: Tensor
    unit: Tensor
    transposed: Tensor


@triton.jit
def halves_kernel(
    x,
    words,
    unit,
    transposed,
    M,
    K,
    stride_xm,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SEARCH: tl.constexpr,
    STARTS: tl.constexpr,
):
    """One block of one token; SCALED multiplies it by a power of two: bfloat16 has exponents float16 lacks."""
    if STARTS:
        gdc_launch_dependents()
    block = tl.program_id(0)
    token = tl.program_id(1)
    num_tokens = tl.num_programs(1)
    scale = 1.0
    inverse = 1.0
    if SCALED:
        largest = tl.zeros((SEARCH,), dtype=tl.int32)
        for first in range(0, K, SEARCH):
            k = first + tl.arange(0, SEARCH)
            value = tl.load(x + token.to(tl.int64) * stride_xm + k, mask=(k < K) & (token < M), other=0.0)
            largest = tl.maximum(largest, tl.abs(value.to(tl.float32)).to(tl.int32, bitcast=True))
        scale, inverse = power_of_two(tl.max(largest, axis=0), BITS)
    k = tl.arange(0, 256)
    here = block * 256 + k
    value = tl.load(x + token.to(tl.int64) * stride_xm + here, mask=(here < K) & (token < M), other=0.0)
    # step, h, t, i: word 2 h + i % 2, half i // 2
    lane = token % 8 * 4 + k // 4 % 4
    place = ((block * 8 + k // 32) * (num_tokens // 8) + token // 8) * 256
    place += lane * 8 + (k // 16 % 2 * 2 + k % 2) * 2 + k // 2 % 2
    tl.store(words + place, (value.to(tl.float32) * scale).to(tl.float16))
    if TRANSPOSED:
        place = token % 8 // 2 * (num_tokens // 4) + token // 8 * 2 + token % 2
        tl.store(
            transposed + here.to(tl.int64) * num_tokens + place, (value.to(tl.float32) * scale).to(tl.float16)
        )
    if block == 0:
        tl.store(unit + token, inverse)


def halves_of(x: Tensor, num_blocks: int, tiles: int, *, is_transposed: bool, starts: bool) -> Halves:
    """Return the tokens x [M, K], zero beyond K and M.

    Args:
        x: float16 or bfloat16, rows contiguous.
        num_blocks: Blocks of 256 elements to write.
        tiles: Tiles of eight tokens to write.
        is_transposed: Write them transposed as well.
        starts: Let the next kernel start at once; it has to wait before it reads.
    """
    num_tokens, in_features = x.shape
    all_tokens = tiles * TOKENS_OF_COLUMNS
    words = torch.empty(num_blocks * BLOCK_K * all_tokens, dtype=torch.float16, device=x.device)
    unit = torch.empty(all_tokens, dtype=torch.float32, device=x.device)
    transposed = words
    if is_transposed:
        transposed = torch.empty(num_blocks * BLOCK_K * all_tokens, dtype=torch.float16, device=x.device)
    launcher(halves_kernel, (num_blocks, all_tokens))(
        x,
        words,
        unit,
        transposed,
        num_tokens,
        in_features,
        x.stride(0),
        BITS=LARGEST_BITS,
        SCALED=x.dtype != torch.float16,
        TRANSPOSED=is_transposed,
        SEARCH=min(MAX_SEARCH, triton.next_power_of_2(in_features)),
        STARTS=starts,
        num_warps=2 if x.dtype == torch.float16 else 8,
    )
    return Halves(words.view(torch.int32), unit, transposed.view(torch.int32))
