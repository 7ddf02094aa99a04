# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation, for compute capability 8.0 and later, and its launch.

Weights are the rows of the product and tokens its columns, so that one token wastes no rows of the tensor cores.
Entries of a codebook are looked up per weight and multiplied as they are; planes are multiplied as signs, exact in
every dtype, and meet their scales in float32 sums. Single entries are added to the sums before the rounding.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.lut_linear.triton import BLOCK_K, Tile, piece_of

__all__ = ["launch", "lut_kernel"]


@triton.jit
def load_field(words, row, first_k, row_words, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """The values of one field for the rows and a piece of K, as int32 [rows, PIECE]."""
    PER_WORD: tl.constexpr = 32 // WIDTH
    NUM_WORDS: tl.constexpr = PIECE // PER_WORD
    column = first_k // PER_WORD + tl.arange(0, NUM_WORDS)
    packed = tl.load(words + row[:, None].to(tl.int64) * row_words + column[None, :])
    shift = tl.arange(0, PER_WORD) * WIDTH
    value = (packed[:, :, None] >> shift[None, None, :]) & (2**WIDTH - 1)
    return tl.reshape(value, (row.shape[0], PIECE))


@triton.jit
def dot_exact(weight, tokens):
    """weight @ tokens in float32; a float16 entry meets bfloat16 tokens as the sum of two bfloat16 numbers."""
    if tokens.dtype == tl.bfloat16:
        wide = weight.to(tl.float32)
        high = wide.to(tl.bfloat16)
        low = (wide - high.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(high, tokens, out_dtype=tl.float32)
        product = tl.dot(low, tokens, acc=product, out_dtype=tl.float32)
    else:
        product = tl.dot(weight.to(tokens.dtype), tokens, input_precision="ieee", out_dtype=tl.float32)
    return product


@triton.jit
def add_single_entries(acc, x, row_offsets, columns, values, row, token, M, stride_xm):
    """Add the single entries of the rows: as many rounds as the longest row has entries."""
    start = tl.load(row_offsets + row)
    stop = tl.load(row_offsets + row + 1)
    longest = tl.max(stop - start, axis=0)
    for index in range(longest):
        place = start + index
        is_inside = place < stop
        k = tl.load(columns + place, mask=is_inside, other=0).to(tl.int32)
        value = tl.load(values + place, mask=is_inside, other=0.0).to(tl.float32)
        where = x + token[None, :].to(tl.int64) * stride_xm + k[:, None]
        entry = tl.load(where, mask=is_inside[:, None] & (token[None, :] < M), other=0.0)
        acc += value[:, None] * entry.to(tl.float32)
    return acc


@triton.jit
def lut_kernel(
    x,
    words,
    table,
    offset,
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
    K_PADDED,
    NUM_GROUPS,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of ROWS outputs by TOKENS tokens over 1 / SPLIT of K, in pieces of one group.

    With SPLIT > 1 every program stores its float32 sums; the last to arrive at a tile adds them in the order of
    the parts, whoever is last, and resets the arrival counter for the next launch.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    num_row_tiles = tl.cdiv(N, ROWS)
    row = (tile % num_row_tiles) * ROWS + tl.arange(0, ROWS)
    token = (tile // num_row_tiles) * TOKENS + tl.arange(0, TOKENS)
    num_pieces = K_PADDED // PIECE
    words_per_bit = K_PADDED // 32

    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for piece in range(part * num_pieces // SPLIT, (part + 1) * num_pieces // SPLIT):
        first_k = piece * PIECE
        k = first_k + tl.arange(0, PIECE)
        mask = (token[None, :] < M) & (k[:, None] < K)
        tokens = tl.load(x + token[None, :].to(tl.int64) * stride_xm + k[:, None], mask=mask, other=0.0)
        group = first_k // GROUP_SIZE
        field = words
        if PLANES:
            for plane in tl.static_range(BITS):
                bit = load_field(field, row, first_k, words_per_bit, 1, PIECE)
                sign = (bit * 2 - 1).to(tokens.dtype)
                product = tl.dot(sign, tokens, input_precision="ieee", out_dtype=tl.float32)
                scale = tl.load(table + (plane * NUM_GROUPS + group) * N_PADDED + row).to(tl.float32)
                acc += product * scale[:, None]
                field += N_PADDED.to(tl.int64) * words_per_bit
            if HAS_OFFSET:
                constant = tl.load(offset + group * N_PADDED + row).to(tl.float32)
                acc += constant[:, None] * tl.sum(tokens.to(tl.float32), axis=0)[None, :]
        else:
            code = tl.zeros((ROWS, PIECE), dtype=tl.int32)
            if BITS & 8:
                code += load_field(field, row, first_k, 8 * words_per_bit, 8, PIECE)
            if BITS & 4:
                code += load_field(field, row, first_k, 4 * words_per_bit, 4, PIECE)
                field += N_PADDED.to(tl.int64) * (4 * words_per_bit)
            if BITS & 2:
                code += load_field(field, row, first_k, 2 * words_per_bit, 2, PIECE) << (BITS & 4)
                field += N_PADDED.to(tl.int64) * (2 * words_per_bit)
            if BITS & 1:
                code += load_field(field, row, first_k, words_per_bit, 1, PIECE) << (BITS & 6)
            entries = table + (group * N_PADDED + row)[:, None].to(tl.int64) * (2**BITS)
            acc += dot_exact(tl.load(entries + code), tokens)

    if HAS_SPARSE:  # noqa: SIM102  (decided when compiling, so that nothing is loaded from an absent tensor)
        if part == 0:
            acc = add_single_entries(acc, x, row_offsets, columns, values, row, token, M, stride_xm)

    is_last = True
    if SPLIT > 1:
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


def launch(
    problem: LutProblem,
    x: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    *,
    tile: Tile,
) -> None:
    """Fill `out` [M, N]; the weight tensors are padded as `lut_linear.triton` prepares them."""
    num_tokens, in_features = x.shape
    table, is_planes = operand["table"], problem.kind == "planes"
    num_tiles = triton.cdiv(problem.out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    partial = table
    if tile.split > 1:
        shape = (num_tiles * tile.split * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    padded = in_features + -in_features % BLOCK_K
    lut_kernel[(num_tiles, tile.split)](
        x,
        operand["words"],
        table,
        operand.get("offset", table),
        operand.get("row_offsets", operand["words"]),
        operand.get("columns", operand["words"]),
        operand.get("values", table),
        table if bias is None else bias,
        out,
        partial,
        operand["arrivals"],
        num_tokens,
        problem.out_features,
        in_features,
        x.stride(0),
        table.shape[2] if is_planes else table.shape[1],
        padded,
        table.shape[1] if is_planes else table.shape[0],
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        PIECE=piece_of(problem),
        GROUP_SIZE=problem.group_size or padded,
        BITS=problem.weight_bits,
        PLANES=is_planes,
        HAS_OFFSET="offset" in operand,
        HAS_SPARSE="values" in operand,
        HAS_BIAS=bias is not None,
        SPLIT=tile.split,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
