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
    ONCE,
    SHARED,
    as_numbers,
    from_lane,
    load_two_words,
    load_words,
    multiply_pairs,
)
from quattuor.kernels.lut_linear.lanes.layout import ONE_GROUP, TILE_ROWS, unit_of
from quattuor.kernels.lut_linear.lanes.steps import load_block, start_sums
from quattuor.kernels.lut_linear.lanes.weights import load_numbers, weights_of
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.tiles import store_tile

__all__ = ["batch_kernel", "launch"]

#: Two programs of eight warps on a multiprocessor.
MAX_REGISTERS = 128


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
def load_entry(columns, values, place, stop):
    """The column and the value, as bits, of one single entry for each lane; 0 and 0 beyond the end of a row."""
    k = tl.load(columns + place, mask=place < stop, other=0).to(tl.int32)
    value = tl.load(values + place, mask=place < stop, other=0.0).to(tl.float32)
    return k, value.to(tl.int32, bitcast=True)


@triton.jit
def add_entry(
    sums, transposed, entry, lane, PLACE: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr
):
    """Add entry PLACE of the four that the lanes of each row hold, of rows g + 8 R, times every token."""
    k, bits = entry
    column = from_lane(k, PLACE, ASM)
    value = from_lane(bits, PLACE, ASM).to(tl.float32, bitcast=True)
    start = transposed + column.to(tl.int64) * (4 * TILES) + lane % 4 * TILES
    words = ()
    if TILES >= 4:
        for load in tl.static_range(TILES // 4):
            words += load_words(start + 4 * load, SHARED, ASM)
    elif TILES == 2:
        words = load_two_words(start, ASM)
    else:
        words = (tl.load(start),)
    result = ()
    for tile in tl.static_range(TILES):
        c0, c1, c2, c3 = sums[tile]
        first, second = as_numbers(words[tile])
        if R == 0:
            c0 += value * first
            c1 += value * second
        else:
            c2 += value * first
            c3 += value * second
        result += ((c0, c1, c2, c3),)
    return result


@triton.jit
def add_entries(sums, transposed, low, high, lane, TILES: tl.constexpr, ASM: tl.constexpr):
    """Add four single entries of each row times every token; `low` and `high` are what `load_entry` returned."""
    for place in tl.static_range(4):
        sums = add_entry(sums, transposed, low, lane, place, 0, TILES, ASM)
        sums = add_entry(sums, transposed, high, lane, place, 1, TILES, ASM)
    return sums


@triton.jit(do_not_specialize=["M", "NUM_BLOCKS", "NUM_GROUPS", "ROUNDS"])
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
    ROW_WARPS: tl.constexpr,
    K_WARPS: tl.constexpr,
    TILES: tl.constexpr,
    IN_TURN: tl.constexpr,
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
    """Sixteen rows for each of ROW_WARPS times 8 * TILES tokens; K_WARPS take blocks of K in turn.

    IN_TURN loads words of the next block, those of two steps at a time, when those of this block are used up. Four
    single entries of a row are added with each block, until there are none.
    """
    lanes = tl.arange(0, ROW_WARPS * K_WARPS * 32)
    warp = lanes // 32
    lane = lanes % 32
    k_warp = warp // ROW_WARPS
    row_tile = tl.minimum(tl.program_id(0) * ROW_WARPS + warp % ROW_WARPS, N_PADDED // 16 - 1)
    row = row_tile * 16 + lane // 4
    weight = packed + row_tile.to(tl.int64) * NUM_BLOCKS * (BITS * 128) + lane * 4
    ahead = load_block(weight + tl.minimum(k_warp, NUM_BLOCKS - 1) * (BITS * 128), BITS, ASM)
    numbers = load_numbers(table, offset, k_warp * 0, row, N_PADDED, NUM_GROUPS, BITS, PLANES, HAS_OFFSET)
    if HAS_SPARSE:
        place_low = tl.load(row_offsets + row)
        place_high = tl.load(row_offsets + row + 8)
        stop_low = tl.load(row_offsets + row + 1)
        stop_high = tl.load(row_offsets + row + 9)
        most = tl.max(tl.maximum(stop_low - place_low, stop_high - place_high), axis=0)
        place_low += k_warp * 4 + lane % 4
        place_high += k_warp * 4 + lane % 4
        low = load_entry(columns, values, place_low, stop_low)
        high = load_entry(columns, values, place_high, stop_high)
    if WAITS:
        gdc_wait()
    sums = start_sums(tl.zeros(lanes.shape, dtype=tl.float32), TILES)
    for turn in range(ROUNDS):
        block = turn * K_WARPS + k_warp
        start = weight + tl.minimum(block + K_WARPS, NUM_BLOCKS - 1) * (BITS * 128)
        here = ahead
        ahead = ()
        if not IN_TURN:
            ahead = load_block(start, BITS, ASM)
        if HAS_SPARSE:  # noqa: SIM102 (decided when it is compiled)
            if turn * (4 * K_WARPS) < most:
                sums = add_entries(sums, transposed, low, high, lane, TILES, ASM)
                place_low += 4 * K_WARPS
                place_high += 4 * K_WARPS
                low = load_entry(columns, values, place_low, stop_low)
                high = load_entry(columns, values, place_high, stop_high)
        operand = words + block * (8 * TILES * 128) + lane * 4
        for step in tl.static_range(8):
            tokens = load_tokens(operand + step * TILES * 128, TILES, ASM)
            for h in tl.static_range(2):
                if UNIT > 0 and (step * 32 + h * 16) % UNIT == 0:
                    group = (tl.minimum(block, NUM_BLOCKS - 1) * 256 + step * 32 + h * 16) // GROUP_SIZE
                    numbers = load_numbers(
                        table, offset, group, row, N_PADDED, NUM_GROUPS, BITS, PLANES, HAS_OFFSET
                    )
                weights = weights_of(here, numbers, step, h, BITS, PLANES, HAS_OFFSET, ASM)
                sums = add_half_step(sums, weights, tokens, h, TILES, ASM)
            if IN_TURN and step % 2 == 1:
                ahead += load_words(start + step // 2 * 128, ONCE, ASM)
    if HAS_SPARSE:
        for _ in range(ROUNDS * (4 * K_WARPS), most, 4 * K_WARPS):
            sums = add_entries(sums, transposed, low, high, lane, TILES, ASM)
            place_low += 4 * K_WARPS
            place_high += 4 * K_WARPS
            low = load_entry(columns, values, place_low, stop_low)
            high = load_entry(columns, values, place_high, stop_high)

    every = tl.program_id(0) * (ROW_WARPS * 16) + tl.arange(0, ROW_WARPS * 16)
    token = tl.arange(0, 8 * TILES)
    y = joined(sums, TILES, ROW_WARPS, K_WARPS) * tl.load(unit + token)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + every, mask=every < N, other=0.0).to(tl.float32)[:, None]
    store_tile(out, y, every, token, M, N)


def launch(
    problem: LutProblem,
    x: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    *,
    row_warps: int,
    k_warps: int,
    in_turn: bool | None = None,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; the weight tensors are padded as `prepare_lanes` prepares them.

    `in_turn` is chosen by default, see `batch_kernel`. `interpret` replaces the inline assembly by arithmetic that
    Triton's interpreter knows.
    """
    packed, is_planes = operand["packed"], problem.kind == "planes"
    row_tiles, num_blocks = packed.shape[:2]
    rounds = -(-num_blocks // k_warps)
    starts = problem.compute_capability is not None and problem.compute_capability[0] == 9
    tiles = triton.next_power_of_2(triton.cdiv(len(x), TOKENS_OF_COLUMNS))
    halves = halves_of(x, rounds * k_warps, tiles, is_transposed=problem.sparse, starts=starts)
    table = operand["table"]
    launcher(batch_kernel, (triton.cdiv(row_tiles, row_warps),))(
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
        ROW_WARPS=row_warps,
        K_WARPS=k_warps,
        TILES=tiles,
        IN_TURN=problem.kind == "codebook" and problem.weight_bits == 4 if in_turn is None else in_turn,
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
        maxnreg=MAX_REGISTERS if tiles > 2 and row_warps * k_warps == 8 else None,
    )
