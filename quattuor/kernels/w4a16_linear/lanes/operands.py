# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel of lanes does with a block of the weight: masked bytes times bytes of tokens."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.lanes.instructions import HELD, ONCE, SHARED, load_words, multiply, permute
from quattuor.kernels.w4a16_linear.lanes.fields import first_part, is_high, mask_of, part_word

__all__ = ["add_term", "apart", "load_block", "load_pair"]

#: Registers with even and odd bytes of eight words.
LOW_BYTES, HIGH_BYTES = tl.constexpr(0x6420), tl.constexpr(0x7531)


@triton.jit
def load_block(start, WORDS: tl.constexpr, PLANE_K: tl.constexpr, HOLDS: tl.constexpr, ASM: tl.constexpr):
    """Eight words of the rows g and g + 8 for each half of a row: [word, half, row, 4 registers]."""
    found = ()
    for word in tl.static_range(WORDS):
        for half in tl.static_range(PLANE_K // 32):
            for r in tl.static_range(2):
                place = word * (64 * PLANE_K) + r * (4 * PLANE_K) + half * 16
                found += load_words(start + place, HELD if HOLDS else ONCE, ASM)
    return found


@triton.jit
def apart(registers, COUNT: tl.constexpr, ASM: tl.constexpr):
    """The low and the high bytes of the words in each four registers: [..., low, low, high, high]."""
    found = ()
    for index in tl.static_range(COUNT):
        a = registers[4 * index]
        b = registers[4 * index + 1]
        c = registers[4 * index + 2]
        d = registers[4 * index + 3]
        low = a * 0 + LOW_BYTES
        high = a * 0 + HIGH_BYTES
        found += (permute(a, b, low, ASM), permute(c, d, low, ASM))
        found += (permute(a, b, high, ASM), permute(c, d, high, ASM))
    return found


@triton.jit
def load_pair(token, TERM: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """The bytes of the tokens for a product and for its neighbour, of each tile."""
    found = ()
    for tile in tl.static_range(TILES):
        found += load_words(token + (TERM // 2 * TILES + tile) * WIDTH, SHARED, ASM)
    return found


@triton.jit
def add_term(
    integers,
    bytes_of,
    pair,
    token,
    PLANE: tl.constexpr,
    PART: tl.constexpr,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the product of a part of a plane with every tile; `pair` are the bytes of the tokens for it."""
    TERM: tl.constexpr = (first_part(BITS, PLANE) + PART) * HALVES + HALF
    if TERM > 0 and TERM % 2 == 0:
        pair = load_pair(token, TERM, TILES, WIDTH, ASM)
    FIRST: tl.constexpr = (part_word(BITS, PLANE, PART) * HALVES + HALF) * 8
    AT: tl.constexpr = FIRST + (2 if is_high(BITS, PLANE, PART) else 0)
    MASK: tl.constexpr = mask_of(BITS, PLANE, PART)
    a0 = bytes_of[AT] & MASK
    a1 = bytes_of[AT + 4] & MASK
    a2 = bytes_of[AT + 1] & MASK
    a3 = bytes_of[AT + 5] & MASK
    result = ()
    for tile in tl.static_range(TILES):
        b0 = pair[4 * tile + TERM % 2 * 2]
        b1 = pair[4 * tile + TERM % 2 * 2 + 1]
        result += (multiply(a0, a1, a2, a3, b0, b1, integers[tile], False, ASM),)
    return result, pair
