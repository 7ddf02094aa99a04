# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation, for compute capability 8.0 and later, and its launch.

The operands are swapped, as in w4a8_linear: a program computes y[tokens, rows] transposed. Words of the packed
weight go from shared memory to registers as the tensor cores want them; a mask and a multiply-add make a plane of
them the operand. The tensor cores multiply codes less integer zero points, which are exact; the scale of a group
meets the float32 sum over the group, and so does a zero point that is no integer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quattuor.kernels.launch import launcher
from quattuor.kernels.tiles import join_parts, store_tile
from quattuor.kernels.w4a16_linear.decode_kernel import (
    FAR,
    INTEGER,
    MIDDLE,
    OFFSET,
    as_float,
    constants,
    decode,
    load_groups,
    load_words,
    prefetch_groups,
)
from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, Layout, Tile

__all__ = ["launch", "w4a16_kernel"]


@triton.jit
def load_tokens(x, token, k, M, K, stride_xm, EVEN_K: tl.constexpr):
    """Activations [k, tokens], zero outside the matrix."""
    mask = token[None, :] < M
    if not EVEN_K:
        mask = mask & (k[:, None] < K)
    return tl.load(x + token[None, :].to(tl.int64) * stride_xm + k[:, None], mask=mask, other=0.0)


# a kernel serves every batch and every cut of K: these sizes decide nothing that is compiled
@triton.jit(do_not_specialize=["M", "NUM_BLOCKS", "SPLIT"])
def w4a16_kernel(
    x,
    packed,
    scale,
    zero_point,
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
    SPLIT,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    WORDS: tl.constexpr,
    PLANE_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of ROWS outputs by TOKENS tokens over 1 / SPLIT of the K blocks, in pieces of one group.

    GROUP_SIZE is 0 with one scale per row. When the tile is split every program stores its float32 sums; the last
    to arrive at a tile adds them in the order of the parts, whoever is last, and resets the arrival counter.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    num_row_tiles = tl.cdiv(N, ROWS)
    row = (tile % num_row_tiles) * ROWS + tl.arange(0, ROWS)
    token = (tile // num_row_tiles) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, PLANE_K)
    dtype: tl.constexpr = x.dtype.element_ty
    BLOCK_K: tl.constexpr = PLANES * PLANE_K
    IS_GROUPED: tl.constexpr = GROUP_SIZE > 0
    GROUP: tl.constexpr = GROUP_SIZE if IS_GROUPED else 1 << 30
    RUN: tl.constexpr = PLANES // PIECES
    # zero points in the operand are not carried: the compiler would move the operand through shared memory
    CARRIES: tl.constexpr = IS_GROUPED and ZERO != INTEGER
    row_start = packed + (row // 128).to(tl.int64) * NUM_BLOCKS * (WORDS * 128 * PLANE_K) + row % 128 * PLANE_K
    weight = row_start[:, None] + column[None, :]
    first = part * NUM_BLOCKS // SPLIT
    last = (part + 1) * NUM_BLOCKS // SPLIT
    row_scale = scale + row
    row_zero = zero_point + row
    tile_scale = scale + (tile % num_row_tiles) * ROWS
    tile_zero = zero_point + (tile % num_row_tiles) * ROWS

    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    scales = ()
    if CARRIES:
        scales = load_groups(row_scale, first, N_PADDED, PIECES, BLOCK_K, GROUP, False)
    for block in range(first, last):
        words = load_words(weight, block, WORDS, PLANE_K)
        # products of float32 leave no registers for the addresses
        if ASM and IS_GROUPED and dtype != tl.float32:
            far = tl.minimum(block + FAR, last - 1)
            prefetch_groups(tile_scale, far, N_PADDED, ROWS, PIECES, BLOCK_K, GROUP)
            if ZERO != MIDDLE:
                prefetch_groups(tile_zero, far, N_PADDED, ROWS, PIECES, BLOCK_K, GROUP)
        now_scales = scales
        now_zeros = ()
        if ZERO != MIDDLE:
            now_zeros = load_groups(row_zero, block, N_PADDED, PIECES, BLOCK_K, GROUP, False)
        if CARRIES:
            following = tl.minimum(block + 1, last - 1)
            scales = load_groups(row_scale, following, N_PADDED, PIECES, BLOCK_K, GROUP, False)
        elif IS_GROUPED:
            now_scales = load_groups(row_scale, block, N_PADDED, PIECES, BLOCK_K, GROUP, False)
        for piece in tl.static_range(PIECES):
            # never the sum of all blocks: the compiler would wait for each of its warpgroup products
            product = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            total = tl.zeros((TOKENS,), dtype=tl.float32)
            for run in tl.static_range(RUN):
                k = block * BLOCK_K + (piece * RUN + run) * PLANE_K + column
                tokens = load_tokens(x, token, k, M, K, stride_xm, EVEN_K)
                zero = now_zeros[piece] if ZERO == INTEGER else 0
                operand = decode(words, zero, dtype, BITS, piece * RUN + run, ZERO, ASM)
                product = tl.dot(operand, tokens, product, input_precision="ieee", out_dtype=tl.float32)
                if ZERO == OFFSET:
                    total += tl.sum(tokens.to(tl.float32), axis=0)
            if ZERO == OFFSET:
                product -= now_zeros[piece][:, None] * total[None, :]
            if IS_GROUPED:
                product *= as_float(now_scales[piece], scale.dtype.element_ty)[:, None]
            acc += product

    is_last = True
    if IS_SPLIT:
        is_last, acc = join_parts(acc, partial, arrivals, tile, part, SPLIT, ROWS, TOKENS)
    if is_last:
        if not IS_GROUPED:
            acc = acc * tl.load(row_scale).to(tl.float32)[:, None]
        if HAS_BIAS:
            acc = acc + tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        store_tile(out, acc, row, token, M, N)


def launch(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    arrivals: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    layout: Layout,
    group_size: int | None,
    tile: Tile,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; the weight tensors are what `planes.prepare_tensors` makes.

    `zero_point` is uint8 or the float32 offset, `group_size` None with one scale per row. `arrivals` is an int32
    counter per tile, zero before and after. `interpret` replaces the inline assembly by arithmetic that Triton's
    interpreter knows.
    """
    num_tokens, in_features = x.shape
    out_features = out.shape[1]
    num_tiles = triton.cdiv(out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    partial = scale
    if tile.split > 1:
        shape = (num_tiles * tile.split * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    launcher(w4a16_kernel, (num_tiles, tile.split))(
        x,
        packed,
        scale,
        scale if zero_point is None else zero_point,
        scale if bias is None else bias,
        out,
        partial,
        arrivals,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        packed.shape[0] * TILE_ROWS,
        packed.shape[1],
        tile.split,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        HAS_BIAS=bias is not None,
        IS_SPLIT=tile.split > 1,
        EVEN_K=in_features % layout.block_k == 0,
        **constants(layout, group_size, zero_point, interpret),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
