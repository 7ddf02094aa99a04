# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation for a batch of tokens: float16 in the order of lanes, and its launch.

A warp unpacks 16 rows of a block once and multiplies them by every token of the program, so that more tokens cost
products of the tensor cores and nothing else.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.lanes.halves_kernel import TOKENS_OF_COLUMNS, halves_of
from quattuor.kernels.lut_linear.lanes.instructions import (
    SHARED,
    add_pairs,
    load_words,
    multiply_pairs,
    permute,
    selectors,
    shift_right,
)
from quattuor.kernels.lut_linear.lanes.layout import ONE_GROUP, TILE_ROWS, unit_of
from quattuor.kernels.lut_linear.lanes.steps import load_block, start_sums
from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = ["batch_kernel", "launch"]

#: Tokens that a program takes at most, eight in each of its tiles.
MAX_TILES = 8


@triton.jit
def twice(number):
    """A number as float16 in both halves of a word."""
    bits = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def load_numbers(
    table,
    offset,
    group,
    row,
    N_PADDED,
    NUM_GROUPS,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """For the rows g and g + 8: scales of planes, negated, and their offset; or eight registers of entries."""
    numbers = ()
    for r in tl.static_range(2):
        if PLANES:
            for plane in tl.static_range(BITS):
                scale = tl.load(table + (plane * NUM_GROUPS + group).to(tl.int64) * N_PADDED + row + 8 * r)
                numbers += (twice(-scale.to(tl.float32)),)
            if HAS_OFFSET:
                constant = tl.load(offset + group.to(tl.int64) * N_PADDED + row + 8 * r)
                numbers += (twice(constant.to(tl.float32)),)
        else:
            for index in tl.static_range(8):
                numbers += (tl.load(table + (group * 8 + index).to(tl.int64) * N_PADDED + row + 8 * r),)
    return numbers


@triton.jit
def plane_pairs(
    words,
    numbers,
    STEP: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    BITS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ASM: tl.constexpr,
):
    """The weights at places 0 and 2, and at places 1 and 3, of four: scales with signs, added in float16."""
    FIRST: tl.constexpr = R * (BITS + 1 if HAS_OFFSET else BITS)
    even = numbers[FIRST]
    odd = even
    for plane in tl.static_range(BITS):
        word = words[4 * plane + 2 * H + R]
        a = ((word << (15 - STEP)) & -0x7FFF8000) ^ numbers[FIRST + plane]
        b = ((word << (7 - STEP)) & -0x7FFF8000) ^ numbers[FIRST + plane]
        if plane == 0:
            even = a
            odd = b
        else:
            even = add_pairs(even, a, ASM)
            odd = add_pairs(odd, b, ASM)
    if HAS_OFFSET:
        even = add_pairs(even, numbers[FIRST + BITS], ASM)
        odd = add_pairs(odd, numbers[FIRST + BITS], ASM)
    return even, odd


@triton.jit
def entry_pairs(selector, table, FIRST: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """The entries at places 0 and 2, and at places 1 and 3, of the codes in four nibbles."""
    code = selector & 0x77777777 if BITS == 4 else selector
    low = permute(table[FIRST], table[FIRST + 1], code, ASM)
    high = permute(table[FIRST + 4], table[FIRST + 5], code, ASM)
    if BITS == 4:
        which = (shift_right(selector, 1) & 0x44444444) | 0x32103210
        low = permute(low, permute(table[FIRST + 2], table[FIRST + 3], code, ASM), which, ASM)
        high = permute(high, permute(table[FIRST + 6], table[FIRST + 7], code, ASM), which, ASM)
    return permute(low, high, selector * 0 + 0x6240, ASM), permute(low, high, selector * 0 + 0x7351, ASM)


@triton.jit
def weights_of(
    words,
    numbers,
    STEP: tl.constexpr,
    H: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ASM: tl.constexpr,
):
    """The operand of half a step: both pairs of four weights of the rows g and g + 8."""
    if PLANES:
        a0, a2 = plane_pairs(words, numbers, STEP, H, 0, BITS, HAS_OFFSET, ASM)
        a1, a3 = plane_pairs(words, numbers, STEP, H, 1, BITS, HAS_OFFSET, ASM)
    else:
        low = selectors(words, STEP, 0, BITS)
        high = selectors(words, STEP, 1, BITS)
        if H == 1:
            low = shift_right(low, 16)
            high = shift_right(high, 16)
        a0, a2 = entry_pairs(low, numbers, 0, BITS, ASM)
        a1, a3 = entry_pairs(high, numbers, 8, BITS, ASM)
    return a0, a1, a2, a3


@triton.jit
def load_tokens(operand, TILES: tl.constexpr, ASM: tl.constexpr):
    """The tokens for one step: four words for every eight."""
    words = ()
    for tile in tl.static_range(TILES):
        words += load_words(operand + tile * 128, SHARED, ASM)
    return words


@triton.jit
def add_half_step(sums, weights, tokens, H: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr):
    """Add the products of half a step with every eight tokens."""
    result = ()
    for tile in tl.static_range(TILES):
        first = tokens[4 * tile + 2 * H]
        result += (multiply_pairs(weights, first, tokens[4 * tile + 2 * H + 1], sums[tile], ASM),)
    return result


@triton.jit
def joined(sums, TILES: tl.constexpr, ROW_WARPS: tl.constexpr, K_WARPS: tl.constexpr):
    """The sums of all warps as [rows, tokens]."""
    parts = ()
    for tile in tl.static_range(TILES):
        c0, c1, c2, c3 = sums[tile]
        parts += (tl.join(tl.join(c0, c2), tl.join(c1, c3)),)  # lane, row of two, token of two
    if TILES == 8:
        parts = (
            tl.join(parts[0], parts[4]),
            tl.join(parts[1], parts[5]),
            tl.join(parts[2], parts[6]),
            tl.join(parts[3], parts[7]),
        )
    if TILES >= 4:
        parts = (tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    if TILES >= 2:
        parts = (tl.join(parts[0], parts[1]),)
    whole = tl.reshape(parts[0], (K_WARPS, ROW_WARPS, 8, 4, 2, 2, TILES))
    whole = tl.permute(whole, (1, 4, 2, 6, 3, 5, 0))
    return tl.sum(tl.reshape(whole, (ROW_WARPS * 16, 8 * TILES, K_WARPS)), axis=2)


@triton.jit
def single_entries(
    transposed, row_offsets, columns, values, row, first, TOKENS, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    """The single entries of each row times WIDTH tokens, [rows, WIDTH]."""
    start = tl.load(row_offsets + row)
    stop = tl.load(row_offsets + row + 1)
    total = tl.zeros((row.shape[0], WIDTH), dtype=tl.float32)
    token = transposed + first + tl.arange(0, WIDTH)[None, None, :]
    place = start[:, None] + tl.arange(0, CHUNK)[None, :]
    k = tl.load(columns + place, mask=place < stop[:, None], other=0).to(tl.int32)
    value = tl.load(values + place, mask=place < stop[:, None], other=0.0)
    for _ in range(0, tl.max(stop - start, axis=0), CHUNK):
        element = tl.load(token + k[:, :, None] * TOKENS).to(tl.float32)
        factor = value.to(tl.float32)
        place += CHUNK
        k = tl.load(columns + place, mask=place < stop[:, None], other=0).to(tl.int32)
        value = tl.load(values + place, mask=place < stop[:, None], other=0.0)
        # a token that is not finite must not meet the zero of an absent entry
        product = tl.where((place - CHUNK < stop[:, None])[:, :, None], element * factor[:, :, None], 0.0)
        total += tl.sum(product, axis=1)
    return total


@triton.jit(do_not_specialize=["M", "NUM_BLOCKS", "NUM_GROUPS", "ROUNDS", "ALL_TILES"])
def batch_kernel(
    words,
    transposed,
    unit,
    packed,
    table,
    offset,
    row_offsets,
    columns,
    values,
    bias,
    out,
    M,
    N,
    N_PADDED,
    NUM_BLOCKS,
    NUM_GROUPS,
    ROUNDS,
    ALL_TILES,
    ROW_WARPS: tl.constexpr,
    K_WARPS: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WAITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sixteen rows for each of ROW_WARPS times 8 * TILES tokens; K_WARPS take blocks of K in turn."""
    lanes = tl.arange(0, ROW_WARPS * K_WARPS * 32)
    warp = lanes // 32
    lane = lanes % 32
    k_warp = warp // ROW_WARPS
    row_tile = tl.minimum(tl.program_id(0) * ROW_WARPS + warp % ROW_WARPS, N_PADDED // 16 - 1)
    first_tile = tl.program_id(1) * TILES
    row = row_tile * 16 + lane // 4
    weight = packed + row_tile.to(tl.int64) * NUM_BLOCKS * (BITS * 128) + lane * 4
    ahead = load_block(weight, k_warp, NUM_BLOCKS, BITS, ASM)
    numbers = load_numbers(table, offset, k_warp * 0, row, N_PADDED, NUM_GROUPS, BITS, PLANES, HAS_OFFSET)
    if WAITS:
        gdc_wait()
    every = tl.program_id(0) * (ROW_WARPS * 16) + tl.arange(0, ROW_WARPS * 16)
    side = tl.zeros((ROW_WARPS * 16, 8 * TILES), dtype=tl.float32)
    if HAS_SPARSE:
        capped = tl.minimum(every, N_PADDED - 1)
        side += single_entries(
            transposed, row_offsets, columns, values, capped, 8 * first_tile, 8 * ALL_TILES, 8 * TILES, CHUNK
        )
    sums = start_sums(tl.zeros(lanes.shape, dtype=tl.float32), TILES)
    for turn in range(ROUNDS):
        block = turn * K_WARPS + k_warp
        here = ahead
        ahead = load_block(weight, block + K_WARPS, NUM_BLOCKS, BITS, ASM)
        operand = words + (block * (8 * ALL_TILES) + first_tile) * 128 + lane * 4
        for step in tl.static_range(8):
            tokens = load_tokens(operand + step * ALL_TILES * 128, TILES, ASM)
            for h in tl.static_range(2):
                if UNIT > 0 and (step * 32 + h * 16) % UNIT == 0:
                    group = (tl.minimum(block, NUM_BLOCKS - 1) * 256 + step * 32 + h * 16) // GROUP_SIZE
                    numbers = load_numbers(
                        table, offset, group, row, N_PADDED, NUM_GROUPS, BITS, PLANES, HAS_OFFSET
                    )
                weights = weights_of(here, numbers, step, h, BITS, PLANES, HAS_OFFSET, ASM)
                sums = add_half_step(sums, weights, tokens, h, TILES, ASM)

    token = 8 * first_tile + tl.arange(0, 8 * TILES)
    y = joined(sums, TILES, ROW_WARPS, K_WARPS) * tl.load(unit + token)[None, :] + side
    if HAS_BIAS:
        y += tl.load(bias + every, mask=every < N, other=0.0).to(tl.float32)[:, None]
    where = out + token[None, :].to(tl.int64) * N + every[:, None]
    tl.store(where, y.to(out.dtype.element_ty), mask=(token[None, :] < M) & (every[:, None] < N))


def launch(
    problem: LutProblem,
    x: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    *,
    row_warps: int,
    k_warps: int,
    max_tiles: int = MAX_TILES,
    maxnreg: int | None = None,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; the weight tensors are padded as `prepare_lanes` prepares them.

    `interpret` replaces the inline assembly by arithmetic that Triton's interpreter knows.
    """
    packed, is_planes = operand["packed"], problem.kind == "planes"
    row_tiles, num_blocks = packed.shape[:2]
    rounds = -(-num_blocks // k_warps)
    starts = problem.compute_capability is not None and problem.compute_capability[0] == 9
    all_tiles = triton.cdiv(len(x), TOKENS_OF_COLUMNS)
    tiles = min(triton.next_power_of_2(all_tiles), max_tiles)
    all_tiles = triton.cdiv(all_tiles, tiles) * tiles
    halves = halves_of(x, rounds * k_warps, all_tiles, is_transposed=problem.sparse, starts=starts)
    table = operand["table"]
    launcher(batch_kernel, (triton.cdiv(row_tiles, row_warps), all_tiles // tiles))(
        halves.words,
        halves.transposed,
        halves.unit,
        packed,
        table,
        operand.get("offset", table),
        operand.get("row_offsets", table),
        operand.get("columns", table),
        operand.get("values", table),
        table if bias is None else bias,
        out,
        len(x),
        problem.out_features,
        row_tiles * TILE_ROWS,
        num_blocks,
        table.shape[1] if is_planes else table.shape[0],
        rounds,
        all_tiles,
        ROW_WARPS=row_warps,
        K_WARPS=k_warps,
        TILES=tiles,
        CHUNK=min(16, max(1, 8 * k_warps // tiles)),
        BITS=problem.weight_bits,
        PLANES=is_planes,
        UNIT=unit_of(problem),
        GROUP_SIZE=problem.group_size or ONE_GROUP,
        HAS_OFFSET=problem.offset,
        HAS_SPARSE=problem.sparse,
        HAS_BIAS=bias is not None,
        WAITS=starts,
        ASM=not interpret,
        num_warps=row_warps * k_warps,
        num_stages=1,
        launch_pdl=starts,
        maxnreg=maxnreg,
    )
