# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that writes tokens as four signed bytes for each element, in the order of the tensor cores."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.lanes.layout import BLOCK_K

__all__ = ["TOKENS_OF_TILE", "Limbs", "limbs_kernel", "limbs_of"]

#: Two tokens of four bytes are the eight columns of one product.
TOKENS_OF_TILE = 2
#: Elements of a token that a program searches at once for the largest.
SEARCH = 4096
#: Bits of the integers, without their sign: a bit of a plane multiplies them by up to 128 more.
BITS_OF_PLANES, BITS_OF_ENTRIES = 22, 29


@dataclass(frozen=True, slots=True)
class Limbs:
    """Tokens as integers: `words` for the tensor cores, `unit` of a token, `sums` of its elements.

    words  int32 [blocks, 4, tiles, 32, 4]
    unit   float32 [2 * tiles]; NaN for a token with an element that is not finite
    sums   float32 [blocks * parts, 2 * tiles]
    """

    words: Tensor
    unit: Tensor
    sums: Tensor


@triton.jit
def scale_of(x, token, M, K, stride_xm, BITS: tl.constexpr, SEARCH: tl.constexpr):
    """The power of two that makes a token's largest element an integer of BITS bits, and its inverse."""
    largest = tl.zeros((SEARCH,), dtype=tl.int32)
    for first in range(0, K, SEARCH):
        k = first + tl.arange(0, SEARCH)
        value = tl.load(x + token.to(tl.int64) * stride_xm + k, mask=(k < K) & (token < M), other=0.0)
        # as an integer, a number that is not finite is above all others
        largest = tl.maximum(largest, tl.abs(value.to(tl.float32)).to(tl.int32, bitcast=True))
    exponent = tl.max(largest, axis=0) >> 23
    is_finite = exponent < 255
    exponent = tl.minimum(tl.maximum(exponent, 40), 254)
    scale = ((BITS - 1 + 254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, tl.where(is_finite, 1.0 / scale, float("nan"))


@triton.jit
def limbs_kernel(
    x,
    words,
    unit,
    sums,
    M,
    K,
    stride_xm,
    BITS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PARTS: tl.constexpr,
    SEARCH: tl.constexpr,
    STARTS: tl.constexpr,
):
    """One block of two tokens; SHIFTED multiplies step s by 2^(7 - s), and the last by -1, the sign of bit 7."""
    if STARTS:
        gdc_launch_dependents()
    block = tl.program_id(0)
    tile = tl.program_id(1)
    num_tiles = tl.num_programs(1)
    first_scale, first_unit = scale_of(x, 2 * tile, M, K, stride_xm, BITS, SEARCH)
    second_scale, second_unit = scale_of(x, 2 * tile + 1, M, K, stride_xm, BITS, SEARCH)
    index = tl.arange(0, 512)
    lane = index // 4 % 32
    step = index // 128 * 2 + index % 4 // 2
    token = 2 * tile + lane // 16
    scale = tl.where(lane < 16, first_scale, second_scale)
    start = block * 256 + step * 32 + index % 2 * 16 + lane % 4 * 4
    result = tl.zeros((512,), dtype=tl.int32)
    for place in tl.static_range(4):
        mask = (start + place < K) & (token < M)
        value = tl.load(x + token.to(tl.int64) * stride_xm + start + place, mask=mask, other=0.0).to(tl.float32)
        value *= scale
        integer = (value + tl.where(value < 0, -0.5, 0.5)).to(tl.int32)
        if SHIFTED:
            integer = tl.where(step == 7, -integer, integer << (7 - step))
        # bytes of i + 128 (1 + 256 + 65536), less 128 each, are signed digits of i
        integer = (integer + 0x808080) ^ 0x808080
        result |= ((integer >> (lane // 4 % 4 * 8)) & 255) << (8 * place)
    tl.store(words + ((block * 4 + index // 128) * num_tiles + tile) * 128 + index % 128, result)
    if block == 0:
        tl.store(unit + 2 * tile, first_unit)
        tl.store(unit + 2 * tile + 1, second_unit)
    k = block * 256 + tl.arange(0, 256)
    part = block * PARTS + tl.arange(0, PARTS)
    for column in tl.static_range(2):
        token = 2 * tile + column
        value = tl.load(x + token.to(tl.int64) * stride_xm + k, mask=(k < K) & (token < M), other=0.0)
        total = tl.sum(tl.reshape(value.to(tl.float32), (PARTS, 256 // PARTS)), axis=1)
        tl.store(sums + part * (2 * num_tiles) + token, total)


def limbs_of(x: Tensor, num_blocks: int, tiles: int, *, parts: int, is_shifted: bool, starts: bool) -> Limbs:
    """Return the integers of the tokens x [M, K], zero beyond K.

    Args:
        x: Floating point, rows contiguous.
        num_blocks: Blocks of 256 elements to write.
        tiles: Tiles of two tokens to write.
        parts: Sums of each block.
        is_shifted: Multiply each step of a block by the power of two that its bit in a byte lacks.
        starts: Let the next kernel start at once; it has to wait before it reads.
    """
    num_tokens, in_features = x.shape
    words = torch.empty(num_blocks * BLOCK_K * tiles * TOKENS_OF_TILE, dtype=torch.int32, device=x.device)
    unit = torch.empty(tiles * TOKENS_OF_TILE, dtype=torch.float32, device=x.device)
    sums = torch.empty(num_blocks * parts, tiles * TOKENS_OF_TILE, dtype=torch.float32, device=x.device)
    launcher(limbs_kernel, (num_blocks, tiles))(
        x,
        words,
        unit,
        sums,
        num_tokens,
        in_features,
        x.stride(0),
        BITS=BITS_OF_PLANES if is_shifted else BITS_OF_ENTRIES,
        SHIFTED=is_shifted,
        PARTS=parts,
        SEARCH=SEARCH,
        STARTS=starts,
        num_warps=8,
    )
    return Limbs(words, unit, sums)
