# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation, for compute capability 8.0 and later, and its launch.

Weights are the rows of the product and tokens its columns, so that one token wastes no rows of the tensor cores.
Entries of a codebook are found by byte permutations in registers and multiplied as they are; planes are multiplied
as signs, exact in every dtype, and meet their scales in float32 sums. Single entries, whose loads wait for each
other, and the constants of rows are computed by a small kernel before, while this one already multiplies.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.layout import ONE_GROUP, block_k, num_tiles, piece_of, unit_of
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.lut_linear.products import add_entries, add_planes, load_scales, load_table
from quattuor.kernels.lut_linear.side_kernel import has_constant, side_of, sums_of
from quattuor.kernels.w4a8_linear.planes import Tile

__all__ = ["launch", "lut_kernel"]


# a kernel serves every batch and every cut of K: these sizes decide nothing that is compiled
@triton.jit(do_not_specialize=["M", "SPLIT", "NUM_BLOCKS", "NUM_GROUPS"])
def lut_kernel(
    x,
    packed,
    table,
    offset,
    sums,
    side,
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
    HAS_SIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    WAITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of ROWS outputs by TOKENS tokens over 1 / SPLIT of the blocks of K, in pieces of one group.

    When the tile is split every program stores its float32 sums; the last to arrive at a tile adds them in the
    order of the parts, whoever is last, and resets the arrival counter for the next launch. What the kernel before
    has put beside is added at the end, and only then waited for.
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

    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    index_of_pair = tl.arange(0, 2 * ROWS)
    row_of_pair = (tile % num_row_tiles) * ROWS + index_of_pair % ROWS
    plane_of_pair = index_of_pair // ROWS
    weight_of_pair = weight
    pairs = acc
    if PLANES:
        start_of_pair = packed + (row_of_pair // 128).to(tl.int64) * NUM_BLOCKS * (TILES * 8192)
        start_of_pair += row_of_pair % 128 * 64 + plane_of_pair * 8192
        weight_of_pair = start_of_pair[:, None] + column[None, :]
        pairs = tl.zeros((2 * ROWS, TOKENS), dtype=tl.float32)
        registers = load_scales(table, part * 0, row, row_of_pair, plane_of_pair, N_PADDED, NUM_GROUPS, BITS)
    else:
        registers = load_table(table, part * 0, row, N_PADDED)
    for piece in range(first * PIECES, last * PIECES):
        block = piece // PIECES
        inside = piece % PIECES * PIECE
        skipped = block * (TILES * 8192) + inside
        first_k = block * BLOCK_K + inside
        if PLANES:
            acc, pairs = add_planes(
                acc,
                pairs,
                x,
                weight + skipped,
                weight_of_pair + skipped,
                table,
                registers,
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
                weight + skipped,
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

    if PLANES and BITS > 1:
        acc += tl.sum(tl.reshape(pairs, (2, ROWS, TOKENS)), axis=0)
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
        if HAS_SIDE:
            if WAITS:
                gdc_wait()
            beside = side + token[None, :].to(tl.int64) * N_PADDED + row[:, None]
            acc = acc + tl.load(beside, mask=token[None, :] < M, other=0.0)
        if HAS_BIAS:
            acc = acc + tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = out + token[None, :].to(tl.int64) * N + row[:, None]
        tl.store(where, acc.to(out.dtype.element_ty), mask=(token[None, :] < M) & (row[:, None] < N))


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
    tiles, block = num_tiles(problem), block_k(problem)
    num_blocks, padded_rows = packed.shape[1] // tiles, packed.shape[0] * 128
    unit = unit_of(problem)
    waits = problem.compute_capability is not None and problem.compute_capability[0] == 9
    sums = side = partial = table
    is_constant = has_constant(problem, is_masked)
    if is_constant and problem.group_size is not None:
        sums = sums_of(x, num_blocks * block // unit, unit)
    has_side = problem.sparse or (is_constant and problem.group_size is None)
    if has_side:
        side = side_of(problem, x, operand, padded_rows, is_masked, waits)
    if tile.split > 1:
        shape = (num_parts * tile.split * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    launcher(lut_kernel, (num_parts, tile.split))(
        x,
        packed,
        table,
        operand.get("offset", table),
        sums,
        side,
        table if bias is None else bias,
        out,
        partial,
        operand["arrivals"],
        num_tokens,
        problem.out_features,
        in_features,
        x.stride(0),
        padded_rows,
        num_blocks,
        table.shape[1] if is_planes else table.shape[0],
        tile.split,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        BLOCK_K=block,
        TILES=tiles,
        PIECE=piece_of(problem),
        UNIT=unit,
        GROUP_SIZE=problem.group_size or ONE_GROUP,
        HAS_GROUPS=problem.group_size is not None,
        BITS=problem.weight_bits,
        PLANES=is_planes,
        MASKED=is_masked,
        HAS_OFFSET=problem.offset,
        HAS_SIDE=has_side,
        HAS_BIAS=bias is not None,
        IS_SPLIT=tile.split > 1,
        EVEN_K=in_features % block == 0,
        WAITS=has_side and waits,
        ASM=not interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=has_side and waits,
        # four programs on a multiprocessor instead of three; more planes would spill
        maxnreg=128 if problem.weight_bits <= 2 and problem.group_size is None else None,
    )
