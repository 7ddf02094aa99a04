# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel of pairs does with sums: scales and zero points of a group, rows."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.lanes.instructions import as_numbers
from quattuor.kernels.w4a16_linear.decode_kernel import OFFSET
from quattuor.kernels.w4a16_linear.lanes.sums import MAGIC, of_middle

__all__ = ["add_scaled", "load_groups", "of_rows", "rests_of", "scales_of"]


@triton.jit
def load_groups(
    values,
    piece,
    block,
    N_PADDED,
    PIECES: tl.constexpr,
    STRIDE: tl.constexpr,
    PIECE_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """For each pair of pieces of a block, what the rows 2 g and 2 g + 1 have in memory, one word or two.

    `piece` is the first piece of the block that a lane takes; the next is STRIDE further.
    """
    found = ()
    for pair in tl.static_range(PIECES // 2):
        group = (block * (PIECES * PIECE_K) + (piece + pair * STRIDE) * PIECE_K) // GROUP
        if values.dtype.element_ty == tl.float32:
            place = values + group * N_PADDED
            found += ((tl.load(place), tl.load(place + 1)),)
        else:
            found += (tl.load(values + group * (N_PADDED // 2)),)
    return found


@triton.jit
def scales_of(word, IS_HALF: tl.constexpr):
    """The two scales of a word of float16 numbers, or float32 ones as they are."""
    return as_numbers(word) if IS_HALF else word


@triton.jit
def as_number(value, IS_MAGIC: tl.constexpr):
    """An integer as float32: by conversion, or exactly from one above the bits of `MAGIC`."""
    return value.to(tl.float32, bitcast=True) - MAGIC if IS_MAGIC else value.to(tl.float32)


@triton.jit
def add_scaled(totals, sums, first, second, IS_MAGIC: tl.constexpr):
    """Add the integer sums of a piece times the scales of both rows."""
    t0, t1, t2, t3 = totals
    c0, c1, c2, c3 = sums
    t0 += as_number(c0, IS_MAGIC) * first
    t1 += as_number(c1, IS_MAGIC) * first
    t2 += as_number(c2, IS_MAGIC) * second
    t3 += as_number(c3, IS_MAGIC) * second
    return t0, t1, t2, t3


@triton.jit
def rests_of(word, ZERO: tl.constexpr, BITS: tl.constexpr):
    """The zero points of both rows: two bytes of a word, or two float32 numbers."""
    if ZERO == OFFSET:
        result = (of_middle(word[0], ZERO, BITS), of_middle(word[1], ZERO, BITS))
    else:
        result = (of_middle(word & 255, ZERO, BITS), of_middle((word >> 8) & 255, ZERO, BITS))
    return result


@triton.jit
def of_rows(totals, lane, WARPS: tl.constexpr):
    """The sums of 16 rows over both pieces, over the four bytes of an element and over the warps."""
    t0, t1, t2, t3 = totals
    weight = tl.where(lane % 2 == 0, 1.0, 65536.0)
    both = tl.join((t0 + 256.0 * t1) * weight, (t2 + 256.0 * t3) * weight)
    both = tl.permute(tl.reshape(both, (WARPS, 8, 4, 2)), (1, 3, 0, 2))
    return tl.reshape(tl.sum(tl.sum(both, axis=3), axis=2), (16,))
