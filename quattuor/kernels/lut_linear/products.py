# SPDX-License-Identifier: Apache-2.0
"""What a program of the Triton kernel does with one piece of a block: unpack it and multiply it by the tokens."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.unpacking import bit_value, look_up, signs

__all__ = ["add_entries", "add_planes", "load_scales", "load_table"]


@triton.jit
def load_tokens(x, token, k, M, K, stride_xm, EVEN_K: tl.constexpr):
    """Activations [k, tokens], zero outside the matrix."""
    mask = token[None, :] < M
    if not EVEN_K:
        mask = mask & (k[:, None] < K)
    return tl.load(x + token[None, :].to(tl.int64) * stride_xm + k[:, None], mask=mask, other=0.0)


@triton.jit
def dot_exact(weight, tokens, acc):
    """acc + weight @ tokens; a float16 entry meets bfloat16 tokens as the sum of two bfloat16 numbers."""
    if tokens.dtype == tl.bfloat16:
        wide = weight.to(tl.float32)
        high = wide.to(tl.bfloat16)
        low = (wide - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(low, tokens, acc, out_dtype=tl.float32)
        acc = tl.dot(high, tokens, acc, out_dtype=tl.float32)
    else:
        acc = tl.dot(weight, tokens, acc, out_dtype=tl.float32)
    return acc


@triton.jit
def load_scales(table, group, row, row_of_pair, plane_of_pair, N_PADDED, NUM_GROUPS, BITS: tl.constexpr):
    """The scales of four pairs of planes, [2 * rows], and of the last, [rows]; absent pairs repeat others."""
    ABSENT: tl.constexpr = BITS // 2 - 1 if BITS > 1 else 0
    start = table + group.to(tl.int64) * N_PADDED
    step = NUM_GROUPS.to(tl.int64) * N_PADDED
    last = tl.load(start + (BITS - 1) * step + row).to(tl.float32)
    pair = start + tl.minimum(plane_of_pair, BITS - 1) * step + row_of_pair
    return (
        tl.load(pair).to(tl.float32),
        tl.load(pair + 2 * min(1, ABSENT) * step).to(tl.float32),
        tl.load(pair + 2 * min(2, ABSENT) * step).to(tl.float32),
        tl.load(pair + 2 * min(3, ABSENT) * step).to(tl.float32),
        last,
    )


@triton.jit
def add_plane(total, words, tokens, sub: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """Add the product of one plane over one sub-block: twice the sum of set bits, or less the sum of signs."""
    operand = signs(words, sub, tokens.dtype, MASKED, ASM)
    if MASKED:
        total += tl.dot(operand, tokens, out_dtype=tl.float32) * (2.0 / bit_value(sub))
    else:
        total = tl.dot(operand, tokens, total, out_dtype=tl.float32)
    return total


@triton.jit
def add_planes(
    acc,
    pairs,
    x,
    weight,
    weight_of_pair,
    table,
    scales,
    offset,
    sums,
    first_k,
    row,
    row_of_pair,
    plane_of_pair,
    token,
    column,
    M,
    K,
    stride_xm,
    N_PADDED,
    NUM_GROUPS,
    GROUP_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the products over one piece of each of 16 sub-blocks; planes are 8192 words apart.

    Two planes at a time are rows of one product, whose steps then need not wait for each other; an odd last plane
    goes to `acc`. UNIT is the longest run of K that lies in one group and in this piece, or in whole sub-blocks of
    this block; `scales` serve where there are no groups. Sums of a plane meet its scale once in every unit.
    """
    FLUSH: tl.constexpr = 16 if not HAS_GROUPS else (UNIT // 64 if UNIT > 64 else 1)
    SIGN: tl.constexpr = 1.0 if MASKED else -1.0
    for flush in tl.static_range(16 // FLUSH):
        last = tl.zeros(acc.shape, dtype=tl.float32)
        p0 = tl.zeros(pairs.shape, dtype=tl.float32)
        p1, p2, p3 = p0, p0, p0
        for inside in tl.static_range(FLUSH):
            k = first_k + (flush * FLUSH + inside) * 64 + column
            tokens = load_tokens(x, token, k, M, K, stride_xm, EVEN_K)
            if BITS > 1:
                p0 = add_plane(p0, tl.load(weight_of_pair), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 3:
                p1 = add_plane(p1, tl.load(weight_of_pair + 2 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 5:
                p2 = add_plane(p2, tl.load(weight_of_pair + 4 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 7:
                p3 = add_plane(p3, tl.load(weight_of_pair + 6 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS % 2 == 1:
                words = tl.load(weight + (BITS - 1) * 8192)
                last = add_plane(last, words, tokens, flush * FLUSH + inside, MASKED, ASM)
        if HAS_GROUPS:
            first = first_k + flush * FLUSH * 64
            group = first // GROUP_SIZE
            scales = load_scales(table, group, row, row_of_pair, plane_of_pair, N_PADDED, NUM_GROUPS, BITS)
            if HAS_OFFSET or MASKED:
                total = tl.load(sums + first // UNIT * M + token, mask=token < M, other=0.0)[None, :]
                if HAS_OFFSET:
                    acc += tl.load(offset + group.to(tl.int64) * N_PADDED + row).to(tl.float32)[:, None] * total
                if MASKED:
                    p0, p1, p2, p3, last = p0 - total, p1 - total, p2 - total, p3 - total, last - total
        of_pairs = (p0, p1, p2, p3)
        for pair in tl.static_range(BITS // 2):
            pairs += of_pairs[pair] * (scales[pair] * SIGN)[:, None]
        if BITS % 2 == 1:
            acc += last * (scales[4] * SIGN)[:, None]
    return acc, pairs


@triton.jit
def load_table(table, group, row, N_PADDED):
    """Eight registers of bytes for every row, [rows, 1] each."""
    start = table + group.to(tl.int64) * 8 * N_PADDED + row[:, None]
    return (
        tl.load(start),
        tl.load(start + N_PADDED),
        tl.load(start + 2 * N_PADDED),
        tl.load(start + 3 * N_PADDED),
        tl.load(start + 4 * N_PADDED),
        tl.load(start + 5 * N_PADDED),
        tl.load(start + 6 * N_PADDED),
        tl.load(start + 7 * N_PADDED),
    )


@triton.jit
def add_entries(
    acc,
    x,
    weight,
    table,
    registers,
    first_k,
    row,
    token,
    column,
    M,
    K,
    stride_xm,
    N_PADDED,
    GROUP_SIZE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the products over one piece of every sub-block; `registers` serve where there are no groups."""
    STEPS: tl.constexpr = 1 if BITS == 4 else (2 if BITS == 2 else 4)
    third = 0
    if BITS == 3:
        third = tl.load(weight + 2 * 8192)
    for step in tl.static_range(STEPS):
        words = tl.load(weight + (step // 2 if BITS == 3 else 0) * 8192)
        if not HAS_GROUPS:
            entries = look_up(words, third, registers, step, BITS, ASM)
        for sub in tl.static_range(4):
            k = first_k + (4 * step + sub) * 64
            if HAS_GROUPS:
                # what is looked up for the other sub-blocks is dropped by the compiler
                entries = look_up(words, third, load_table(table, k // GROUP_SIZE, row, N_PADDED), step, BITS, ASM)
            acc = dot_exact(entries[sub], load_tokens(x, token, k + column, M, K, stride_xm, EVEN_K), acc)
    return acc
