# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that multiplies fields of codes by bytes of one token, two pieces at once, and its launch.

A program computes 16 outputs. Its warps take blocks of K in turn, and their sums meet at the end: no shared memory
and no barrier is in the loop. What a lane needs of a word are eight neighbours of two rows, in four registers
each: the token comes in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.lanes.instructions import SHARED, hold, load_words
from quattuor.kernels.w4a16_linear.decode_kernel import MIDDLE, constants
from quattuor.kernels.w4a16_linear.lanes.operands import apart
from quattuor.kernels.w4a16_linear.overlap import EARLY, LATE, NONE, OVERLAPS
from quattuor.kernels.w4a16_linear.pairs.fields import expands, first_slot
from quattuor.kernels.w4a16_linear.pairs.integers_kernel import integers_of, is_magic, num_steps
from quattuor.kernels.w4a16_linear.pairs.operands import add_slot, load_ahead
from quattuor.kernels.w4a16_linear.pairs.sums import add_scaled, of_rows, rests_of, scales_of
from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, Layout, PairTile

__all__ = ["launch_pairs", "product_kernel"]


@triton.jit
def add_block(
    totals,
    loaded,
    token,
    middle,
    expand,
    IS_MAGIC: tl.constexpr,
    IS_HALF: tl.constexpr,
    ZERO: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    PIECES: tl.constexpr,
    HALVES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add a block to the sums of both rows and of both columns of a lane."""
    here, scales, zeros = loaded
    if BITS == 3:
        here = apart(here, 6, ASM)
    # loads of the token that a slot and a half of a plane share
    SHARES: tl.constexpr = 2 if expands(BITS) else 1
    operands = load_words(token, SHARED, ASM)
    for pair in tl.static_range(PIECES // 2):
        found = load_words(middle + pair * 16, SHARED, ASM)
        integers = found
        for slot in tl.static_range(
            first_slot(BITS, PLANES, PIECES, pair), first_slot(BITS, PLANES, PIECES, pair + 1)
        ):
            for half in tl.static_range(HALVES):
                if slot * HALVES + half > 0 and (slot * HALVES + half) % SHARES == 0:
                    operands = load_words(token + (slot * HALVES + half) // SHARES * 128, SHARED, ASM)
                integers = add_slot(
                    integers, here, operands, expand, slot, half, HALVES, BITS, PLANES, PIECES, ASM
                )
        first, second = scales_of(scales[pair], IS_HALF)
        totals = add_scaled(totals, integers, first, second, IS_MAGIC)
        if ZERO != MIDDLE:
            rests = rests_of(zeros[pair], ZERO, BITS)
            totals = add_scaled(totals, found, first * rests[0], second * rests[1], IS_MAGIC)
    return totals


# a kernel serves every K: these sizes decide nothing that is compiled
@triton.jit(do_not_specialize=["NUM_BLOCKS", "ROUNDS"])
def product_kernel(
    words,
    middles,
    unit,
    packed,
    scale,
    zero_point,
    bias,
    out,
    N,
    N_PADDED,
    NUM_BLOCKS,
    ROUNDS,
    WARPS: tl.constexpr,
    IS_EARLY: tl.constexpr,
    STEPS: tl.constexpr,
    IS_MAGIC: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    WORDS: tl.constexpr,
    PLANE_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sixteen rows times one token.

    The next block is loaded when this one is multiplied; with IS_EARLY before, and ROUNDS is even.
    """
    lanes = tl.arange(0, WARPS * 32)
    warp = lanes // 32
    lane = lanes % 32
    rows = tl.program_id(0)
    row = rows * 16 + lane // 4 * 2
    HALVES: tl.constexpr = PLANE_K // 32
    PIECE_K: tl.constexpr = PLANES * PLANE_K // PIECES
    PAIRS: tl.constexpr = PIECES // 2
    HAS_ZERO: tl.constexpr = ZERO != MIDDLE
    IS_HALF: tl.constexpr = scale.dtype.element_ty != tl.float32
    IS_REAL: tl.constexpr = zero_point.dtype.element_ty == tl.float32
    # pieces from one pair to the next, and from one of a pair to the other
    STRIDE: tl.constexpr = 2 if BITS == 3 else 1
    piece = lane % 4 // 2 * (1 if BITS == 3 else PAIRS)
    weight = packed + (rows // 8).to(tl.int64) * NUM_BLOCKS * (WORDS * 64 * PLANE_K)
    weight += rows % 8 * (8 * PLANE_K) + lane // 4 * PLANE_K + lane % 4 * 4
    token = words + lane * 4
    middle = middles + lane % 4 * 4
    scale += row // 2 if IS_HALF else row
    zero_point += row if IS_REAL else row // 2
    # how the bytes of a lane meet only those of its piece: in places, or in half of the product, with 3 bits
    is_second = lane >= 16
    if BITS == 3:
        expand = tl.where(is_second, 0x4444, 0x3210), tl.where(is_second, 0x3210, 0x4444)
    else:
        expand = tl.where(is_second, 0x1404, 0x4140), tl.where(is_second, 0x3424, 0x4342)

    if OVERLAP == EARLY:
        gdc_launch_dependents()
    ahead = load_ahead(
        weight,
        scale,
        zero_point,
        piece,
        warp,
        NUM_BLOCKS,
        N_PADDED,
        WORDS,
        PLANE_K,
        PIECES,
        STRIDE,
        PIECE_K,
        GROUP_SIZE,
        HAS_ZERO,
        ASM,
    )
    every = rows * 16 + tl.arange(0, 16)
    last = tl.zeros((16,), dtype=tl.float32)
    if HAS_BIAS:
        last += tl.load(bias + every, mask=every < N, other=0.0).to(tl.float32)
    if OVERLAP != NONE:
        gdc_wait()

    none = tl.zeros(lanes.shape, dtype=tl.float32)
    totals = (none, none, none, none)
    TURNS: tl.constexpr = 2 if IS_EARLY else 1
    for first_turn in range(0, ROUNDS, TURNS):
        for turn in tl.static_range(TURNS):
            block = (first_turn + turn) * WARPS + warp
            here = ahead
            if not IS_EARLY:
                totals = add_block(
                    totals,
                    here,
                    token + block * (STEPS * 128),
                    middle + block * (PAIRS * 16),
                    expand,
                    IS_MAGIC,
                    IS_HALF,
                    ZERO,
                    BITS,
                    PLANES,
                    PIECES,
                    HALVES,
                    ASM,
                )
            ahead = load_ahead(
                weight,
                scale,
                zero_point,
                piece,
                block + WARPS,
                NUM_BLOCKS,
                N_PADDED,
                WORDS,
                PLANE_K,
                PIECES,
                STRIDE,
                PIECE_K,
                GROUP_SIZE,
                HAS_ZERO,
                ASM,
            )
            hold(ASM)
            if IS_EARLY:
                totals = add_block(
                    totals,
                    here,
                    token + block * (STEPS * 128),
                    middle + block * (PAIRS * 16),
                    expand,
                    IS_MAGIC,
                    IS_HALF,
                    ZERO,
                    BITS,
                    PLANES,
                    PIECES,
                    HALVES,
                    ASM,
                )
    if OVERLAP == LATE:
        gdc_launch_dependents()
    y = of_rows(totals, lane, WARPS) * tl.load(unit) + last
    tl.store(out + every, y.to(out.dtype.element_ty), mask=every < N)


def in_pairs(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales or zero points of two neighbouring rows as one number, float32 ones as they are."""
    return values if values.dtype == torch.float32 else values.view(dtype)


def launch_pairs(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    layout: Layout,
    group_size: int,
    tile: PairTile,
    interpret: bool = False,
) -> None:
    """Fill `out` [1, N]; the weight is that of `prepare_tensors`, its blocks two pieces or more.

    Where the tile overlaps kernels, no kernel still in flight may write the weight.
    """
    num_blocks, pieces = packed.shape[1], layout.pieces(group_size)
    turns = 2 if tile.is_early else 1
    rounds = triton.cdiv(num_blocks, tile.num_warps * turns) * turns
    starts = tile.overlap != "none"
    integers = integers_of(x, rounds * tile.num_warps, layout, pieces=pieces, overlap=tile.overlap)
    scales = in_pairs(scale, torch.int32)
    launcher(product_kernel, (triton.cdiv(out.shape[1], 16),))(
        integers.words,
        integers.middles,
        integers.unit,
        packed.view(torch.int32),
        scales,
        scales if zero_point is None else in_pairs(zero_point, torch.int16),
        scale if bias is None else bias,
        out,
        out.shape[1],
        packed.shape[0] * TILE_ROWS,
        num_blocks,
        rounds,
        WARPS=tile.num_warps,
        IS_EARLY=tile.is_early,
        STEPS=num_steps(layout, pieces),
        IS_MAGIC=is_magic(layout, pieces),
        HAS_BIAS=bias is not None,
        OVERLAP=OVERLAPS[tile.overlap],
        **constants(layout, group_size, zero_point, interpret),
        num_warps=tile.num_warps,
        num_stages=1,
        launch_pdl=starts,
    )
