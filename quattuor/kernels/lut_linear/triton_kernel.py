# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation, for compute capability 8.0 and later, and its launch.

Weights are the rows of the product and tokens its columns, so that one token wastes no rows of the tensor cores.
Entries of a codebook are found by byte permutations in registers and multiplied as they are; planes are multiplied
as signs, exact in every dtype, and meet their scales in float32 sums. Single entries are added to the same sums.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.lut_linear.layout import block_k, num_tiles, piece_of, unit_of
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.lut_linear.unpacking import bit_value, look_up, signs
from quattuor.kernels.w4a8_linear.planes import Tile

__all__ = ["launch", "lut_kernel", "sums_kernel"]

#: Single entries of a row that are added at once.
CHUNK = tl.constexpr(16)


@triton.jit
def prefetch(pointer):
    """Bring the cache line at each address to L2."""
    tl.inline_asm_elementwise(
        "{ .reg .b64 a; cvta.to.global.u64 a, $1; prefetch.global.L2 [a]; mov.b32 $0, 0; }",
        "=r,l",
        [pointer.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
def add_single_entries(
    acc, x, row_offsets, columns, values, row, token, part, parts, M, stride_xm, TOKENS: tl.constexpr
):
    """Add this part's share of the single entries of the rows: every `parts`-th chunk of each row."""
    start = tl.load(row_offsets + row)
    stop = tl.load(row_offsets + row + 1)
    longest = tl.max(stop - start, axis=0)
    first_token = tl.min(token, axis=0)
    number_of = tl.arange(0, TOKENS)
    for chunk in range(part, tl.cdiv(longest, CHUNK), parts):
        index = tl.arange(0, CHUNK) + chunk * CHUNK
        place = start[:, None] + index[None, :]
        is_inside = place < stop[:, None]
        k = tl.load(columns + place, mask=is_inside, other=0).to(tl.int32)
        value = tl.load(values + place, mask=is_inside, other=0.0).to(tl.float32)
        for number in range(tl.minimum(M - first_token, TOKENS)):
            where = x + (first_token + number).to(tl.int64) * stride_xm + k
            sums = tl.sum(value * tl.load(where, mask=is_inside, other=0.0).to(tl.float32), axis=1)
            acc += tl.where(number_of[None, :] == number, sums[:, None], 0.0)
    return acc


@triton.jit
def load_scales(table, group, row, N_PADDED, NUM_GROUPS, BITS: tl.constexpr):
    """The scale of every plane for the rows; those beyond BITS repeat the last and are never read."""
    start = table + group.to(tl.int64) * N_PADDED + row
    step = NUM_GROUPS.to(tl.int64) * N_PADDED
    return (
        tl.load(start).to(tl.float32),
        tl.load(start + min(1, BITS - 1) * step).to(tl.float32),
        tl.load(start + min(2, BITS - 1) * step).to(tl.float32),
        tl.load(start + min(3, BITS - 1) * step).to(tl.float32),
        tl.load(start + min(4, BITS - 1) * step).to(tl.float32),
        tl.load(start + min(5, BITS - 1) * step).to(tl.float32),
        tl.load(start + min(6, BITS - 1) * step).to(tl.float32),
        tl.load(start + min(7, BITS - 1) * step).to(tl.float32),
    )


@triton.jit
def add_constant(
    acc,
    scales,
    offset,
    sums,
    group,
    unit,
    row,
    token,
    M,
    N_PADDED,
    BITS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what every input of a unit gets: the offset; and less the scales, as a sign is 2 bit - 1."""
    constant = tl.zeros((row.shape[0],), dtype=tl.float32)
    if MASKED:
        for plane in tl.static_range(BITS):
            constant -= scales[plane]
    if HAS_OFFSET:
        constant += tl.load(offset + group.to(tl.int64) * N_PADDED + row).to(tl.float32)
    total = tl.load(sums + unit * M + token, mask=token < M, other=0.0)
    return acc + constant[:, None] * total[None, :]


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
    x,
    weight,
    table,
    scales,
    offset,
    sums,
    first_k,
    row,
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

    UNIT is the longest run of K that lies in one group and in this piece, or in whole sub-blocks of this block;
    `scales` serve where there are no groups. Sums of a plane meet its scale once in every unit.
    """
    FLUSH: tl.constexpr = 16 if not HAS_GROUPS else (UNIT // 64 if UNIT > 64 else 1)
    SIGN: tl.constexpr = 1.0 if MASKED else -1.0
    for flush in tl.static_range(16 // FLUSH):
        t0 = tl.zeros(acc.shape, dtype=tl.float32)
        t1, t2, t3, t4, t5, t6, t7 = t0, t0, t0, t0, t0, t0, t0
        for inside in tl.static_range(FLUSH):
            tokens = load_tokens(
                x, token, first_k + (flush * FLUSH + inside) * 64 + column, M, K, stride_xm, EVEN_K
            )
            t0 = add_plane(t0, tl.load(weight), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 1:
                t1 = add_plane(t1, tl.load(weight + 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 2:
                t2 = add_plane(t2, tl.load(weight + 2 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 3:
                t3 = add_plane(t3, tl.load(weight + 3 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 4:
                t4 = add_plane(t4, tl.load(weight + 4 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 5:
                t5 = add_plane(t5, tl.load(weight + 5 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 6:
                t6 = add_plane(t6, tl.load(weight + 6 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
            if BITS > 7:
                t7 = add_plane(t7, tl.load(weight + 7 * 8192), tokens, flush * FLUSH + inside, MASKED, ASM)
        if HAS_GROUPS:
            k = first_k + flush * FLUSH * 64
            group = k // GROUP_SIZE
            scales = load_scales(table, group, row, N_PADDED, NUM_GROUPS, BITS)
            if HAS_OFFSET or MASKED:
                acc = add_constant(
                    acc, scales, offset, sums, group, k // UNIT, row, token, M, N_PADDED, BITS, HAS_OFFSET, MASKED
                )
        totals = (t0, t1, t2, t3, t4, t5, t6, t7)
        for plane in tl.static_range(BITS):
            acc += totals[plane] * (scales[plane] * SIGN)[:, None]
    return acc


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
    """Add the products over one piece of every sub-block of a block; `registers` serve where there are no groups."""
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


# a kernel serves every batch and every cut of K: these sizes decide nothing that is compiled
@triton.jit(do_not_specialize=["M", "SPLIT", "NUM_BLOCKS", "NUM_GROUPS"])
def lut_kernel(
    x,
    packed,
    table,
    offset,
    sums,
    row_offsets,
    columns,
    values,
    bias,
    out,
    partial,
    arrivals,
    M,
    N,
    K,
    stride_xm,
    N_PADDED,
    NUM_BLOCKS,
    NUM_GROUPS,
    SPLIT,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of ROWS outputs by TOKENS tokens over 1 / SPLIT of the blocks of K, in pieces of one group.

    When the tile is split every program stores its float32 sums; the last to arrive at a tile adds them in the
    order of the parts, whoever is last, and resets the arrival counter for the next launch.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    num_row_tiles = tl.cdiv(N, ROWS)
    row = (tile % num_row_tiles) * ROWS + tl.arange(0, ROWS)
    token = (tile // num_row_tiles) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, PIECE)
    row_start = packed + (row // 128).to(tl.int64) * NUM_BLOCKS * (TILES * 8192) + row % 128 * 64
    weight = row_start[:, None] + column[None, :]
    PIECES: tl.constexpr = 64 // PIECE
    first = part * NUM_BLOCKS // SPLIT
    last = (part + 1) * NUM_BLOCKS // SPLIT

    if OVERLAP:
        # the weight does not depend on the kernel before this one: bring its first blocks to L2 while that drains
        gdc_launch_dependents()
        for ahead in tl.static_range(4):
            prefetch(
                row_start + tl.minimum(first + ahead // TILES, last - 1) * (TILES * 8192) + ahead % TILES * 8192
            )
        gdc_wait()

    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    if HAS_SPARSE:
        acc = add_single_entries(
            acc, x, row_offsets, columns, values, row, token, part, SPLIT, M, stride_xm, TOKENS
        )
    if PLANES:
        registers = load_scales(table, part * 0, row, N_PADDED, NUM_GROUPS, BITS)
        if not HAS_GROUPS and (HAS_OFFSET or MASKED):
            if part == 0:
                acc = add_constant(
                    acc,
                    registers,
                    offset,
                    sums,
                    part,
                    part,
                    row,
                    token,
                    M,
                    N_PADDED,
                    BITS,
                    HAS_OFFSET,
                    MASKED,
                )
    else:
        registers = load_table(table, part * 0, row, N_PADDED)
    for piece in range(first * PIECES, last * PIECES):
        block = piece // PIECES
        inside = piece % PIECES * PIECE
        here = weight + block * (TILES * 8192) + inside
        first_k = block * BLOCK_K + inside
        if PLANES:
            acc = add_planes(
                acc,
                x,
                here,
                table,
                registers,
                offset,
                sums,
                first_k,
                row,
                token,
                column,
                M,
                K,
                stride_xm,
                N_PADDED,
                NUM_GROUPS,
                GROUP_SIZE,
                UNIT,
                HAS_GROUPS,
                BITS,
                HAS_OFFSET,
                MASKED,
                EVEN_K,
                ASM,
            )
        else:
            acc = add_entries(
                acc,
                x,
                here,
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
                GROUP_SIZE,
                HAS_GROUPS,
                BITS,
                EVEN_K,
                ASM,
            )

    is_last = True
    if IS_SPLIT:
        position = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        slabs = partial + tile.to(tl.int64) * (SPLIT * ROWS * TOKENS)
        tl.store(slabs + part * (ROWS * TOKENS) + position, acc)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1
        if is_last:
            acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for other in range(SPLIT):
                acc += tl.load(slabs + other * (ROWS * TOKENS) + position, cache_modifier=".cg")
            tl.store(arrivals + tile, 0)
    if is_last:
        if HAS_BIAS:
            acc = acc + tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = out + token[None, :].to(tl.int64) * N + row[:, None]
        tl.store(where, acc.to(out.dtype.element_ty), mask=(token[None, :] < M) & (row[:, None] < N))


@triton.jit
def sums_kernel(x, sums, M, K, stride_xm, UNIT, BLOCK: tl.constexpr):
    """sums[u, m] = sum of the tokens' elements of unit u of K, in float32."""
    unit = tl.program_id(0)
    token = tl.program_id(1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, UNIT, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        k = unit * UNIT + inside
        mask = (inside < UNIT) & (k < K)
        total += tl.load(x + token.to(tl.int64) * stride_xm + k, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + unit.to(tl.int64) * M + token, tl.sum(total, axis=0))


def sums_of(x: Tensor, num_units: int, unit: int) -> Tensor:
    """Return the float32 sums [units, M] of the tokens over each unit of K."""
    num_tokens, in_features = x.shape
    sums = torch.empty(num_units, num_tokens, dtype=torch.float32, device=x.device)
    block = min(1024, triton.next_power_of_2(unit))
    warps = 1 if block < 1024 else 4
    sums_kernel[(num_units, num_tokens)](
        x, sums, num_tokens, in_features, x.stride(0), unit, BLOCK=block, num_warps=warps
    )
    return sums


def launch(
    problem: LutProblem,
    x: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    *,
    tile: Tile,
    is_masked: bool = False,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; the weight tensors are padded as `prepare_tiles` prepares them.

    `is_masked` multiplies planes of float16 tokens as bits instead of signs. `interpret` replaces the inline
    assembly by arithmetic that Triton's interpreter knows.
    """
    num_tokens, in_features = x.shape
    packed, table, is_planes = operand["packed"], operand["table"], problem.kind == "planes"
    num_parts = triton.cdiv(problem.out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    piece, tiles, block = piece_of(problem), num_tiles(problem), block_k(problem)
    num_blocks = packed.shape[1] // tiles
    unit = unit_of(problem) or num_blocks * block
    sums = partial = table
    if is_planes and (is_masked or problem.offset):
        sums = sums_of(x, num_blocks * block // unit, unit)
    if tile.split > 1:
        shape = (num_parts * tile.split * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    lut_kernel[(num_parts, tile.split)](
        x,
        packed,
        table,
        operand.get("offset", table),
        sums,
        operand.get("row_offsets", packed),
        operand.get("columns", packed),
        operand.get("values", packed),
        table if bias is None else bias,
        out,
        partial,
        operand["arrivals"],
        num_tokens,
        problem.out_features,
        in_features,
        x.stride(0),
        packed.shape[0] * 128,
        num_blocks,
        table.shape[1] if is_planes else table.shape[0],
        tile.split,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        BLOCK_K=block,
        TILES=tiles,
        PIECE=piece,
        UNIT=unit,
        GROUP_SIZE=problem.group_size or num_blocks * block,
        HAS_GROUPS=problem.group_size is not None,
        BITS=problem.weight_bits,
        PLANES=is_planes,
        MASKED=is_masked,
        HAS_OFFSET="offset" in operand,
        HAS_SPARSE="values" in operand,
        HAS_BIAS=bias is not None,
        IS_SPLIT=tile.split > 1,
        EVEN_K=in_features % block == 0,
        OVERLAP=tile.overlap == "early",
        ASM=not interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=tile.overlap == "early",
    )
