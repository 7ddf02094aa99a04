# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation, for compute capability 8.0 and later, and its launch.

The operands are swapped: a program computes y[tokens, rows] transposed, with the weight as the first operand of
the tensor-core instruction, so that a small batch wastes little of it. Codes are unpacked in registers between
shared memory and the tensor cores; on Hopper the compiler then feeds them to the warpgroup instruction from
registers. Unpacking is inline assembly on four codes at a time, because byte arithmetic on int8 tensors
compiles to one extraction and one insertion per byte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.tiles import join_parts, store_tile
from quattuor.kernels.w4a8_linear.narrow import BLOCKS
from quattuor.kernels.w4a8_linear.planes import Tile
from quattuor.kernels.w4a8_linear.unpacking import (
    HIGH_HALF,
    HIGH_INTEGER,
    LOW_HALF,
    LOW_INTEGER,
    PREFETCH_LINE,
    bulk_prefetch_assembly,
    joined_assembly,
    plane_assembly,
)

__all__ = ["MAX_SUM_TOKENS", "MODES", "OVERLAPS", "launch", "w4a8_kernel"]

# How the kernel turns stored bytes into int8 operands.
CHANNEL = tl.constexpr(0)  # b bits; operand = 2^(8-b) * code, by which the channel scale is divided
INTEGER = tl.constexpr(1)  # nibbles; operand = code * r, r an integer in -15 .. 16
HALF = tl.constexpr(2)  # nibbles; operand = clamp(rne(code * float16 group scale))
BYTE = tl.constexpr(3)  # int8 operands as stored
SUMS = tl.constexpr(4)  # b bits; operand as in CHANNEL, and the sum over a plane is scaled by r, after 2^(b-8)

MODES = {"channel": CHANNEL, "integer": INTEGER, "half": HALF, "byte": BYTE, "sums": SUMS}

#: Blocks of the weight that each program fetches to L2 while the kernel before this one drains.
BLOCKS_AHEAD = tl.constexpr(4)

#: Tokens of a tile up to which scaling sums is faster than scaling nibbles, whose scales are not copied ahead.
MAX_SUM_TOKENS = 64

# When the next kernel may start its programs.
NONE = tl.constexpr(0)
EARLY = tl.constexpr(1)
LATE = tl.constexpr(2)

OVERLAPS = {"none": NONE, "early": EARLY, "late": LATE}


@triton.jit
def nibble(packed, HIGH: tl.constexpr):
    """Signed code of the low or high nibble of int8 bytes: the interpreter's path."""
    shifted = packed if HIGH else packed << 4
    return shifted >> 4


@triton.jit
def unpack(packed, group_scale, HIGH: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr):
    """int8 operand of one plane. `group_scale` is int32: r, or two equal float16 in its halves."""
    if MODE == INTEGER:
        if ASM:
            # 0x80808080 - r * 0x08080808, in wrapping 32-bit arithmetic
            addend = group_scale * -0x08080808 - 0x7F7F7F80
            operand = tl.inline_asm_elementwise(
                HIGH_INTEGER if HIGH else LOW_INTEGER,
                "=r,r,r,r,r,r,r,r,r,r",
                [packed, group_scale, addend],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            operand = (nibble(packed, HIGH) * group_scale).to(tl.int8)
    else:
        if ASM:
            operand = tl.inline_asm_elementwise(
                HIGH_HALF if HIGH else LOW_HALF,
                "=r,r,r,r,r,r",
                [packed, group_scale],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            half = (group_scale & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
            product = nibble(packed, HIGH).to(tl.float32) * half.to(tl.float32)
            # adding and subtracting 1.5 * 2^23 rounds a small float32 to the nearest even integer
            rounded = (tl.minimum(tl.maximum(product, -256.0), 256.0) + 12582912.0) - 12582912.0
            operand = tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int8)
    return operand


@triton.jit
def unpack_top(first, middle, last, PLANE: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """int8 operand of one plane, 2^(8 - WIDTH) * code, from the chunks of a block."""
    if WIDTH == 3 and PLANE >= 6:
        upper = first if PLANE == 6 else last
        SHIFT: tl.constexpr = 4 if PLANE == 6 else 5
        if ASM:
            operand = tl.inline_asm_elementwise(
                joined_assembly(SHIFT), "=r,r,r", [upper, middle], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            operand = ((upper << 6) & -64) | ((middle << SHIFT) & 32)
    else:
        if WIDTH == 3:
            chunk = first if PLANE < 2 else (middle if PLANE < 4 else last)
            LEFT: tl.constexpr = 3 * (PLANE % 2)
        else:
            chunk = first
            LEFT: tl.constexpr = 8 - WIDTH * (PLANE + 1)
        if ASM:
            operand = tl.inline_asm_elementwise(
                plane_assembly(WIDTH, LEFT), "=r,r", [chunk], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            operand = (chunk << LEFT) & -(2 ** (8 - WIDTH))
    return operand


@triton.jit
def load_words(words, block, row, N_PADDED, PLANES: tl.constexpr, MODE: tl.constexpr):
    """Group scales [rows] of a block, four planes to an int32; nothing where sums are not scaled."""
    loaded = ()
    if MODE == SUMS:
        for word in tl.static_range((PLANES + 3) // 4):
            loaded += (tl.load(words + (block * ((PLANES + 3) // 4) + word) * N_PADDED + row),)
    return loaded


@triton.jit
def load_group_scale(group_scale, first_k, row, column, N_PADDED, GROUP_SIZE: tl.constexpr, MODE: tl.constexpr):
    """int32 group scales of one plane from `first_k` on: [rows, 1] when it is one group, else per element."""
    if GROUP_SIZE % 128 == 0:
        value = tl.load(group_scale + (first_k // GROUP_SIZE) * N_PADDED + row[:, None])
    else:
        group = (first_k + column) // GROUP_SIZE
        value = tl.load(group_scale + group[None, :] * N_PADDED + row[:, None])
    if MODE == HALF:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        value = bits | (bits << 16)
    else:
        value = value.to(tl.int32)
    return value


@triton.jit
def prefetch_line(pointer):
    """Bring the cache line of an address to L2; one thread asks, since each that does takes a turn."""
    tl.inline_asm_elementwise(PREFETCH_LINE, "=r,l", [pointer.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_bytes(pointer, NUM_BYTES: tl.constexpr):
    """Bring consecutive bytes to L2, by one instruction of one thread; needs compute capability 9.0."""
    tl.inline_asm_elementwise(
        bulk_prefetch_assembly(NUM_BYTES), "=r,l", [pointer.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_block(rows_start, block, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Bring the rows of a tile to L2, one block of them; `rows_start` is where those of block 0 begin."""
    for chunk in tl.static_range(CHUNKS):
        prefetch_bytes(rows_start + (block * CHUNKS + chunk).to(tl.int64) * 16384, ROWS * 128)


@triton.jit
def load_tokens(x, token, k, M, K, stride_xm, EVEN_K: tl.constexpr):
    """Activation codes [k, tokens], zero outside the matrix."""
    mask = token[None, :] < M
    if not EVEN_K:
        mask = mask & (k[:, None] < K)
    return tl.load(x + token[None, :].to(tl.int64) * stride_xm + k[:, None], mask=mask, other=0)


# a kernel serves every batch and every cut of K: these sizes decide nothing that is compiled
@triton.jit(do_not_specialize=["M", "NUM_BLOCKS", "SPLIT", "PART_BLOCKS", "LONGER_PARTS"])
def w4a8_kernel(
    x,
    x_scale,
    x_zero_point,
    packed,
    scale,
    group_scale,
    weight_sum,
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
    PART_BLOCKS,
    LONGER_PARTS,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    MODE: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of ROWS outputs by TOKENS tokens over 1 / SPLIT of the K blocks.

    Each part has PART_BLOCKS blocks, the first LONGER_PARTS of them one more: no division delays the first load.

    When the tile is split every program stores its int32 sums; the last to arrive at a tile adds them in order,
    which integer addition makes independent of who is last, and resets the arrival counter for the next launch.
    """
    part = tl.program_id(2)
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    PARTS: tl.constexpr = 128 // COLUMNS
    column = tl.arange(0, COLUMNS)
    row_start = packed + (row // 128).to(tl.int64) * NUM_BLOCKS * (CHUNKS * 16384) + row % 128 * 128
    weight = row_start[:, None] + column[None, :]
    first = 0
    last = NUM_BLOCKS
    if IS_SPLIT:
        first = part * PART_BLOCKS + tl.minimum(part, LONGER_PARTS)
        last = first + PART_BLOCKS + (part < LONGER_PARTS).to(tl.int32)

    rows_start = packed + tl.program_id(0).to(tl.int64) * ROWS // 128 * NUM_BLOCKS * (CHUNKS * 16384)
    rows_start += tl.program_id(0) * ROWS % 128 * 128

    if ASM and IS_SPLIT:
        prefetch_line(arrivals + tile)
    if OVERLAP == EARLY:
        gdc_launch_dependents()
    # the weight does not depend on the kernel before this one: bring its first blocks to L2 while that drains
    if OVERLAP != NONE:
        for ahead in tl.static_range(BLOCKS_AHEAD):
            prefetch_block(rows_start, tl.minimum(first + ahead, last - 1), CHUNKS, ROWS)
        gdc_wait()
    # loaded before the sums are ready, so that the program does not end with waiting for them
    row_scale = tl.load(scale + row)
    token_scale = tl.load(x_scale + token, mask=token < M, other=0.0)

    acc = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
    for step in tl.range(first * PARTS, last * PARTS, num_stages=STAGES):
        block = step // PARTS
        k = block * (128 * PLANES) + step % PARTS * COLUMNS + column
        chunk = weight + (block * (CHUNKS * 16384) + step % PARTS * COLUMNS)
        bytes_0 = tl.load(chunk)
        bytes_1, bytes_2 = bytes_0, bytes_0
        if CHUNKS > 1:
            bytes_1 = tl.load(chunk + 16384)
        if CHUNKS > 2:
            bytes_2 = tl.load(chunk + 32768)
        words = load_words(group_scale, block, row, N_PADDED, PLANES, MODE)
        for plane in tl.static_range(PLANES):
            x_plane = load_tokens(x, token, k + 128 * plane, M, K, stride_xm, EVEN_K)
            if MODE == BYTE:
                operand = bytes_0 if plane == 0 else bytes_1
                acc = tl.dot(operand, x_plane, acc, out_dtype=tl.int32)
            elif MODE == CHANNEL:
                operand = unpack_top(bytes_0, bytes_1, bytes_2, plane, WIDTH, ASM)
                acc = tl.dot(operand, x_plane, acc, out_dtype=tl.int32)
            elif MODE == SUMS:
                operand = unpack_top(bytes_0, bytes_1, bytes_2, plane, WIDTH, ASM)
                plane_sum = tl.dot(operand, x_plane, out_dtype=tl.int32) >> (8 - WIDTH)
                plane_scale = (words[plane // 4] << (24 - plane % 4 * 8)) >> 24
                acc += plane_sum * plane_scale[:, None]
            else:
                first_k = block * 256 + 128 * plane + step % PARTS * COLUMNS
                value = load_group_scale(group_scale, first_k, row, column, N_PADDED, GROUP_SIZE, MODE)
                acc = tl.dot(unpack(bytes_0, value, plane == 1, MODE, ASM), x_plane, acc, out_dtype=tl.int32)

    if OVERLAP == LATE:
        gdc_launch_dependents()
    is_last = True
    if IS_SPLIT:
        is_last, acc = join_parts(acc, partial, arrivals, tile, part, SPLIT, ROWS, TOKENS)
    if is_last:
        if HAS_ZERO_POINT:
            zero = tl.load(x_zero_point + token, mask=token < M, other=0).to(tl.int32)
            acc -= tl.load(weight_sum + row)[:, None] * zero[None, :]
        result = acc.to(tl.float32) * row_scale[:, None] * token_scale[None, :]
        if HAS_BIAS:
            result = result + tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        store_tile(out, result, row, token, M, N)


def launch(
    x_codes: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    arrivals: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    mode: str,
    group_size: int | None,
    tile: Tile,
    width: int = 4,
    group_words: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; `packed`, `scale`, `group_scale` and `group_words` are padded as `planes` describes.

    `width` is that of the stored codes: 8 in byte mode. `arrivals` is an int32 counter per tile, zero before and
    after. Where the tile overlaps kernels, no kernel
    still in flight may write the weight. `x_zero_point` comes with `weight_sum`. `interpret` replaces the inline
    assembly by arithmetic that Triton's interpreter knows.
    """
    num_tokens, in_features = x_codes.shape
    out_features = out.shape[1]
    if group_words is not None and (width < 4 or tile.tokens <= MAX_SUM_TOKENS):
        mode, group_scale = "sums", group_words
    stored = BLOCKS[width]
    num_blocks = packed.shape[1] // stored.chunks
    row_tiles, token_tiles = triton.cdiv(out_features, tile.rows), triton.cdiv(num_tokens, tile.tokens)
    partial = out
    if tile.split > 1:
        shape = (row_tiles * token_tiles * tile.split * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.int32, device=out.device)
    launcher(w4a8_kernel, (row_tiles, token_tiles, tile.split))(
        x_codes,
        x_scale,
        x_scale if x_zero_point is None else x_zero_point,
        packed,
        scale,
        scale if group_scale is None else group_scale,
        scale if weight_sum is None else weight_sum,
        scale if bias is None else bias,
        out,
        partial,
        arrivals,
        num_tokens,
        out_features,
        in_features,
        x_codes.stride(0),
        packed.shape[0] * 128,
        num_blocks,
        tile.split,
        *divmod(num_blocks, tile.split),
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        MODE=MODES[mode],
        WIDTH=width,
        PLANES=stored.planes,
        CHUNKS=stored.chunks,
        GROUP_SIZE=group_size or 128,
        IS_SPLIT=tile.split > 1,
        EVEN_K=in_features % stored.elements == 0,
        HAS_BIAS=bias is not None,
        HAS_ZERO_POINT=x_zero_point is not None,
        ASM=not interpret,
        OVERLAP=OVERLAPS[tile.overlap],
        COLUMNS=tile.columns,
        # pipelines words too, which feed no product
        STAGES=tile.num_stages if mode == "sums" else None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=tile.overlap != "none",
        # the float32 steps of the epilogue must round one by one, as in the reference
        enable_fp_fusion=False,
    )
