# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel of a batch does with a block of the weight: float16 numbers in pairs from codes."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.lanes.instructions import add_pairs, permute, selectors, shift_right

__all__ = ["load_numbers", "weights_of"]


@triton.jit
def twice(number):
    """A number as float16 in both halves of a word."""
    bits = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def load_numbers(
    table,
    offset,
    group,
    row,
    N_PADDED,
    NUM_GROUPS,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """For the rows g and g + 8: scales of planes, negated, and their offset; or eight registers of entries."""
    numbers = ()
    for r in tl.static_range(2):
        if PLANES:
            for plane in tl.static_range(BITS):
                scale = tl.load(table + (plane * NUM_GROUPS + group).to(tl.int64) * N_PADDED + row + 8 * r)
                numbers += (twice(-scale.to(tl.float32)),)
            if HAS_OFFSET:
                constant = tl.load(offset + group.to(tl.int64) * N_PADDED + row + 8 * r)
                numbers += (twice(constant.to(tl.float32)),)
        else:
            for index in tl.static_range(8):
                numbers += (tl.load(table + (group * 8 + index).to(tl.int64) * N_PADDED + row + 8 * r),)
    return numbers


@triton.jit
def plane_pairs(
    words,
    numbers,
    STEP: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ASM: tl.constexpr,
):
    """The weights at places 0 and 2, and at places 1 and 3, of four: scales with signs, added in float16."""
    FIRST: tl.constexpr = R * (BITS + 1 if HAS_OFFSET else BITS)
    even = numbers[FIRST]
    odd = even
    for plane in tl.static_range(BITS):
        word = words[4 * plane + 2 * H + R]
        a = ((word << (15 - STEP)) & -0x7FFF8000) ^ numbers[FIRST + plane]
        b = ((word << (7 - STEP)) & -0x7FFF8000) ^ numbers[FIRST + plane]
        if plane == 0:
            even = a
            odd = b
        else:
            even = add_pairs(even, a, ASM)
            odd = add_pairs(odd, b, ASM)
    if HAS_OFFSET:
        even = add_pairs(even, numbers[FIRST + BITS], ASM)
        odd = add_pairs(odd, numbers[FIRST + BITS], ASM)
    return even, odd


@triton.jit
def entry_pairs(selector, table, FIRST: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """The entries at places 0 and 2, and at places 1 and 3, of the codes in four nibbles."""
    code = selector & 0x77777777 if BITS == 4 else selector
    low = permute(table[FIRST], table[FIRST + 1], code, ASM)
    high = permute(table[FIRST + 4], table[FIRST + 5], code, ASM)
    if BITS == 4:
        which = (shift_right(selector, 1) & 0x44444444) | 0x32103210
        low = permute(low, permute(table[FIRST + 2], table[FIRST + 3], code, ASM), which, ASM)
        high = permute(high, permute(table[FIRST + 6], table[FIRST + 7], code, ASM), which, ASM)
    return permute(low, high, selector * 0 + 0x6240, ASM), permute(low, high, selector * 0 + 0x7351, ASM)


@triton.jit
def weights_of(
    words,
    numbers,
    STEP: tl.constexpr,
    H: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ASM: tl.constexpr,
):
    """The operand of half a step: both pairs of four weights of the rows g and g + 8."""
    if PLANES:
        a0, a2 = plane_pairs(words, numbers, STEP, H, 0, BITS, HAS_OFFSET, ASM)
        a1, a3 = plane_pairs(words, numbers, STEP, H, 1, BITS, HAS_OFFSET, ASM)
    else:
        low = selectors(words, STEP, 0, BITS)
        high = selectors(words, STEP, 1, BITS)
        if H == 1:
            low = shift_right(low, 16)
            high = shift_right(high, 16)
        a0, a2 = entry_pairs(low, numbers, 0, BITS, ASM)
        a1, a3 = entry_pairs(high, numbers, 8, BITS, ASM)
    return a0, a1, a2, a3
