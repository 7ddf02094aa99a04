# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that multiplies fields of codes by bytes of a few tokens, and the launch of both kernels.

A program computes 16 outputs of each token. Its warps take blocks of K in turn, and their sums meet at the end: no
shared memory and no barrier is in the loop. What a lane needs of a plane are eight neighbouring words of two rows,
in four registers each, whatever order of K that is: the token comes in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.lanes.instructions import hold
from quattuor.kernels.w4a8_linear.triton_kernel import prefetch_bytes
from quattuor.kernels.w4a16_linear.decode_kernel import MIDDLE, constants
from quattuor.kernels.w4a16_linear.lanes.fields import num_parts
from quattuor.kernels.w4a16_linear.lanes.integers_kernel import integers_of, num_pairs
from quattuor.kernels.w4a16_linear.lanes.operands import add_term, apart, load_block, load_pair
from quattuor.kernels.w4a16_linear.lanes.sums import (
    MAGIC_BITS,
    MAGIC_K,
    add_middles,
    add_pairs,
    add_piece,
    load_groups,
    load_middles,
    of_middle,
    of_rows,
    start_sums,
)
from quattuor.kernels.w4a16_linear.overlap import EARLY, LATE, NONE, OVERLAPS
from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, LaneTile, Layout

__all__ = ["launch_lanes", "product_kernel"]


@triton.jit
def prefetch_round(rows_start, turn, NUM_BLOCKS, WARPS: tl.constexpr, WORDS: tl.constexpr, PLANE_K: tl.constexpr):
    """Bring what the warps take in one turn to L2."""
    for warp in tl.static_range(WARPS):
        block = tl.minimum(turn * WARPS + warp, NUM_BLOCKS - 1)
        for word in tl.static_range(WORDS):
            prefetch_bytes(rows_start + (block * WORDS + word) * (64 * PLANE_K), 32 * PLANE_K)


# a kernel serves every K and two counts of tokens: these sizes decide nothing that is compiled
@triton.jit(do_not_specialize=["M", "NUM_BLOCKS", "ROUNDS"])
def product_kernel(
    words,
    middles,
    unit,
    packed,
    scale,
    zero_point,
    bias,
    out,
    M,
    N,
    N_PADDED,
    NUM_BLOCKS,
    ROUNDS,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    HOLDS: tl.constexpr,
    BEFORE: tl.constexpr,
    TILES: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    PAIRS: tl.constexpr,
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
    """Sixteen rows times all tokens; GROUP_SIZE is 0 with one scale per row.

    DEPTH blocks of the weight are loaded ahead; those of the first BEFORE turns are brought to L2 at the start.
    """
    lanes = tl.arange(0, WARPS * 32)
    warp = lanes // 32
    lane = lanes % 32
    rows = tl.program_id(0)
    row = rows * 16 + lane // 4
    HALVES: tl.constexpr = PLANE_K // 32
    BLOCK_K: tl.constexpr = PLANES * PLANE_K
    STEP: tl.constexpr = WORDS * 64 * PLANE_K
    RUN: tl.constexpr = PLANES // PIECES
    WIDTH: tl.constexpr = 64 if IS_SINGLE else 128
    COLUMNS: tl.constexpr = 4 if IS_SINGLE else 8 * TILES
    IS_GROUPED: tl.constexpr = GROUP_SIZE > 0
    GROUP: tl.constexpr = GROUP_SIZE if IS_GROUPED else 1 << 30
    HAS_ZERO: tl.constexpr = ZERO != MIDDLE
    IS_MAGIC: tl.constexpr = IS_GROUPED and BLOCK_K // PIECES <= MAGIC_K
    rows_start = packed + (rows // 8).to(tl.int64) * NUM_BLOCKS * STEP + rows % 8 * (8 * PLANE_K)
    weight = rows_start + lane // 4 * (PLANE_K // 2) + lane % 4 * 4
    token = words + lane % (WIDTH // 4) * 4
    middle = middles + lane % (2 if IS_SINGLE else 4) * 2

    if OVERLAP == EARLY:
        gdc_launch_dependents()
    ahead = ()
    for turn in tl.static_range(DEPTH):
        block = tl.minimum(turn * WARPS + warp, NUM_BLOCKS - 1)
        ahead += (load_block(weight + block * STEP, WORDS, PLANE_K, HOLDS, ASM),)
    if BEFORE > 0:
        for turn in tl.static_range(DEPTH, BEFORE):
            prefetch_round(rows_start, turn, NUM_BLOCKS, WARPS, WORDS, PLANE_K)
    first_block = tl.minimum(warp, NUM_BLOCKS - 1)
    scales = load_groups(scale + row, first_block, N_PADDED, PIECES, BLOCK_K, GROUP)
    zeros = scales
    if HAS_ZERO:
        zeros = load_groups(zero_point + row, first_block, N_PADDED, PIECES, BLOCK_K, GROUP)
    every = rows * 16 + tl.arange(0, 16)
    last = tl.zeros((16,), dtype=tl.float32)
    if HAS_BIAS:
        last += tl.load(bias + every, mask=every < N, other=0.0).to(tl.float32)
    if OVERLAP != NONE:
        gdc_wait()

    nothing = lanes * 0
    none = tl.zeros(lanes.shape, dtype=tl.float32)
    integers = ((nothing, nothing, nothing, nothing),) * TILES
    totals = ((none, none, none, none),) * TILES
    all_middles = ((nothing, nothing),) * TILES
    for turn in range(ROUNDS):
        block = turn * WARPS + warp
        here = ahead[0]
        following = ()
        for index in tl.static_range(1, DEPTH):
            following += (ahead[index],)
        next_block = tl.minimum(block + DEPTH * WARPS, NUM_BLOCKS - 1)
        ahead = following + (load_block(weight + next_block * STEP, WORDS, PLANE_K, HOLDS, ASM),)  # noqa: RUF005
        now_scales = scales
        now_zeros = zeros
        if IS_GROUPED:
            next_block = tl.minimum(block + WARPS, NUM_BLOCKS - 1)
            scales = load_groups(scale + row, next_block, N_PADDED, PIECES, BLOCK_K, GROUP)
            if HAS_ZERO:
                zeros = load_groups(zero_point + row, next_block, N_PADDED, PIECES, BLOCK_K, GROUP)
        if HOLDS:
            hold(ASM)
        bytes_of = apart(here, WORDS * HALVES * 2, ASM)
        bytes_of_tokens = token + block * (PAIRS * TILES * WIDTH)
        pair = load_pair(bytes_of_tokens, 0, TILES, WIDTH, ASM)
        for piece in tl.static_range(PIECES):
            found = load_middles(middle + (block * PIECES + piece) * COLUMNS, TILES, ASM)
            if IS_GROUPED:
                integers = start_sums(found, MAGIC_BITS if IS_MAGIC else 0, TILES)
            else:
                integers = add_middles(integers, found, TILES)
                if HAS_ZERO:
                    all_middles = add_pairs(all_middles, found, TILES)
            for run in tl.static_range(RUN):
                for part in tl.static_range(num_parts(BITS, piece * RUN + run)):
                    for half in tl.static_range(HALVES):
                        integers, pair = add_term(
                            integers,
                            bytes_of,
                            pair,
                            bytes_of_tokens,
                            piece * RUN + run,
                            part,
                            half,
                            HALVES,
                            TILES,
                            WIDTH,
                            BITS,
                            ASM,
                        )
            if IS_GROUPED:
                first = now_scales[2 * piece].to(tl.float32)
                second = now_scales[2 * piece + 1].to(tl.float32)
                rests = (first, second)
                if HAS_ZERO:
                    rests = (
                        of_middle(now_zeros[2 * piece], ZERO, BITS),
                        of_middle(now_zeros[2 * piece + 1], ZERO, BITS),
                    )
                totals = add_piece(totals, integers, found, first, second, rests, TILES, HAS_ZERO, IS_MAGIC)
    if OVERLAP == LATE:
        gdc_launch_dependents()
    if not IS_GROUPED:
        first = scales[0].to(tl.float32)
        second = scales[1].to(tl.float32)
        rests = (first, second)
        if HAS_ZERO:
            rests = (of_middle(zeros[0], ZERO, BITS), of_middle(zeros[1], ZERO, BITS))
        totals = add_piece(totals, integers, all_middles, first, second, rests, TILES, HAS_ZERO, False)
    for tile in tl.static_range(TILES):
        tokens = 2 * tile + tl.arange(0, 2)
        y = of_rows(totals[tile], lane, WARPS) * tl.load(unit + tokens, mask=tokens < M, other=0.0)[None, :]
        where = out + tokens[None, :].to(tl.int64) * N + every[:, None]
        tl.store(
            where, (y + last[:, None]).to(out.dtype.element_ty), mask=(every[:, None] < N) & (tokens[None, :] < M)
        )


def launch_lanes(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    *,
    layout: Layout,
    group_size: int | None,
    tile: LaneTile,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; the weight is that of `prepare_tensors`.

    Where the tile overlaps kernels, no kernel still in flight may write the weight.
    """
    num_tokens, out_features = out.shape
    num_blocks = packed.shape[1]
    rounds = -(-num_blocks // tile.num_warps)
    fixed = constants(layout, group_size, zero_point, interpret)
    starts = tile.overlap != "none"
    integers = integers_of(x, rounds * tile.num_warps, layout, pieces=fixed["PIECES"], overlap=tile.overlap)
    launcher(product_kernel, (triton.cdiv(out_features, 16),))(
        integers.words,
        integers.middles,
        integers.unit,
        packed.view(torch.int32),
        scale,
        scale if zero_point is None else zero_point,
        scale if bias is None else bias,
        out,
        num_tokens,
        out_features,
        packed.shape[0] * TILE_ROWS,
        num_blocks,
        rounds,
        WARPS=tile.num_warps,
        DEPTH=tile.depth,
        HOLDS=tile.holds,
        BEFORE=tile.before if starts else 0,
        TILES=triton.cdiv(num_tokens, 2),
        IS_SINGLE=num_tokens == 1,
        PAIRS=num_pairs(layout),
        HAS_BIAS=bias is not None,
        OVERLAP=OVERLAPS[tile.overlap],
        **fixed,
        num_warps=tile.num_warps,
        num_stages=1,
        launch_pdl=starts,
    )
