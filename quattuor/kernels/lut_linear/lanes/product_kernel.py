# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation for few tokens, compute capability 8.0 and later, and its launch.

A program computes 16 outputs of some tokens; its warps take blocks of K in turn, and their sums are added at the
end. Weights and tokens meet as bytes: masked planes or looked-up entries, and four bytes of each activation.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.lanes.layout import BLOCK_K, TILE_ROWS, unit_of
from quattuor.kernels.lut_linear.lanes.limbs_kernel import TOKENS_OF_TILE, limbs_of
from quattuor.kernels.lut_linear.lanes.steps import (
    add_entries_step,
    add_planes_step,
    load_block,
    load_table,
    load_tokens,
    start_sums,
)
from quattuor.kernels.lut_linear.layout import ONE_GROUP
from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = ["lane_kernel", "launch"]

#: Most sums of four registers in a program: one for each two tokens and each plane or byte of an entry.
MAX_SUMS = 16
#: 1.5 * 2^23: a float32 whose bits are an integer that small sums can be added to.
MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def single_entries(x, row_offsets, columns, values, row, token, M, stride_xm, CHUNK: tl.constexpr):
    """The single entries of each row times one token."""
    start = tl.load(row_offsets + row)
    stop = tl.load(row_offsets + row + 1)
    total = tl.zeros(row.shape, dtype=tl.float32)
    for first in range(0, tl.max(stop - start, axis=0), CHUNK):
        place = start[:, None] + (tl.arange(0, CHUNK) + first)[None, :]
        mask = (place < stop[:, None]) & (token < M)
        k = tl.load(columns + place, mask=mask, other=0).to(tl.int32)
        value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        element = tl.load(x + token.to(tl.int64) * stride_xm + k, mask=mask, other=0.0)
        total += tl.sum(value * element.to(tl.float32), axis=1)
    return total


@triton.jit
def scaled_planes(sums, totals, table, group, row, N_PADDED, NUM_GROUPS, BITS: tl.constexpr, TILES: tl.constexpr):
    """Add the sums of each plane times its scales to `totals`; return these, and the scales' sum of both rows."""
    low = tl.zeros(row.shape, dtype=tl.float32)
    high = low
    for plane in tl.static_range(BITS):
        start = table + (plane * NUM_GROUPS + group).to(tl.int64) * N_PADDED + row
        scale = tl.load(start).to(tl.float32)
        scale_8 = tl.load(start + 8).to(tl.float32)
        low += scale
        high += scale_8
        result = ()
        for tile in tl.static_range(TILES):
            t0, t1, t2, t3 = totals[tile]
            c0, c1, c2, c3 = sums[tile * BITS + plane]
            result += ((t0 + c0 * scale, t1 + c1 * scale, t2 + c2 * scale_8, t3 + c3 * scale_8),)
        totals = result
    return totals, low, high


@triton.jit
def scaled_entries(sums, totals, limb_scale, group, row, N_PADDED, TILES: tl.constexpr):
    """Add the sums of high and low bytes times the scale of the entries to `totals`."""
    start = limb_scale + group.to(tl.int64) * N_PADDED + row
    scale = tl.load(start)
    scale_8 = tl.load(start + 8)
    result = ()
    for tile in tl.static_range(TILES):
        t0, t1, t2, t3 = totals[tile]
        h0, h1, h2, h3 = sums[2 * tile]
        l0, l1, l2, l3 = sums[2 * tile + 1]
        t0 += (256.0 * h0 + l0) * scale
        t1 += (256.0 * h1 + l1) * scale
        t2 += (256.0 * h2 + l2) * scale_8
        t3 += (256.0 * h3 + l3) * scale_8
        result += ((t0, t1, t2, t3),)
    return result


@triton.jit
def as_numbers(sums, IS_MAGIC: tl.constexpr, COUNT: tl.constexpr):
    """Integer sums as float32: by conversion, or exactly from sums that began at the bits of `MAGIC`."""
    result = ()
    for index in tl.static_range(COUNT):
        c0, c1, c2, c3 = sums[index]
        if IS_MAGIC:
            c0 = c0.to(tl.float32, bitcast=True) - MAGIC
            c1 = c1.to(tl.float32, bitcast=True) - MAGIC
            c2 = c2.to(tl.float32, bitcast=True) - MAGIC
            c3 = c3.to(tl.float32, bitcast=True) - MAGIC
        result += ((c0.to(tl.float32), c1.to(tl.float32), c2.to(tl.float32), c3.to(tl.float32)),)
    return result


@triton.jit(do_not_specialize=["M", "NUM_BLOCKS", "NUM_GROUPS", "ROUNDS", "NUM_SUMS", "ALL_TILES"])
def lane_kernel(
    x,
    words,
    unit,
    sums,
    packed,
    table,
    limb_scale,
    offset,
    row_offsets,
    columns,
    values,
    bias,
    out,
    M,
    N,
    stride_xm,
    N_PADDED,
    NUM_BLOCKS,
    NUM_GROUPS,
    ROUNDS,
    NUM_SUMS,
    ALL_TILES,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WAITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sixteen rows times 2 * TILES tokens; UNIT is the run of K that shares a table, 0 for whole rows.

    Sums are exact integers over a unit, or over what a warp has of a row, and float32 beyond.
    """
    lanes = tl.arange(0, WARPS * 32)
    warp = lanes // 32
    lane = lanes % 32
    rows = tl.program_id(0)
    first_tile = tl.program_id(1) * TILES
    row = rows * 16 + lane // 4
    weight = packed + rows.to(tl.int64) * NUM_BLOCKS * (BITS * 128) + lane * 4
    COUNT: tl.constexpr = TILES * (BITS if PLANES else 2)
    FACTOR: tl.constexpr = 1.0 / 64 if PLANES else 1.0
    ahead = load_block(weight, warp, NUM_BLOCKS, BITS, ASM)
    entries = ()
    if not PLANES:
        entries = load_table(table, rows * NUM_GROUPS, lane // 4, ASM)
    side = ()
    if HAS_SPARSE:
        for column in tl.static_range(1 if SINGLE else 2 * TILES):
            every = rows * 16 + tl.arange(0, 16)
            token = 2 * first_tile + column
            side += (single_entries(x, row_offsets, columns, values, every, token, M, stride_xm, 32),)
    if WAITS:
        gdc_wait()

    integers = start_sums(lanes * 0, COUNT)
    totals = start_sums(tl.zeros(lanes.shape, dtype=tl.float32), TILES)
    for turn in range(ROUNDS):
        block = turn * WARPS + warp
        here = ahead
        ahead = load_block(weight, block + WARPS, NUM_BLOCKS, BITS, ASM)
        operand = words + (block * (4 * ALL_TILES) + first_tile) * 128 + lane * 4
        for pair in tl.static_range(4):
            tokens = load_tokens(operand, ALL_TILES * 128, pair, TILES, ASM)
            for step in tl.static_range(2 * pair, 2 * pair + 2):
                if UNIT > 0:
                    group = (tl.minimum(block, NUM_BLOCKS - 1) * 256 + step * 32) // GROUP_SIZE
                    if step * 32 % UNIT == 0:
                        integers = start_sums(lanes * 0 + MAGIC_BITS, COUNT)
                        if not PLANES:
                            entries = load_table(table, rows * NUM_GROUPS + group, lane // 4, ASM)
                if PLANES:
                    integers = add_planes_step(integers, here, tokens, step, BITS, TILES, ASM)
                else:
                    integers = add_entries_step(integers, here, entries, tokens, step, BITS, TILES, ASM)
                if UNIT > 0 and (step + 1) * 32 % UNIT == 0:
                    numbers = as_numbers(integers, True, COUNT)
                    if PLANES:
                        totals, low, high = scaled_planes(
                            numbers, totals, table, group, row, N_PADDED, NUM_GROUPS, BITS, TILES
                        )
                        if HAS_OFFSET:
                            start = offset + group.to(tl.int64) * N_PADDED + row
                            low -= tl.load(start).to(tl.float32)
                            high -= tl.load(start + 8).to(tl.float32)
                        part = block * (256 // UNIT) + step * 32 // UNIT
                        totals = less_constants(
                            totals, low, high, unit, sums, part, first_tile, lane, ALL_TILES, FACTOR, TILES
                        )
                    else:
                        totals = scaled_entries(numbers, totals, limb_scale, group, row, N_PADDED, TILES)
    if UNIT == 0:
        numbers = as_numbers(integers, False, COUNT)
        if PLANES:
            totals, low, high = scaled_planes(
                numbers, totals, table, warp * 0, row, N_PADDED, NUM_GROUPS, BITS, TILES
            )
        else:
            totals = scaled_entries(numbers, totals, limb_scale, warp * 0, row, N_PADDED, TILES)

    every = rows * 16 + tl.arange(0, 16)
    constant = tl.zeros((16,), dtype=tl.float32)
    if HAS_BIAS:
        constant = tl.load(bias + every, mask=every < N, other=0.0).to(tl.float32)
    for tile in tl.static_range(TILES):
        token = 2 * (first_tile + tile) + tl.arange(0, 2)
        y = (
            of_rows(totals[tile], lane, WARPS)
            * (tl.load(unit + token, mask=token < M, other=0.0) * FACTOR)[None, :]
        )
        if PLANES and UNIT == 0:
            y += row_constants(table, offset, every, N_PADDED, BITS, HAS_OFFSET)[:, None] * token_sums(
                sums, token, NUM_SUMS, ALL_TILES
            )
        if HAS_SPARSE:
            if SINGLE:
                y += side[0][:, None]
            else:
                y += tl.where(tl.arange(0, 2)[None, :] == 0, side[2 * tile][:, None], side[2 * tile + 1][:, None])
        where = out + token[None, :].to(tl.int64) * N + every[:, None]
        y += constant[:, None]
        tl.store(where, y.to(out.dtype.element_ty), mask=(token[None, :] < M) & (every[:, None] < N))


@triton.jit
def less_constants(
    totals, low, high, unit, sums, part, first_tile, lane, ALL_TILES, FACTOR: tl.constexpr, TILES: tl.constexpr
):
    """Subtract the constants of both rows times the tokens' sums over a unit, once for each token."""
    result = ()
    for tile in tl.static_range(TILES):
        t0, t1, t2, t3 = totals[tile]
        token = 2 * (first_tile + tile) + lane % 4 // 2
        total = tl.load(sums + part * (2 * ALL_TILES) + token) / (tl.load(unit + token) * FACTOR)
        total = tl.where(lane % 2 == 0, total, 0.0)
        result += ((t0 - total * low, t1, t2 - total * high, t3),)
    return result


@triton.jit
def of_rows(total, lane, WARPS: tl.constexpr):
    """The sums of 16 rows by two tokens, over the four bytes of an activation and over the warps."""
    t0, t1, t2, t3 = total
    weight = tl.where(lane % 2 == 0, 1.0, 65536.0)
    low = tl.reshape((t0 + 256.0 * t1) * weight, (WARPS, 8, 2, 2))
    high = tl.reshape((t2 + 256.0 * t3) * weight, (WARPS, 8, 2, 2))
    low = tl.sum(tl.sum(low, axis=3), axis=0)
    high = tl.sum(tl.sum(high, axis=3), axis=0)
    both = tl.where(tl.arange(0, 2)[:, None, None] == 0, low[None, :, :], high[None, :, :])
    return tl.reshape(both, (16, 2))


@triton.jit
def row_constants(table, offset, row, N_PADDED, BITS: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """What every weight of a row has: its offset less its scales, of which a set bit adds two."""
    constant = tl.zeros(row.shape, dtype=tl.float32)
    if HAS_OFFSET:
        constant += tl.load(offset + row).to(tl.float32)
    for plane in tl.static_range(BITS):
        constant -= tl.load(table + plane * N_PADDED + row).to(tl.float32)
    return constant


@triton.jit
def token_sums(sums, token, NUM_SUMS, ALL_TILES):
    """The sums of whole tokens, [1, 2]."""
    total = tl.zeros((64, 2), dtype=tl.float32)
    for first in range(0, NUM_SUMS, 64):
        block = first + tl.arange(0, 64)
        where = sums + block[:, None] * (2 * ALL_TILES) + token[None, :]
        total += tl.load(where, mask=(block[:, None] < NUM_SUMS) & (token[None, :] < 2 * ALL_TILES), other=0.0)
    return tl.sum(total, axis=0)[None, :]


def launch(
    problem: LutProblem,
    x: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    *,
    num_warps: int,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; the weight tensors are padded as `prepare_lanes` prepares them.

    `interpret` replaces the inline assembly by arithmetic that Triton's interpreter knows.
    """
    packed, is_planes = operand["packed"], problem.kind == "planes"
    row_tiles, num_blocks = packed.shape[:2]
    unit, rounds = unit_of(problem), -(-num_blocks // num_warps)
    starts = problem.compute_capability is not None and problem.compute_capability[0] == 9
    parts = BLOCK_K // unit if unit else 1
    all_tiles = triton.cdiv(len(x), TOKENS_OF_TILE)
    limit = MAX_SUMS // triton.next_power_of_2(problem.weight_bits if is_planes else 2)
    tiles = min(triton.next_power_of_2(all_tiles), limit)
    all_tiles = triton.cdiv(all_tiles, tiles) * tiles
    limbs = limbs_of(x, rounds * num_warps, all_tiles, parts=parts, is_shifted=is_planes, starts=starts)
    table = operand["table"] if is_planes else operand["limbs"]
    launcher(lane_kernel, (row_tiles, all_tiles // tiles))(
        x,
        limbs.words,
        limbs.unit,
        limbs.sums,
        packed,
        table,
        operand.get("limb_scale", table),
        operand.get("offset", table),
        operand.get("row_offsets", table),
        operand.get("columns", table),
        operand.get("values", table),
        table if bias is None else bias,
        out,
        len(x),
        problem.out_features,
        x.stride(0),
        row_tiles * TILE_ROWS,
        num_blocks,
        table.shape[1],
        rounds,
        rounds * num_warps,
        all_tiles,
        WARPS=num_warps,
        TILES=tiles,
        BITS=problem.weight_bits,
        PLANES=is_planes,
        UNIT=unit,
        GROUP_SIZE=problem.group_size or ONE_GROUP,
        SINGLE=len(x) == 1,
        HAS_OFFSET=problem.offset,
        HAS_SPARSE=problem.sparse,
        HAS_BIAS=bias is not None,
        WAITS=starts,
        ASM=not interpret,
        num_warps=num_warps,
        num_stages=1,
        launch_pdl=starts,
    )
