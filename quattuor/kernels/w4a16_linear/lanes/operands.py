# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel of lanes does with a block of the weight: masked bytes times bytes of tokens."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.lanes.instructions import HELD, ONCE, SHARED, load_words, permute
from quattuor.kernels.w4a16_linear.lanes.fields import first_part, is_high, mask_of, part_word

__all__ = ["add_term", "apart", "load_block", "load_pair", "multiply"]

#: Registers with even and odd bytes of eight words.
LOW_BYTES, HIGH_BYTES = tl.constexpr(0x6420), tl.constexpr(0x7531)


@triton.jit
def unsigned_products(first, second, b0, b1, WARPS: tl.constexpr):
    """Two neighbouring columns of eight rows of a product, for each lane."""
    low = (first[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255
    high = (second[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255
    left = (b0[:, None] << (24 - 8 * tl.arange(0, 4))[None, :]) >> 24
    right = (b1[:, None] << (24 - 8 * tl.arange(0, 4))[None, :]) >> 24
    total = tl.reshape(low, (WARPS, 8, 1, 16)) * tl.reshape(left, (WARPS, 1, 8, 16))
    total += tl.reshape(high, (WARPS, 8, 1, 16)) * tl.reshape(right, (WARPS, 1, 8, 16))
    return tl.split(tl.reshape(tl.sum(total, axis=3), (WARPS * 32, 2)))


@triton.jit
def multiply(a0, a1, a2, a3, b0, b1, c, ASM: tl.constexpr):
    """c + A [16, 32] @ B [32, 8] for each warp, A unsigned and B signed bytes, lanes as in `mma.m16n8k32`."""
    c0, c1, c2, c3 = c
    if ASM:
        result = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        s0, s1 = unsigned_products(a0, a2, b0, b1, a0.shape[0] // 32)
        s2, s3 = unsigned_products(a1, a3, b0, b1, a0.shape[0] // 32)
        result = c0 + s0, c1 + s1, c2 + s2, c3 + s3
    return result


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
        result += (multiply(a0, a1, a2, a3, b0, b1, integers[tile], ASM),)
    return result, pair
