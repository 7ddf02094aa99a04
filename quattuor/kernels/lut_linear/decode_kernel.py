# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that decode some rows of a packed weight into a dense one, and their launch."""

from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.layout import ONE_GROUP, block_k, num_tiles, piece_of
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.lut_linear.products import load_table
from quattuor.kernels.lut_linear.unpacking import look_up

__all__ = ["add_entries_kernel", "decode_kernel", "decode_rows", "linear_rows"]

#: Rows of one program of the decoder, and single entries that a program adds at once.
ROWS = 32
CHUNK = 128


@triton.jit
def plane_values(
    weight, table, offset, row, group, SUB: tl.constexpr, N_PADDED, NUM_GROUPS, BITS: tl.constexpr, HAS_OFFSET
):
    """Weights of one piece of a sub-block, float32."""
    scale = tl.load(table + group.to(tl.int64) * N_PADDED + row).to(tl.float32)
    value = (((tl.load(weight).to(tl.int32) >> SUB) & 1) * 2 - 1).to(tl.float32) * scale[:, None]
    for plane in tl.static_range(1, BITS):
        sign = (((tl.load(weight + plane * 8192).to(tl.int32) >> SUB) & 1) * 2 - 1).to(tl.float32)
        scale = tl.load(table + (plane * NUM_GROUPS + group).to(tl.int64) * N_PADDED + row).to(tl.float32)
        value += sign * scale[:, None]
    if HAS_OFFSET:
        value += tl.load(offset + group.to(tl.int64) * N_PADDED + row).to(tl.float32)[:, None]
    return value


@triton.jit(do_not_specialize=["first_row", "NUM_BLOCKS", "NUM_GROUPS"])
def decode_kernel(
    packed,
    table,
    offset,
    out,
    first_row,
    N,
    K,
    N_PADDED,
    NUM_BLOCKS,
    NUM_GROUPS,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ASM: tl.constexpr,
):
    """Decode ROWS rows of one piece of every sub-block of a block of K; row `first_row` goes to row 0 of `out`."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = first_row + place
    block = tl.program_id(1) // (64 // PIECE)
    inside = tl.program_id(1) % (64 // PIECE) * PIECE + tl.arange(0, PIECE)
    start = (row // 128).to(tl.int64) * NUM_BLOCKS * (TILES * 8192) + row % 128 * 64 + block * (TILES * 8192)
    weight = packed + start[:, None] + inside[None, :]
    SUBS: tl.constexpr = BLOCK_K // 64
    LOOK_UP: tl.constexpr = not PLANES and BITS <= 4
    third = tl.load(weight + 2 * 8192) if LOOK_UP and BITS == 3 else 0
    for sub in tl.static_range(SUBS):
        k = block * BLOCK_K + sub * 64 + inside
        group = (block * BLOCK_K + sub * 64 + tl.program_id(1) % (64 // PIECE) * PIECE) // GROUP_SIZE
        if PLANES:
            value = plane_values(weight, table, offset, row, group, sub, N_PADDED, NUM_GROUPS, BITS, HAS_OFFSET)
        elif LOOK_UP:
            words = tl.load(weight + (sub // 8 if BITS == 3 else 0) * 8192)
            entries = look_up(words, third, load_table(table, group, row, N_PADDED), sub // 4, BITS, ASM)
            value = entries[sub % 4]
        else:
            code = (tl.load(weight).to(tl.int32) >> (8 * sub)) & 255
            value = tl.load(table + (group.to(tl.int64) * N_PADDED + row)[:, None] * (2**BITS) + code)
        where = out + place.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(where, value.to(out.dtype.element_ty), mask=(row < N)[:, None] & (k < K)[None, :])


@triton.jit
def add_entries_kernel(row_offsets, columns, values, out, K, CHUNK: tl.constexpr):
    """Add the single entries of one row to a dense row; their columns differ, so that no sum is lost."""
    row = tl.program_id(0)
    start = tl.load(row_offsets + row)
    stop = tl.load(row_offsets + row + 1)
    for first in range(start, stop, CHUNK):
        place = first + tl.arange(0, CHUNK)
        mask = place < stop
        where = out + row.to(tl.int64) * K + tl.load(columns + place, mask=mask, other=0).to(tl.int32)
        total = tl.load(where, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(where, total.to(out.dtype.element_ty), mask=mask)


def decode_rows(
    problem: LutProblem, operand: Mapping[str, Tensor], first_row: int, out: Tensor, *, interpret: bool = False
) -> None:
    """Fill `out` [rows, K] with the weight from `first_row` on, single entries included, rounded to its dtype."""
    packed, table, is_planes = operand["packed"], operand["table"], problem.kind == "planes"
    piece, tiles, block = piece_of(problem), num_tiles(problem), block_k(problem)
    num_blocks = packed.shape[1] // tiles
    launcher(decode_kernel, (triton.cdiv(len(out), ROWS), num_blocks * (64 // piece)))(
        packed,
        table,
        operand.get("offset", table),
        out,
        first_row,
        first_row + len(out),
        problem.in_features,
        packed.shape[0] * 128,
        num_blocks,
        table.shape[1] if is_planes else table.shape[0],
        ROWS=ROWS,
        BLOCK_K=block,
        TILES=tiles,
        PIECE=piece,
        GROUP_SIZE=problem.group_size or ONE_GROUP,
        BITS=problem.weight_bits,
        PLANES=is_planes,
        HAS_OFFSET="offset" in operand,
        ASM=not interpret,
        num_warps=4,
    )
    if "values" in operand:
        row_offsets = operand["row_offsets"][first_row:]
        launcher(add_entries_kernel, (len(out),))(
            row_offsets, operand["columns"], operand["values"], out, problem.in_features, CHUNK=CHUNK, num_warps=1
        )


def linear_rows(
    problem: LutProblem,
    x: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    num_rows: int,
    *,
    decode: Callable[[LutProblem, Mapping[str, Tensor], int, Tensor], None] = decode_rows,
) -> None:
    """Fill `out` [M, N] by decoding `num_rows` rows of the weight at a time to the dtype of x."""
    scratch = torch.empty(min(num_rows, problem.out_features), problem.in_features, dtype=x.dtype, device=x.device)
    for first in range(0, problem.out_features, num_rows):
        last = min(first + num_rows, problem.out_features)
        dense = scratch[: last - first]
        decode(problem, operand, first, dense)
        if bias is None and out.dtype == x.dtype:
            torch.mm(x, dense.T, out=out[:, first:last])
            continue
        y = torch.mm(x, dense.T) if x.dtype == torch.float32 else torch.mm(x, dense.T, out_dtype=torch.float32)
        out[:, first:last] = y if bias is None else y + bias[first:last].float()
