# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation, for compute capability 8.0 and later, and its launch.

The operands are swapped, as in w4a8_linear: a program computes y[tokens, rows] transposed. Words of the packed
weight go from shared memory to registers as the tensor cores want them; a mask and a multiply-add make a plane of
them the operand. The tensor cores multiply codes less integer zero points, which are exact; the scale of a group
meets the float32 sum over the group, and so does a zero point that is no integer.

For few tokens unpacking is what takes time, and the tensor cores have it to spare: a raw tile leaves out the
multiply-add and has them sum the activations too, times which the zero point is subtracted from the sum over the
group; and it fetches scales and zero points farther ahead. No rule chooses such a tile before one was measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.w4a16_linear.decode_kernel import (
    INTEGER,
    MIDDLE,
    OFFSET,
    as_float,
    constants,
    decode,
    decode_raw,
    load_groups,
    load_words,
)
from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, Layout, Tile
from quattuor.kernels.w4a16_linear.unpacking import position

__all__ = ["launch", "w4a16_kernel"]

# When the next kernel may start its programs.
NONE = tl.constexpr(0)
EARLY = tl.constexpr(1)
LATE = tl.constexpr(2)
OVERLAPS = {"none": NONE, "early": EARLY, "late": LATE}


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
        scales = load_groups(row_scale, first, N_PADDED, PIECES, BLOCK_K, GROUP, RAW)
    if RAW and HAS_ZERO:
        zeros = load_groups(row_zero, first, N_PADDED, PIECES, BLOCK_K, GROUP, RAW)
    for block in range(first, last):
        words = load_words(weight, block, WORDS, PLANE_K)
        if RAW and ASM and IS_GROUPED:
            # from memory to L2 well ahead; a block ahead, below, to registers
            for piece in tl.static_range(PIECES):
                far = (tl.minimum(block + 4, last - 1) * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP
                prefetch(row_scale + far * N_PADDED)
                if HAS_ZERO:
                    prefetch(row_zero + far * N_PADDED)
        following = tl.minimum(block + 1, last - 1)
        now_scales = scales
        now_zeros = zeros
        if RAW and HAS_ZERO:
            zeros = load_groups(row_zero, following, N_PADDED, PIECES, BLOCK_K, GROUP, RAW)
        elif HAS_ZERO:
            now_zeros = load_groups(row_zero, block, N_PADDED, PIECES, BLOCK_K, GROUP, RAW)
        if CARRIES and IS_GROUPED:
            scales = load_groups(row_scale, following, N_PADDED, PIECES, BLOCK_K, GROUP, RAW)
        elif IS_GROUPED:
            now_scales = load_groups(row_scale, block, N_PADDED, PIECES, BLOCK_K, GROUP, RAW)
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
        OVERLAP=OVERLAPS[tile.overlap],
        RAW=is_raw,
        **constants(layout, group_size, zero_point, interpret),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=tile.overlap != "none",
        **({} if tile.max_registers is None else {"maxnreg": tile.max_registers}),
    )
