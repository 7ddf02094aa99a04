# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the operation, for compute capability 8.0 and later, and their launches.

The operands are swapped, as in w4a8_linear: a program computes y[tokens, rows] transposed. Words of the packed
weight go from shared memory to registers as the tensor cores want them; a mask and a multiply-add make a plane of
them the operand. The tensor cores multiply codes less integer zero points, which are exact; the scale of a group
meets the float32 sum over the group, and so does a zero point that is no integer.

For few tokens unpacking is what takes time, and the tensor cores have it to spare: RAW leaves out the multiply-add
and has them sum the activations too, times which the zero point is subtracted from the sum over the group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, Layout, Tile
from quattuor.kernels.w4a16_linear.unpacking import (
    arity,
    assembly,
    constraints,
    position,
    raw_assembly,
    word_of,
)

__all__ = ["decode_kernel", "launch", "launch_decode", "w4a16_kernel"]

# What is subtracted from a code.
MIDDLE = tl.constexpr(0)  # the middle of the range: signed codes
INTEGER = tl.constexpr(1)  # the integer zero point of its group, in a byte
OFFSET = tl.constexpr(2)  # the middle; the float32 rest of the zero point is applied to the sum over the group

# When the next kernel may start its programs.
NONE = tl.constexpr(0)
EARLY = tl.constexpr(1)
LATE = tl.constexpr(2)
OVERLAPS = {"none": NONE, "early": EARLY, "late": LATE}


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
def decode_raw(words, dtype: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr, ASM: tl.constexpr):
    """The codes of one plane times 2^(position - 24) in float16, and plus 128 in bfloat16."""
    is_half: tl.constexpr = dtype == tl.float16
    if ASM:
        index: tl.constexpr = word_of(BITS, PLANE)
        text: tl.constexpr = raw_assembly(BITS, PLANE, is_half)
        registers: tl.constexpr = constraints(BITS, PLANE, False)
        if arity(BITS, PLANE) == 3:
            operands = [words[0], words[1], words[2]]
        else:
            operands = [words[index % 3 if BITS == 3 else 0]]
        if is_half:
            value = tl.inline_asm_elementwise(text, registers, operands, dtype=tl.float16, is_pure=True, pack=2)
        else:
            value = tl.inline_asm_elementwise(text, registers, operands, dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        place: tl.constexpr = word_of(BITS, PLANE) % 3 if BITS == 3 else 0
        code = field(words[place], words[1], words[2], BITS, PLANE)
        if is_half:
            value = (code << position(BITS, PLANE, True)).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            value = (code + 128).to(tl.bfloat16)
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
def load_groups(values, block, N_PADDED, PIECES: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """The value of each row for each piece of a block, as int32 where it is shorter.

    Short values that a loop carries would be put together in pairs, and waited for, at once.
    """
    found = ()
    for piece in tl.static_range(PIECES):
        group = (block * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP_SIZE
        value = tl.load(values + group * N_PADDED)
        if value.dtype == tl.float16:
            value = value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        elif value.dtype == tl.uint8:
            value = value.to(tl.int32)
        found = found + (value,)  # noqa: RUF005 (Triton knows no unpacking)
    return found


@triton.jit
def as_float(value, dtype: tl.constexpr):
    """The float32 of what `load_groups` found in memory of this dtype."""
    if dtype == tl.float16:
        value = value.to(tl.int16).to(tl.float16, bitcast=True)
    return value.to(tl.float32)


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
    OVERLAP: tl.constexpr,
    RAW: tl.constexpr,
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
    CARRIES: tl.constexpr = RAW or ZERO != INTEGER
    HAS_ZERO: tl.constexpr = ZERO != MIDDLE
    # what raw operands hold beside the code, and the part of the zero point that is known here
    REST: tl.constexpr = (0.0 if dtype == tl.float16 else 128.0) + (
        0.0 if ZERO == INTEGER else 1.0 * 2 ** (BITS - 1)
    )
    row_start = packed + (row // 128).to(tl.int64) * NUM_BLOCKS * (WORDS * 128 * PLANE_K) + row % 128 * PLANE_K
    weight = row_start[:, None] + column[None, :]
    first = part * NUM_BLOCKS // SPLIT
    last = (part + 1) * NUM_BLOCKS // SPLIT
    row_scale = scale + row
    row_zero = zero_point + row

    if OVERLAP != NONE:
        # the weight does not depend on the kernel before this one: bring its first blocks to L2 while that drains
        if OVERLAP == EARLY:
            gdc_launch_dependents()
        for ahead in tl.static_range(4):
            prefetch(row_start + tl.minimum(first + ahead, last - 1) * (WORDS * 128 * PLANE_K))
        gdc_wait()

    acc = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    scales = ()
    zeros = ()
    if CARRIES and IS_GROUPED:
        scales = load_groups(row_scale, first, N_PADDED, PIECES, BLOCK_K, GROUP)
    if CARRIES and HAS_ZERO:
        zeros = load_groups(row_zero, first, N_PADDED, PIECES, BLOCK_K, GROUP)
    for block in range(first, last):
        words = load_words(weight, block, WORDS, PLANE_K)
        if ASM and IS_GROUPED:
            # from memory to L2 well ahead; a block ahead, below, to registers
            for piece in tl.static_range(PIECES):
                far = (tl.minimum(block + 4, last - 1) * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP
                prefetch(row_scale + far * N_PADDED)
                if HAS_ZERO:
                    prefetch(row_zero + far * N_PADDED)
        following = tl.minimum(block + 1, last - 1)
        now_scales = scales
        now_zeros = zeros
        if CARRIES and IS_GROUPED:
            scales = load_groups(row_scale, following, N_PADDED, PIECES, BLOCK_K, GROUP)
        elif IS_GROUPED:
            now_scales = load_groups(row_scale, block, N_PADDED, PIECES, BLOCK_K, GROUP)
        if CARRIES and HAS_ZERO:
            zeros = load_groups(row_zero, following, N_PADDED, PIECES, BLOCK_K, GROUP)
        elif HAS_ZERO:
            now_zeros = load_groups(row_zero, block, N_PADDED, PIECES, BLOCK_K, GROUP)
        for piece in tl.static_range(PIECES):
            # never the sum of all blocks: the compiler would wait for each of its warpgroup products
            product = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            total = tl.zeros((TOKENS,), dtype=tl.float32)
            for run in tl.static_range(RUN):
                k = block * BLOCK_K + (piece * RUN + run) * PLANE_K + column
                tokens = load_tokens(x, token, k, M, K, stride_xm, EVEN_K)
                if RAW:
                    operand = decode_raw(words, dtype, BITS, piece * RUN + run, ASM)
                    sums = tl.dot(tl.full((ROWS, PLANE_K), 1.0, dtype), tokens, sums, out_dtype=tl.float32)
                    if position(BITS, piece * RUN + run, dtype == tl.float16) == 0:
                        product = tl.dot(operand, tokens, product, out_dtype=tl.float32)
                    else:
                        plane = tl.dot(operand, tokens, out_dtype=tl.float32)
                        product += plane * (1.0 / (1 << position(BITS, piece * RUN + run, True)))
                else:
                    zero = now_zeros[piece] if ZERO == INTEGER else 0
                    operand = decode(words, zero, dtype, BITS, piece * RUN + run, ZERO, ASM)
                    product = tl.dot(operand, tokens, product, input_precision="ieee", out_dtype=tl.float32)
                    if ZERO == OFFSET:
                        total += tl.sum(tokens.to(tl.float32), axis=0)
            if RAW:
                if dtype == tl.float16:
                    product *= 16777216.0
                if HAS_ZERO:
                    product -= sums * (now_zeros[piece].to(tl.float32) + REST)[:, None]
                else:
                    product -= sums * REST
            elif ZERO == OFFSET:
                product -= now_zeros[piece][:, None] * total[None, :]
            if IS_GROUPED:
                product *= as_float(now_scales[piece], scale.dtype.element_ty)[:, None]
            acc += product

    if OVERLAP == LATE:
        gdc_launch_dependents()
    is_last = True
    if IS_SPLIT:
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
        if not IS_GROUPED:
            acc = acc * tl.load(row_scale).to(tl.float32)[:, None]
        if HAS_BIAS:
            acc = acc + tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        where = out + token[None, :].to(tl.int64) * N + row[:, None]
        mask = (token[None, :] < M) & (row[:, None] < N)
        tl.store(where, acc.to(out.dtype.element_ty), mask=mask)


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
    scales = load_groups(scale + row, block, N_PADDED, PIECES, BLOCK_K, GROUP)
    zeros = scales
    if ZERO != MIDDLE:
        zeros = load_groups(zero_point + row, block, N_PADDED, PIECES, BLOCK_K, GROUP)
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
    counter per tile, zero before and after. Where the tile overlaps kernels, no kernel still in flight may write
    the weight. `interpret` replaces the inline assembly by arithmetic that Triton's interpreter knows.
    """
    num_tokens, in_features = x.shape
    out_features = out.shape[1]
    num_tiles = triton.cdiv(out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    # the operands of 8-bit codes in bfloat16 are put together from two fields; float32 needs no assembly
    is_raw = tile.raw and (x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and layout.bits < 8))
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
        packed.shape[0] * TILE_ROWS,
        packed.shape[1],
        tile.split,
        ROWS=tile.rows,
        TOKENS=tile.tokens,
        HAS_BIAS=bias is not None,
        IS_SPLIT=tile.split > 1,
        EVEN_K=in_features % layout.block_k == 0,
        OVERLAP=OVERLAPS[tile.overlap],
        RAW=is_raw,
        **constants(layout, group_size, zero_point, interpret),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=tile.overlap != "none",
        **({} if tile.max_registers is None else {"maxnreg": tile.max_registers}),
    )


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
    decode_kernel[(triton.cdiv(out_features, rows), packed.shape[1])](
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
