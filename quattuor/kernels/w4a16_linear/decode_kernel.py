# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels do with packed words, and the kernel that writes the weight out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quattuor.kernels.launch import launcher
from quattuor.kernels.w4a8_linear.triton_kernel import prefetch_line
from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, Layout
from quattuor.kernels.w4a16_linear.unpacking import (
    arity,
    assembly,
    constraints,
    position,
    word_of,
)

__all__ = [
    "FAR",
    "INTEGER",
    "MIDDLE",
    "OFFSET",
    "as_float",
    "constants",
    "decode",
    "decode_kernel",
    "launch_decode",
    "load_groups",
    "load_words",
    "prefetch_groups",
]

# What is subtracted from a code.
MIDDLE = tl.constexpr(0)  # the middle of the range: signed codes
INTEGER = tl.constexpr(1)  # the integer zero point of its group, in a byte
OFFSET = tl.constexpr(2)  # the middle; the float32 rest of the zero point is applied to the sum over the group

#: Blocks ahead of which scales and zero points are brought to the cache.
FAR = tl.constexpr(4)


@triton.jit
def addend(zero, dtype: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr):
    """The number that `assembly` adds, twice in an int32: -(1024 * 2^-p + zero), -(128 + zero) or -zero."""
    if dtype == tl.float16:
        low: tl.constexpr = position(BITS, PLANE, True)
        value = zero * (0x00010001 << low) + ((0xE400 - (low << 10)) * 0x00010001 - 0x100000000)
    elif BITS < 8:
        value = zero * 0x00010001 + (0xC300C300 - 0x100000000)
    else:
        bits = (-zero.to(tl.float32)).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        value = bits | (bits << 16)
    return value


@triton.jit
def field(word, other, third, BITS: tl.constexpr, PLANE: tl.constexpr):
    """The codes of one plane as int32, for dtypes and interpreters without assembly."""
    if BITS == 3 and PLANE == 15:
        first = (word.to(tl.int32) >> 15) & 1
        second = (other.to(tl.int32) >> 15) & 1
        code = first | (second << 1) | (((third.to(tl.int32) >> 15) & 1) << 2)
    else:
        place: tl.constexpr = (PLANE % 5 if BITS == 3 else PLANE) * BITS
        code = (word.to(tl.int32) >> place) & ((1 << BITS) - 1)
    return code


@triton.jit
def decode(
    words,
    zero,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    ZERO: tl.constexpr,
    ASM: tl.constexpr,
):
    """The codes of one plane less `zero` [rows] or the middle of the range; exact in every dtype."""
    index: tl.constexpr = word_of(BITS, PLANE)
    word = words[index % 3 if BITS == 3 else 0]
    if ASM and dtype != tl.float32:
        is_half: tl.constexpr = dtype == tl.float16
        text: tl.constexpr = assembly(BITS, PLANE, is_half, ZERO == INTEGER)
        registers: tl.constexpr = constraints(BITS, PLANE, ZERO == INTEGER)
        if ZERO == INTEGER:
            rest = addend(zero.to(tl.int32), dtype, BITS, PLANE)[:, None]
            operands = [words[0], words[1], words[2], rest] if arity(BITS, PLANE) == 3 else [word, rest]
        elif arity(BITS, PLANE) == 3:
            operands = [words[0], words[1], words[2]]
        else:
            operands = [word]
        if is_half:
            value = tl.inline_asm_elementwise(text, registers, operands, dtype=tl.float16, is_pure=True, pack=2)
        else:
            value = tl.inline_asm_elementwise(text, registers, operands, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        code = field(word, words[1], words[2], BITS, PLANE)
        if ZERO == INTEGER:
            value = (code - zero.to(tl.int32)[:, None]).to(dtype)
        else:
            value = (code - (1 << (BITS - 1))).to(dtype)
    return value


@triton.jit
def load_words(weight, block, WORDS: tl.constexpr, PLANE_K: tl.constexpr):
    """The one or three words of each element of a block's planes, as a tuple of three."""
    size: tl.constexpr = 128 * PLANE_K
    first = tl.load(weight + block * (WORDS * size))
    second = first
    third = first
    if WORDS == 3:
        second = tl.load(weight + block * (WORDS * size) + size)
        third = tl.load(weight + block * (WORDS * size) + 2 * size)
    return first, second, third


@triton.jit
def load_groups(
    values,
    block,
    N_PADDED,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """The value of each row for each piece of a block, in an int32 where it is shorter and WIDENS.

    Short values that a loop carries would be put together in pairs, and waited for, at once.
    """
    found = ()
    for piece in tl.static_range(PIECES):
        group = (block * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP_SIZE
        value = tl.load(values + group * N_PADDED)
        if WIDENS and value.dtype == tl.float16:
            value = value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        elif WIDENS and value.dtype == tl.uint8:
            value = value.to(tl.int32)
        found = found + (value,)  # noqa: RUF005 (Triton knows no unpacking)
    return found


@triton.jit
def prefetch_groups(
    values,
    block,
    N_PADDED,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Bring the values of ROWS rows for each piece of a block to L2; `values` is where the rows begin."""
    BYTES: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 8
    for piece in tl.static_range(PIECES):
        group = (block * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP_SIZE
        for line in tl.static_range((ROWS * BYTES + 127) // 128):
            prefetch_line(values + group * N_PADDED + line * (128 // BYTES))


@triton.jit
def as_float(value, dtype: tl.constexpr):
    """The float32 of what `load_groups` found in memory of this dtype."""
    if dtype == tl.float16 and value.dtype == tl.int32:
        value = value.to(tl.int16).to(tl.float16, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def decode_kernel(
    packed,
    scale,
    zero_point,
    out,
    N,
    K,
    N_PADDED,
    NUM_BLOCKS,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    WORDS: tl.constexpr,
    PLANE_K: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO: tl.constexpr,
    ASM: tl.constexpr,
):
    """Write ROWS rows of one block of the weight, in float32 and rounded once to the dtype of `out`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    column = tl.arange(0, PLANE_K)
    BLOCK_K: tl.constexpr = PLANES * PLANE_K
    GROUP: tl.constexpr = GROUP_SIZE if GROUP_SIZE > 0 else 1 << 30
    RUN: tl.constexpr = PLANES // PIECES
    row_start = packed + (row // 128).to(tl.int64) * NUM_BLOCKS * (WORDS * 128 * PLANE_K) + row % 128 * PLANE_K
    words = load_words(row_start[:, None] + column[None, :], block, WORDS, PLANE_K)
    scales = load_groups(scale + row, block, N_PADDED, PIECES, BLOCK_K, GROUP, False)
    zeros = scales
    if ZERO != MIDDLE:
        zeros = load_groups(zero_point + row, block, N_PADDED, PIECES, BLOCK_K, GROUP, False)
    for piece in tl.static_range(PIECES):
        for run in tl.static_range(RUN):
            k = block * BLOCK_K + (piece * RUN + run) * PLANE_K + column
            code = decode(words, zeros[piece], out.dtype.element_ty, BITS, piece * RUN + run, ZERO, ASM)
            value = code.to(tl.float32)
            if ZERO == OFFSET:
                value -= zeros[piece][:, None]
            value *= as_float(scales[piece], scale.dtype.element_ty)[:, None]
            where = out + row[:, None].to(tl.int64) * K + k[None, :]
            mask = (row[:, None] < N) & (k[None, :] < K)
            tl.store(where, value.to(out.dtype.element_ty), mask=mask)


def constants(
    layout: Layout, group_size: int | None, zero_point: Tensor | None, interpret: bool
) -> dict[str, object]:
    """Return what both kernels are compiled for."""
    zero = MIDDLE
    if zero_point is not None:
        zero = INTEGER if zero_point.dtype == torch.uint8 else OFFSET
    return {
        "BITS": layout.bits,
        "PLANES": layout.planes,
        "WORDS": layout.words,
        "PLANE_K": layout.plane_k,
        "PIECES": layout.pieces(group_size),
        "GROUP_SIZE": group_size or 0,
        "ZERO": zero,
        "ASM": not interpret,
    }


def launch_decode(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    out: Tensor,
    *,
    layout: Layout,
    group_size: int | None,
    interpret: bool = False,
) -> None:
    """Fill `out` [N, K] with the weight; arguments as for `launch`."""
    out_features, in_features = out.shape
    rows = 64
    launcher(decode_kernel, (triton.cdiv(out_features, rows), packed.shape[1]))(
        packed,
        scale,
        scale if zero_point is None else zero_point,
        out,
        out_features,
        in_features,
        packed.shape[0] * TILE_ROWS,
        packed.shape[1],
        ROWS=rows,
        **constants(layout, group_size, zero_point, interpret),
        num_warps=4,
    )
