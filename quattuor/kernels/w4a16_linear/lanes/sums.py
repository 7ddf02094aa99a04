# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel of lanes does with sums: middles of codes, scales and zero points of a group, rows."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.lanes.instructions import load_two_words
from quattuor.kernels.w4a16_linear.decode_kernel import OFFSET

__all__ = [
    "MAGIC",
    "MAGIC_BITS",
    "MAGIC_K",
    "add_middles",
    "add_pairs",
    "add_piece",
    "load_groups",
    "load_middles",
    "of_middle",
    "of_rows",
    "start_sums",
]

#: 1.5 * 2^23: a float32 whose bits are an integer that sums below 2^22 can be added to.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
#: Most elements of K whose sum is certainly below 2^22.
MAGIC_K = tl.constexpr(128)


@triton.jit
def load_middles(middle, TILES: tl.constexpr, ASM: tl.constexpr):
    """Two columns of the middles of a piece, for each tile of two tokens."""
    found = ()
    for tile in tl.static_range(TILES):
        found += (load_two_words(middle + tile * 8, ASM),)
    return found


@triton.jit
def start_sums(middles, START: tl.constexpr, TILES: tl.constexpr):
    """The sums of a piece before its products, of every tile."""
    result = ()
    for tile in tl.static_range(TILES):
        m0, m1 = middles[tile]
        m0 += START
        m1 += START
        result += ((m0, m1, m0, m1),)
    return result


@triton.jit
def add_middles(integers, middles, TILES: tl.constexpr):
    """Add the middles of a block to sums over all blocks."""
    result = ()
    for tile in tl.static_range(TILES):
        c0, c1, c2, c3 = integers[tile]
        m0, m1 = middles[tile]
        result += ((c0 + m0, c1 + m1, c2 + m0, c3 + m1),)
    return result


@triton.jit
def add_pairs(sums, middles, TILES: tl.constexpr):
    """Add the middles of a block to those of the blocks before."""
    result = ()
    for tile in tl.static_range(TILES):
        a0, a1 = sums[tile]
        m0, m1 = middles[tile]
        result += ((a0 + m0, a1 + m1),)
    return result


@triton.jit
def load_groups(values, block, N_PADDED, PIECES: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The scales or zero points of the rows g and g + 8 for each piece of a block, as they lie in memory."""
    found = ()
    for piece in tl.static_range(PIECES):
        group = (block * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP_SIZE
        for r in tl.static_range(2):
            found += (tl.load(values + group * N_PADDED + 8 * r),)
    return found


@triton.jit
def add_scaled(totals, sums, first, second, IS_MAGIC: tl.constexpr):
    """Add the integer sums of a piece times the scales of both rows."""
    t0, t1, t2, t3 = totals
    c0, c1, c2, c3 = sums
    if IS_MAGIC:
        t0 += (c0.to(tl.float32, bitcast=True) - MAGIC) * first
        t1 += (c1.to(tl.float32, bitcast=True) - MAGIC) * first
        t2 += (c2.to(tl.float32, bitcast=True) - MAGIC) * second
        t3 += (c3.to(tl.float32, bitcast=True) - MAGIC) * second
    else:
        t0 += c0.to(tl.float32) * first
        t1 += c1.to(tl.float32) * first
        t2 += c2.to(tl.float32) * second
        t3 += c3.to(tl.float32) * second
    return t0, t1, t2, t3


@triton.jit
def less_zeros(totals, m0, m1, first, second):
    """Add what the middles m0, m1 of a piece are more or less, times the scales of both rows."""
    t0, t1, t2, t3 = totals
    f0 = m0.to(tl.float32)
    f1 = m1.to(tl.float32)
    return t0 + f0 * first, t1 + f1 * first, t2 + f0 * second, t3 + f1 * second


@triton.jit
def of_middle(zero, ZERO: tl.constexpr, BITS: tl.constexpr):
    """A zero point of memory, less the middle of the range of codes, over that middle."""
    value = zero.to(tl.float32)
    if ZERO != OFFSET:
        value -= 1 << (BITS - 1)
    return value * (1.0 / (1 << (BITS - 1)))


@triton.jit
def add_piece(
    totals,
    integers,
    middles,
    first,
    second,
    rests,
    TILES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_MAGIC: tl.constexpr,
):
    """Add the sums of a piece, of every tile, times the scales of both rows; `rests` are those of `of_middle`."""
    result = ()
    for tile in tl.static_range(TILES):
        sums = add_scaled(totals[tile], integers[tile], first, second, IS_MAGIC)
        if HAS_ZERO:
            m0, m1 = middles[tile]
            sums = less_zeros(sums, m0, m1, first * rests[0], second * rests[1])
        result += (sums,)
    return result


@triton.jit
def of_rows(totals, lane, WARPS: tl.constexpr):
    """The sums of 16 rows and two tokens, over the four bytes of an element and over the warps."""
    t0, t1, t2, t3 = totals
    weight = tl.where(lane % 2 == 0, 1.0, 65536.0)
    both = tl.join((t0 + 256.0 * t1) * weight, (t2 + 256.0 * t3) * weight)
    both = tl.permute(tl.reshape(both, (WARPS, 8, 2, 2, 2)), (4, 1, 2, 0, 3))
    return tl.reshape(tl.sum(tl.sum(both, axis=4), axis=3), (16, 2))
