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

from quattuor.kernels.w4a8_linear.planes import Tile
from quattuor.kernels.w4a8_linear.unpacking import (
    HIGH_CHANNEL,
    HIGH_HALF,
    HIGH_INTEGER,
    LOW_CHANNEL,
    LOW_HALF,
    LOW_INTEGER,
)

__all__ = ["MODES", "OVERLAPS", "launch", "w4a8_kernel"]

# How the kernel turns stored bytes into int8 operands.
CHANNEL = tl.constexpr(0)  # nibbles; operand = 16 * code, and the channel scale is divided by 16
INTEGER = tl.constexpr(1)  # nibbles; operand = code * r, r an integer in -15 .. 16
HALF = tl.constexpr(2)  # nibbles; operand = clamp(rne(code * float16 group scale))
BYTE = tl.constexpr(3)  # int8 operands as stored

MODES = {"channel": CHANNEL, "integer": INTEGER, "half": HALF, "byte": BYTE}

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
    if MODE == CHANNEL:
        if ASM:
            operand = tl.inline_asm_elementwise(
                HIGH_CHANNEL if HIGH else LOW_CHANNEL, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            operand = nibble(packed, HIGH) * 16
    elif MODE == INTEGER:
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
def prefetch(pointer):
    """Bring the cache line at each address to L2."""
    address = pointer.to(tl.int64)
    tl.inline_asm_elementwise(
        "{ .reg .b64 a; cvta.to.global.u64 a, $1; prefetch.global.L2 [a]; mov.b32 $0, 0; }",
        "=r,l",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_tokens(x, token, k, M, K, stride_xm, EVEN_K: tl.constexpr):
    """Activation codes [k, tokens], zero outside the matrix."""
    mask = token[None, :] < M
    if not EVEN_K:
        mask = mask & (k[:, None] < K)
    return tl.load(x + token[None, :].to(tl.int64) * stride_xm + k[:, None], mask=mask, other=0)


# a kernel serves every batch and every cut of K: these sizes decide nothing that is compiled
@triton.jit(do_not_specialize=["M", "NUM_BLOCKS", "SPLIT"])
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
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    MODE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of ROWS outputs by TOKENS tokens over 1 / SPLIT of the K blocks.

    When the tile is split every program stores its int32 sums; the last to arrive at a tile adds them in order,
    which integer addition makes independent of who is last, and resets the arrival counter for the next launch.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    num_row_tiles = tl.cdiv(N, ROWS)
    row = (tile % num_row_tiles) * ROWS + tl.arange(0, ROWS)
    token = (tile // num_row_tiles) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, 128)
    chunks = NUM_BLOCKS * (2 if MODE == BYTE else 1)
    row_start = packed + (row // 128).to(tl.int64) * chunks * 16384 + row % 128 * 128
    weight = row_start[:, None] + column[None, :]
    first = part * NUM_BLOCKS // SPLIT
    last = (part + 1) * NUM_BLOCKS // SPLIT

    if ASM:
        # what the epilogue reads first after the loop, and would wait for
        prefetch(scale + row)
        if IS_SPLIT:
            prefetch(arrivals + tile + tl.arange(0, 1))
    if OVERLAP != NONE:
        # the weight does not depend on the kernel before this one: bring its first blocks to L2 while that drains
        if OVERLAP == EARLY:
            gdc_launch_dependents()
        for ahead in tl.static_range(4):
            block = tl.minimum(first + ahead, last - 1)
            prefetch(row_start + block * (32768 if MODE == BYTE else 16384))
        gdc_wait()

    acc = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
    for block in range(first, last):
        k = block * 256 + column
        x_low = load_tokens(x, token, k, M, K, stride_xm, EVEN_K)
        x_high = load_tokens(x, token, k + 128, M, K, stride_xm, EVEN_K)
        if MODE == BYTE:
            acc = tl.dot(tl.load(weight + block * 32768), x_low, acc, out_dtype=tl.int32)
            acc = tl.dot(tl.load(weight + block * 32768 + 16384), x_high, acc, out_dtype=tl.int32)
        else:
            codes = tl.load(weight + block * 16384)
            low_scale, high_scale = 0, 0
            if MODE != CHANNEL:
                low_scale = load_group_scale(group_scale, block * 256, row, column, N_PADDED, GROUP_SIZE, MODE)
                high_scale = load_group_scale(
                    group_scale, block * 256 + 128, row, column, N_PADDED, GROUP_SIZE, MODE
                )
            acc = tl.dot(unpack(codes, low_scale, False, MODE, ASM), x_low, acc, out_dtype=tl.int32)
            acc = tl.dot(unpack(codes, high_scale, True, MODE, ASM), x_high, acc, out_dtype=tl.int32)

    if OVERLAP == LATE:
        gdc_launch_dependents()
    offset = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    is_last = True
    if IS_SPLIT:
        slabs = partial + tile.to(tl.int64) * (SPLIT * ROWS * TOKENS)
        tl.store(slabs + part * (ROWS * TOKENS) + offset, acc)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1
        if is_last:
            acc = tl.zeros((ROWS, TOKENS), dtype=tl.int32)
            for other in range(SPLIT):
                acc += tl.load(slabs + other * (ROWS * TOKENS) + offset, cache_modifier=".cg")
            tl.store(arrivals + tile, 0)
    if is_last:
        row_scale = tl.load(scale + row)
        token_scale = tl.load(x_scale + token, mask=token < M, other=0.0)
        if HAS_ZERO_POINT:
            zero = tl.load(x_zero_point + token, mask=token < M, other=0).to(tl.int32)
            acc -= tl.load(weight_sum + row)[:, None] * zero[None, :]
        result = acc.to(tl.float32) * row_scale[:, None] * token_scale[None, :]
        if HAS_BIAS:
            result = result + tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = out + token[None, :].to(tl.int64) * N + row[:, None]
        mask = (token[None, :] < M) & (row[:, None] < N)
        tl.store(where, result.to(out.dtype.element_ty), mask=mask)


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
    x_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; `packed`, `scale` and `group_scale` are padded as `planes` describes.

    `arrivals` is an int32 counter per tile, zero before and after. Where the tile overlaps kernels, no kernel
    still in flight may write the weight. `x_zero_point` comes with `weight_sum`. `interpret` replaces the inline
    assembly by arithmetic that Triton's interpreter knows.
    """
    num_tokens, in_features = x_codes.shape
    out_features = out.shape[1]
    num_blocks = packed.shape[1] // (2 if mode == "byte" else 1)
    num_tiles = triton.cdiv(out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    partial = out
    if tile.split > 1:
        shape = (num_tiles * tile.split * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.int32, device=out.device)
    w4a8_kernel[(num_tiles, tile.split)](
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
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        MODE=MODES[mode],
        GROUP_SIZE=group_size or 128,
        IS_SPLIT=tile.split > 1,
        EVEN_K=in_features % 256 == 0,
        HAS_BIAS=bias is not None,
        HAS_ZERO_POINT=x_zero_point is not None,
        ASM=not interpret,
        OVERLAP=OVERLAPS[tile.overlap],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=tile.overlap != "none",
        # the float32 steps of the epilogue must round one by one, as in the reference
        enable_fp_fusion=False,
    )
