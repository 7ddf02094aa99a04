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

__all__ = ["Limbs", "limbs_kernel", "limbs_of", "power_of_two"]

#: Most elements of a token that a program searches at once for the largest.
MAX_SEARCH = 8192
#: Bits of the integers, without their sign: a bit of a plane multiplies them by up to 128 more.
BITS_OF_PLANES, BITS_OF_ENTRIES = 22, 29


@dataclass(frozen=True, slots=True)
class Limbs:
    """A token as integers: `words` for the tensor cores, `unit` of the integers, `sums` of its elements.

    words  int32 [blocks, 4, 16, 4]: step // 2, lane 4 g + t, step % 2 and h; byte g of each of four elements
    unit   float32 [1]; NaN for a token with an element that is not finite
    sums   float32 [1], of the whole token; or [blocks * parts], in 64ths of the unit
    """

    words: Tensor
    unit: Tensor
    sums: Tensor


@triton.jit
def power_of_two(largest, BITS: tl.constexpr):
    """The power of two that makes a number an integer of BITS bits, and its inverse, NaN where it is not finite.

    `largest` is the absolute value of the number as bits: those of what is not finite are above all others.
    """
    exponent = largest >> 23
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
    K,
    BITS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PARTS: tl.constexpr,
    SEARCH: tl.constexpr,
    STARTS: tl.constexpr,
):
    """One block of one token; SHIFTED multiplies step s by 2^(7 - s), and the last by -1, the sign of bit 7.

    `sums` are those of PARTS parts of each block, or one of the whole token when PARTS is 0.
    """
    if STARTS:
        gdc_launch_dependents()
    block = tl.program_id(0)
    largest = tl.zeros((SEARCH,), dtype=tl.int32)
    total = tl.zeros((SEARCH,), dtype=tl.float32)
    for first in range(0, K, SEARCH):
        k = first + tl.arange(0, SEARCH)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value).to(tl.int32, bitcast=True))
        total += value
    index = tl.arange(0, 256)
    lane = index // 4 % 16
    step = index // 64 * 2 + index % 4 // 2
    start = block * 256 + step * 32 + index % 2 * 16 + lane % 4 * 4
    v0 = tl.load(x + start, mask=start < K, other=0.0).to(tl.float32)
    v1 = tl.load(x + start + 1, mask=start + 1 < K, other=0.0).to(tl.float32)
    v2 = tl.load(x + start + 2, mask=start + 2 < K, other=0.0).to(tl.float32)
    v3 = tl.load(x + start + 3, mask=start + 3 < K, other=0.0).to(tl.float32)
    four = (v0, v1, v2, v3)
    scale, inverse = power_of_two(tl.max(largest, axis=0), BITS)
    result = tl.zeros((256,), dtype=tl.int32)
    for place in tl.static_range(4):
        value = four[place] * scale
        integer = (value + tl.where(value < 0, -0.5, 0.5)).to(tl.int32)
        if SHIFTED:
            integer = tl.where(step == 7, -integer, integer << (7 - step))
        # bytes of i + 128 (1 + 256 + 65536), less 128 each, are signed digits of i
        integer = (integer + 0x808080) ^ 0x808080
        result |= ((integer >> (lane // 4 * 8)) & 255) << (8 * place)
    tl.store(words + block * 256 + index, result)
    if block == 0:
        tl.store(unit, inverse)
        if PARTS == 0:
            tl.store(sums, tl.sum(total, axis=0))
    if PARTS > 0:
        k = block * 256 + tl.arange(0, 256)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        part = tl.sum(tl.reshape(value, (PARTS, 256 // PARTS)), axis=1)
        # in units of the sums of bytes
        tl.store(sums + block * PARTS + tl.arange(0, PARTS), part * (scale * 64))


def limbs_of(x: Tensor, num_blocks: int, *, parts: int, is_shifted: bool, starts: bool) -> Limbs:
    """Return the integers of one token x [1, K], zero beyond K.

    Args:
        x: Floating point.
        num_blocks: Blocks of 256 elements to write.
        parts: Sums of each block; 0 for one sum.
        is_shifted: Multiply each step of a block by the power of two that its bit in a byte lacks.
        starts: Let the next kernel start at once; it has to wait before it reads.
    """
    words = torch.empty(num_blocks * BLOCK_K, dtype=torch.int32, device=x.device)
    unit = torch.empty(1, dtype=torch.float32, device=x.device)
    sums = torch.empty(max(1, num_blocks * parts), dtype=torch.float32, device=x.device)
    launcher(limbs_kernel, (num_blocks,))(
        x,
        words,
        unit,
        sums,
        x.shape[1],
        BITS=BITS_OF_PLANES if is_shifted else BITS_OF_ENTRIES,
        SHIFTED=is_shifted,
        PARTS=parts,
        SEARCH=min(MAX_SEARCH, triton.next_power_of_2(x.shape[1])),
        STARTS=starts,
        num_warps=8,
    )
    return Limbs(words, unit, sums)
