# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that multiplies bytes of codes by bytes of tokens, and the launch of both kernels.

The operands are swapped: a program computes y[tokens, rows] transposed. Every token has four columns, the signed
digits of its elements in base 256; the tensor cores multiply them by the codes and add integers, exactly, over a
group. Two neighbouring columns meet there, and the scale of the group; the other two at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.tiles import join_parts, store_tile
from quattuor.kernels.w4a8_linear.triton_kernel import prefetch_bytes
from quattuor.kernels.w4a16_linear.decode_kernel import (
    FAR,
    MIDDLE,
    OFFSET,
    as_float,
    constants,
    field,
    load_groups,
    load_words,
    prefetch_groups,
)
from quattuor.kernels.w4a16_linear.digits.digits_kernel import digits_of
from quattuor.kernels.w4a16_linear.digits.unpacking import byte_assembly, byte_constraints
from quattuor.kernels.w4a16_linear.overlap import EARLY, LATE, NONE, OVERLAPS
from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, DigitTile, Layout
from quattuor.kernels.w4a16_linear.unpacking import word_of

__all__ = ["launch_digits", "product_kernel"]


@triton.jit
def decode_bytes(words, BITS: tl.constexpr, PLANE: tl.constexpr, ASM: tl.constexpr):
    """The signed codes of one plane times 2^(8 - BITS)."""
    word = words[word_of(BITS, PLANE) % 3 if BITS == 3 else 0]
    if ASM:
        operands = [words[0], words[1], words[2]] if BITS == 3 and PLANE == 15 else [word]
        value = tl.inline_asm_elementwise(
            byte_assembly(BITS, PLANE),
            byte_constraints(BITS, PLANE),
            operands,
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        value = ((field(word, words[1], words[2], BITS, PLANE) - (1 << (BITS - 1))) << (8 - BITS)).to(tl.int8)
    return value


@triton.constexpr_function
def load_assembly(bits):
    """Return the assembly that loads one unsigned value into a register of 32 bits."""
    return f"ld.global.nc.{'b32' if bits == 32 else f'u{bits}'} $0, [$1];"


@triton.jit
def load_rows(
    values,
    block,
    N_PADDED,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_DIRECT: tl.constexpr,
):
    """The value of each row for each piece of a block; IS_DIRECT by the lanes that need it.

    What a load of the compiler returns goes through shared memory to these lanes.
    """
    found = ()
    if IS_DIRECT:
        WIDTH: tl.constexpr = values.dtype.element_ty.primitive_bitwidth
        for piece in tl.static_range(PIECES):
            group = (block * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP_SIZE
            value = tl.inline_asm_elementwise(
                load_assembly(WIDTH),
                "=r,l",
                [(values + group * N_PADDED).to(tl.int64)],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
            if values.dtype.element_ty == tl.float32:
                value = value.to(tl.float32, bitcast=True)
            found = found + (value,)  # noqa: RUF005 (Triton knows no unpacking)
    else:
        found = load_groups(values, block, N_PADDED, PIECES, BLOCK_K, GROUP_SIZE, True)
    return found


@triton.jit
def joined(product, ROWS: tl.constexpr, PAIRS: tl.constexpr, FITS: tl.constexpr):
    """Sums of digits c and c + 1, for even c, as float32: first + 256 second."""
    first, second = tl.split(tl.reshape(product, (ROWS, PAIRS, 2)))
    upper = second * 256 if FITS else second.to(tl.float32) * 256.0
    return (first + upper).to(tl.float32)


@triton.jit
def less_zeros(value, zero, sums, part, pair, M, ZERO: tl.constexpr, BITS: tl.constexpr):
    """Subtract zero points times the sums of the tokens; codes are signed and stand at the top of a byte."""
    if ZERO != MIDDLE:
        rest = zero.to(tl.float32)
        if ZERO != OFFSET:
            rest -= 1 << (BITS - 1)
        total = tl.load(sums + part * (2 * M) + pair, mask=pair < 2 * M, other=0.0)
        value -= (rest * (1 << (8 - BITS)))[:, None] * total[None, :]
    return value


# a kernel serves every batch and every cut of K: these sizes decide nothing that is compiled
@triton.jit(do_not_specialize=["M", "NUM_BLOCKS", "SPLIT"])
def product_kernel(
    digits,
    unit,
    sums,
    packed,
    scale,
    zero_point,
    bias,
    out,
    partial,
    arrivals,
    M,
    N,
    K_PADDED,
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
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    BEFORE: tl.constexpr,
    IS_DIRECT: tl.constexpr,
):
    """One tile of ROWS outputs by TOKENS tokens over 1 / SPLIT of the K blocks, in pieces of one group.

    GROUP_SIZE is 0 with one scale per row. When the tile is split every program stores its float32 sums; the last
    to arrive at a tile adds them in the order of the parts, whoever is last, and resets the arrival counter.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    num_row_tiles = tl.cdiv(N, ROWS)
    row_tile = tile % num_row_tiles
    token_tile = tile // num_row_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    COLUMNS: tl.constexpr = 4 * TOKENS
    PAIRS: tl.constexpr = 2 * TOKENS
    column = token_tile * COLUMNS + tl.arange(0, COLUMNS)
    pair = token_tile * PAIRS + tl.arange(0, PAIRS)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    inside = tl.arange(0, PLANE_K)
    BLOCK_K: tl.constexpr = PLANES * PLANE_K
    IS_GROUPED: tl.constexpr = GROUP_SIZE > 0
    GROUP: tl.constexpr = GROUP_SIZE if IS_GROUPED else 1 << 30
    RUN: tl.constexpr = PLANES // PIECES
    HAS_ZERO: tl.constexpr = ZERO != MIDDLE
    STEP: tl.constexpr = WORDS * 128 * PLANE_K
    row_start = packed + (row // 128).to(tl.int64) * NUM_BLOCKS * STEP + row % 128 * PLANE_K
    weight = row_start[:, None] + inside[None, :]
    first = part * NUM_BLOCKS // SPLIT
    last = (part + 1) * NUM_BLOCKS // SPLIT
    row_scale = scale + row
    row_zero = zero_point + row
    tile_scale = scale + row_tile * ROWS
    tile_zero = zero_point + row_tile * ROWS

    if OVERLAP == EARLY:
        gdc_launch_dependents()
    if OVERLAP != NONE:
        # the weight does not depend on the kernels before this one: bring its first blocks to L2 meanwhile
        rows_start = (
            packed + (row_tile * ROWS // 128).to(tl.int64) * NUM_BLOCKS * STEP + row_tile * ROWS % 128 * PLANE_K
        )
        for ahead in tl.static_range(BEFORE):
            block = tl.minimum(first + ahead, last - 1)
            for word in tl.static_range(WORDS):
                prefetch_bytes(rows_start + block * STEP + word * (128 * PLANE_K), ROWS * PLANE_K * 2)
        if IS_GROUPED:
            for ahead in tl.static_range(FAR):
                block = tl.minimum(first + ahead, last - 1)
                prefetch_groups(tile_scale, block, N_PADDED, ROWS, PIECES, BLOCK_K, GROUP)
                if HAS_ZERO:
                    prefetch_groups(tile_zero, block, N_PADDED, ROWS, PIECES, BLOCK_K, GROUP)
        gdc_wait()

    scales = ()
    zeros = ()
    if IS_GROUPED:
        scales = load_rows(row_scale, first, N_PADDED, PIECES, BLOCK_K, GROUP, IS_DIRECT)
        if HAS_ZERO:
            zeros = load_rows(row_zero, first, N_PADDED, PIECES, BLOCK_K, GROUP, IS_DIRECT)
    whole = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    acc = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    token_digits = digits + column[None, :].to(tl.int64) * K_PADDED + inside[:, None]
    for block in range(first, last):
        words = load_words(weight, block, WORDS, PLANE_K)
        now_scales = scales
        now_zeros = zeros
        if IS_GROUPED:
            if ASM:
                # from memory to L2 well ahead; a block ahead, below, to registers
                far = tl.minimum(block + FAR, last - 1)
                prefetch_groups(tile_scale, far, N_PADDED, ROWS, PIECES, BLOCK_K, GROUP)
                if HAS_ZERO:
                    prefetch_groups(tile_zero, far, N_PADDED, ROWS, PIECES, BLOCK_K, GROUP)
            following = tl.minimum(block + 1, last - 1)
            scales = load_rows(row_scale, following, N_PADDED, PIECES, BLOCK_K, GROUP, IS_DIRECT)
            if HAS_ZERO:
                zeros = load_rows(row_zero, following, N_PADDED, PIECES, BLOCK_K, GROUP, IS_DIRECT)
        for piece in tl.static_range(PIECES):
            product = whole
            if IS_GROUPED:
                product = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
            for run in tl.static_range(RUN):
                k = block * BLOCK_K + (piece * RUN + run) * PLANE_K
                bytes_of_plane = tl.load(token_digits + k, mask=column[None, :] < 4 * M, other=0)
                operand = decode_bytes(words, BITS, piece * RUN + run, ASM)
                product = tl.dot(operand, bytes_of_plane, product, out_dtype=tl.int32)
            if IS_GROUPED:
                value = joined(product, ROWS, PAIRS, BLOCK_K // PIECES <= 256)
                group_scale = as_float(now_scales[piece], scale.dtype.element_ty)[:, None]
                if HAS_ZERO:
                    value = less_zeros(value, now_zeros[piece], sums, block * PIECES + piece, pair, M, ZERO, BITS)
                acc += value * group_scale
            else:
                whole = product

    if OVERLAP == LATE:
        gdc_launch_dependents()
    if not IS_GROUPED:
        acc = joined(whole, ROWS, PAIRS, False)
    # both halves of a token
    weight_of_half = tl.where(pair % 2 == 0, 1.0, 65536.0)
    y = tl.sum(tl.reshape(acc * weight_of_half[None, :], (ROWS, TOKENS, 2)), axis=2)
    is_last = True
    if IS_SPLIT:
        is_last, y = join_parts(y, partial, arrivals, tile, part, SPLIT, ROWS, TOKENS)
    if is_last:
        if not IS_GROUPED:
            if HAS_ZERO:
                # the sum of a token is that of its upper half
                y *= 1.0 / 65536.0
                y = less_zeros(y, tl.load(row_zero), sums + 1, 0, 2 * token, M, ZERO, BITS) * 65536.0
            y *= tl.load(row_scale).to(tl.float32)[:, None]
        y *= (tl.load(unit + token, mask=token < M, other=0.0) * (1.0 / (1 << (8 - BITS))))[None, :]
        if HAS_BIAS:
            y += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        store_tile(out, y, row, token, M, N)


def launch_digits(
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
    tile: DigitTile,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; arguments as for `triton_kernel.launch`.

    Where the tile overlaps kernels, no kernel still in flight may write the weight.
    """
    num_tokens = x.shape[0]
    out_features = out.shape[1]
    num_tiles = triton.cdiv(out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    fixed = constants(layout, group_size, zero_point, interpret)
    length = None
    if zero_point is not None:
        length = layout.block_k // layout.pieces(group_size) if group_size else 0
    starts = tile.overlap != "none"
    tokens = digits_of(x, packed.shape[1] * layout.block_k, length, overlap=tile.overlap)
    partial = scale
    if tile.split > 1:
        shape = (num_tiles * tile.split * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    launcher(product_kernel, (num_tiles, tile.split))(
        tokens.digits,
        tokens.unit,
        tokens.sums,
        packed,
        scale,
        scale if zero_point is None else zero_point,
        scale if bias is None else bias,
        out,
        partial,
        arrivals,
        num_tokens,
        out_features,
        tokens.digits.shape[1],
        packed.shape[0] * TILE_ROWS,
        packed.shape[1],
        tile.split,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        HAS_BIAS=bias is not None,
        IS_SPLIT=tile.split > 1,
        OVERLAP=OVERLAPS[tile.overlap],
        BEFORE=tile.before,
        IS_DIRECT=tile.is_direct and not interpret,
        **fixed,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=starts,
    )
