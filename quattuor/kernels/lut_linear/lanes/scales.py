# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel of one token does with sums of integers: float32 numbers, times scales."""

import triton
import triton.language as tl

__all__ = ["MAGIC_BITS", "add_scaled", "less_constants", "load_scales"]

#: 1.5 * 2^23: a float32 whose bits are an integer that small sums can be added to.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def load_scales(table, group, row, N_PADDED, NUM_GROUPS, COUNT: tl.constexpr):
    """The scales of the rows g, then of the rows g + 8."""
    scales = ()
    for r in tl.static_range(2):
        for plane in tl.static_range(COUNT):
            start = table + (plane * NUM_GROUPS + group).to(tl.int64) * N_PADDED + row + 8 * r
            scales += (tl.load(start).to(tl.float32),)
    return scales


@triton.jit
def as_number(value, IS_MAGIC: tl.constexpr):
    """An integer sum as float32: by conversion, or exactly from a sum that began at the bits of `MAGIC`."""
    return value.to(tl.float32, bitcast=True) - MAGIC if IS_MAGIC else value.to(tl.float32)


@triton.jit
def add_scaled(totals, sums, scales, COUNT: tl.constexpr, PLANES: tl.constexpr, IS_MAGIC: tl.constexpr):
    """Add the sums of each plane times its scales, or of high and low bytes times the scale of the entries."""
    t0, t1, t2, t3 = totals
    if PLANES:
        for plane in tl.static_range(COUNT):
            c0, c1, c2, c3 = sums[plane]
            t0 += as_number(c0, IS_MAGIC) * scales[plane]
            t1 += as_number(c1, IS_MAGIC) * scales[plane]
            t2 += as_number(c2, IS_MAGIC) * scales[COUNT + plane]
            t3 += as_number(c3, IS_MAGIC) * scales[COUNT + plane]
    else:
        h0, h1, h2, h3 = sums[0]
        l0, l1, l2, l3 = sums[1]
        t0 += (256.0 * as_number(h0, IS_MAGIC) + as_number(l0, IS_MAGIC)) * scales[0]
        t1 += (256.0 * as_number(h1, IS_MAGIC) + as_number(l1, IS_MAGIC)) * scales[0]
        t2 += (256.0 * as_number(h2, IS_MAGIC) + as_number(l2, IS_MAGIC)) * scales[1]
        t3 += (256.0 * as_number(h3, IS_MAGIC) + as_number(l3, IS_MAGIC)) * scales[1]
    return t0, t1, t2, t3


@triton.jit
def less_constants(
    totals, scales, offset, group, row, total, N_PADDED, COUNT: tl.constexpr, HAS_OFFSET: tl.constexpr
):
    """Add the constants of both rows, their offset less their scales, times the token's sum over a group.

    `total` is that sum in the units of `totals`, in the lanes of one column and zero in the others.
    """
    t0, t1, t2, t3 = totals
    low = total * 0.0
    high = low
    for plane in tl.static_range(COUNT):
        low -= scales[plane]
        high -= scales[COUNT + plane]
    if HAS_OFFSET:
        start = offset + group.to(tl.int64) * N_PADDED + row
        low += tl.load(start).to(tl.float32)
        high += tl.load(start + 8).to(tl.float32)
    return t0 + total * low, t1, t2 + total * high, t3
