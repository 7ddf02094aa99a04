# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation, for compute capability 8.0 and later, and its launch.

As in w4a8_linear the operands are swapped and the codes unpacked in registers. The tensor cores multiply plain
codes; the scale of a group is applied to the float32 sum over the group, and its zero point to the sum of the
activations over the group, so that neither is ever rounded to 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quattuor.kernels.w4a8_linear.planes import Tile

__all__ = ["launch", "w4a16_kernel"]

# With u = code + 8: 0x64uu is the float16 1024 + u and 0x43uu the bfloat16 128 + u; one multiply-add subtracts
# the rest exactly. $0 and $1 receive the codes of bytes 0, 1 and 2, 3.
UNPACK = """{{
    .reg .b32 t, high, one, rest;
    {shift}
    lop3.b32 t, t, 0x0F0F0F0F, 0x08080808, 0x6A;
    mov.b32 high, {high};
    prmt.b32 $0, t, high, 0x4140;
    prmt.b32 $1, t, high, 0x4342;
    mov.b32 one, {one};
    mov.b32 rest, {rest};
    fma.rn.{type} $0, $0, one, rest;
    fma.rn.{type} $1, $1, one, rest;
}}"""
SHIFTS = {"LOW": "mov.b32 t, $2;", "HIGH": "shr.u32 t, $2, 4;"}
HALF = {"high": "0x64646464", "one": "0x3C003C00", "rest": "0xE408E408", "type": "f16x2"}  # 1, -1032
BFLOAT = {"high": "0x43434343", "one": "0x3F803F80", "rest": "0xC308C308", "type": "bf16x2"}  # 1, -136
LOW_HALF = tl.constexpr(UNPACK.format(shift=SHIFTS["LOW"], **HALF))
HIGH_HALF = tl.constexpr(UNPACK.format(shift=SHIFTS["HIGH"], **HALF))
LOW_BFLOAT = tl.constexpr(UNPACK.format(shift=SHIFTS["LOW"], **BFLOAT))
HIGH_BFLOAT = tl.constexpr(UNPACK.format(shift=SHIFTS["HIGH"], **BFLOAT))


@triton.jit
def decode(codes, dtype: tl.constexpr, HIGH: tl.constexpr, NIBBLES: tl.constexpr, ASM: tl.constexpr):
    """The codes of one plane as floating-point numbers; exact in every dtype."""
    if NIBBLES and ASM and dtype == tl.float16:
        value = tl.inline_asm_elementwise(
            HIGH_HALF if HIGH else LOW_HALF, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    elif NIBBLES and ASM and dtype == tl.bfloat16:
        value = tl.inline_asm_elementwise(
            HIGH_BFLOAT if HIGH else LOW_BFLOAT, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    elif NIBBLES:
        shifted = codes if HIGH else codes << 4
        value = (shifted >> 4).to(dtype)
    else:
        value = codes.to(dtype)
    return value


@triton.jit
def add_group(
    acc,
    codes,
    x,
    zero_point,
    scale,
    first_k,
    row,
    token,
    column,
    M,
    K,
    stride_xm,
    N_PADDED,
    GROUP_SIZE: tl.constexpr,
    HIGH: tl.constexpr,
    NIBBLES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add the product over one piece of a group: scale * (codes @ x - zero_point * sum of x)."""
    k = first_k + column
    mask = (token[None, :] < M) & (k[:, None] < K)
    tokens = tl.load(x + token[None, :].to(tl.int64) * stride_xm + k[:, None], mask=mask, other=0.0)
    weight = decode(codes, x.dtype.element_ty, HIGH, NIBBLES, ASM)
    product = tl.dot(weight, tokens, input_precision="ieee", out_dtype=tl.float32)
    group = first_k // GROUP_SIZE * N_PADDED
    if HAS_ZERO:
        offset = tl.load(zero_point + group + row)
        product -= offset[:, None] * tl.sum(tokens.to(tl.float32), axis=0)[None, :]
    return acc + product * tl.load(scale + group + row)[:, None]


@triton.jit
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
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NIBBLES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of ROWS outputs by TOKENS tokens over 1 / SPLIT of the K blocks, in pieces of one group.

    With SPLIT > 1 every program stores its float32 sums; the last to arrive at a tile adds them in the order of
    the parts, whoever is last, and resets the arrival counter for the next launch.
    """
    tile = tl.program_id(0)
    part = tl.program_id(1)
    num_row_tiles = tl.cdiv(N, ROWS)
    row = (tile % num_row_tiles) * ROWS + tl.arange(0, ROWS)
    token = (tile // num_row_tiles) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, PIECE)
    chunks = NUM_BLOCKS * (1 if NIBBLES else 2)
    row_start = packed + (row // 128).to(tl.int64) * chunks * 16384 + row % 128 * 128
    weight = row_start[:, None] + column[None, :]
    pieces: tl.constexpr = 128 // PIECE
    first = part * NUM_BLOCKS // SPLIT * pieces
    last = (part + 1) * NUM_BLOCKS // SPLIT * pieces

    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for piece in range(first, last):
        block = piece // pieces
        inside = piece % pieces * PIECE
        k = block * 256 + inside
        if NIBBLES:
            low = tl.load(weight + block * 16384 + inside)
            high = low
        else:
            low = tl.load(weight + block * 32768 + inside)
            high = tl.load(weight + block * 32768 + 16384 + inside)
        acc = add_group(
            acc,
            low,
            x,
            zero_point,
            scale,
            k,
            row,
            token,
            column,
            M,
            K,
            stride_xm,
            N_PADDED,
            GROUP_SIZE,
            False,
            NIBBLES,
            HAS_ZERO,
            ASM,
        )
        acc = add_group(
            acc,
            high,
            x,
            zero_point,
            scale,
            k + 128,
            row,
            token,
            column,
            M,
            K,
            stride_xm,
            N_PADDED,
            GROUP_SIZE,
            True,
            NIBBLES,
            HAS_ZERO,
            ASM,
        )

    is_last = True
    if SPLIT > 1:
        offset = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        slabs = partial + tile.to(tl.int64) * (SPLIT * ROWS * TOKENS)
        tl.store(slabs + part * (ROWS * TOKENS) + offset, acc)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1
        if is_last:
            acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for other in range(SPLIT):
                acc += tl.load(slabs + other * (ROWS * TOKENS) + offset, cache_modifier=".cg")
            tl.store(arrivals + tile, 0)
    if is_last:
        if HAS_BIAS:
            acc = acc + tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = out + token[None, :].to(tl.int64) * N + row[:, None]
        mask = (token[None, :] < M) & (row[:, None] < N)
        tl.store(where, acc.to(out.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    arrivals: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    nibbles: bool,
    group_size: int,
    piece: int,
    tile: Tile,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; the weight tensors are padded as `w4a16_linear.triton` prepares them.

    `piece` is the part of K, at most 128, that lies in one group. `arrivals` is an int32 counter per tile, zero
    before and after. `interpret` replaces the inline assembly by arithmetic that Triton's interpreter knows.
    """
    num_tokens, in_features = x.shape
    out_features = out.shape[1]
    num_tiles = triton.cdiv(out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    partial = scale
    if tile.split > 1:
        shape = (num_tiles * tile.split * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    w4a16_kernel[(num_tiles, tile.split)](
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
        packed.shape[0] * 128,
        packed.shape[1] // (1 if nibbles else 2),
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        PIECE=piece,
        GROUP_SIZE=group_size,
        NIBBLES=nibbles,
        HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None,
        SPLIT=tile.split,
        ASM=not interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
