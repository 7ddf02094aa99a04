# SPDX-License-Identifier: Apache-2.0
"""Fields of bytes as the tensor cores multiply them: masked, not shifted; the token makes up for their place.

A byte of a word, masked, is 2^s times a part of the code of one plane. The token meets it times 2^e, such that all
products of a format have one factor, 2^`FACTOR_BITS`. Every plane is one part, except with 3 bits: the code of
plane 5 w + 2 lies in both bytes of word w, that of plane 15 in three words.
"""

import triton
import triton.language as tl

__all__ = [
    "FACTOR_BITS",
    "INTEGER_BITS",
    "exponent_of",
    "first_part",
    "is_high",
    "mask_of",
    "num_parts",
    "num_terms",
    "part_exponent",
    "part_plane",
    "part_word",
]

#: By the bits of a code: the power of two that products have, and the bits of integers that fit four signed bytes
#: when they are multiplied.
FACTOR_BITS = {2: 6, 3: 7, 4: 4, 8: 0}
INTEGER_BITS = {2: 24, 3: 21, 4: 26, 8: 30}


@triton.constexpr_function
def num_parts(bits, plane):
    """Return how many bytes hold the code of a plane."""
    if bits != 3:
        return 1
    return 3 if plane == 15 else 2 if plane % 5 == 2 else 1


@triton.constexpr_function
def first_part(bits, plane):
    """Return how many parts the planes before have."""
    return plane + (plane + 2) // 5 if bits == 3 else plane


@triton.constexpr_function
def num_terms(bits, planes, halves):
    """Return the products of a block, for 16 rows by 32 elements each."""
    return (21 if bits == 3 else planes) * halves


@triton.constexpr_function
def part_word(bits, plane, part):
    """Return the word of a part."""
    if bits != 3:
        return 0
    return part if plane == 15 else plane // 5


@triton.constexpr_function
def is_high(bits, plane, part):
    """Return whether a part lies in the high byte of its word."""
    if bits == 3:
        return plane == 15 or plane % 5 > 2 or (plane % 5 == 2 and part == 1)
    return plane * bits >= 8


@triton.constexpr_function
def mask_of(bits, plane, part):
    """Return the mask of a part, in four bytes, as a signed int32."""
    if bits != 3:
        mask = ((1 << bits) - 1) << (plane * bits % 8)
    elif plane == 15:
        mask = 0x80
    else:
        mask = (0x07, 0x38, (0xC0, 0x01)[part], 0x0E, 0x70)[plane % 5]
    word = mask * 0x01010101
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.jit
def part_plane(part, BITS: tl.constexpr):
    """The plane of a part of a block."""
    plane = part
    if BITS == 3:
        inside = part % 6
        plane = tl.where(part >= 18, 15, part // 6 * 5 + tl.where(inside < 3, inside, inside - 1))
    return plane


@triton.jit
def part_exponent(part, BITS: tl.constexpr):
    """By which power of two the token meets a part of a block."""
    if BITS == 3:
        inside = part % 6
        exponent = tl.where(inside < 3, 7 - 3 * inside, 18 - 3 * inside)
        exponent = tl.where(inside == 4, 6, tl.where(inside == 5, 3, exponent))
        exponent = tl.where(part >= 18, part - 18, exponent)
    else:
        exponent = 8 - BITS - part * BITS % 8
    return exponent


@triton.jit
def exponent_of(plane, BITS: tl.constexpr):
    """The exponent of the part of a plane that has the highest bit of its codes."""
    if BITS == 3:
        inside = plane % 5
        exponent = tl.where(inside < 3, 7 - 3 * inside, 15 - 3 * inside)
        exponent = tl.where(plane == 15, 2, exponent)
    else:
        exponent = 8 - BITS - plane * BITS % 8
    return exponent
