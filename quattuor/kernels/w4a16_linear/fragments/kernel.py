# SPDX-License-Identifier: Apache-2.0
"""The Gluon kernel for few tokens: the packed weight goes from memory to the registers of the tensor cores.

Every tensor has one element per thread of a program, so that a tensor is a register, and inline assembly holds
what the lanes of a warp do together. No weight passes shared memory and no warp waits for another within a tile.

Lane 4 g + t of a warp holds rows 2 R g ... 2 R g + 2 R - 1 of a tile of 16 R rows, and of each run of 32 words
the words 8 t ... 8 t + 7, which two products of 16 along K take; the activations follow the same order. Zero
points are subtracted from the sum over a group, times the sum of its activations, which products with ones give.

Only a measured tile chooses this kernel.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quattuor.kernels.launch import launcher
from quattuor.kernels.w4a16_linear.decode_kernel import constants
from quattuor.kernels.w4a16_linear.fragments.block import MIDDLE, OFFSET, add_block, zeros_of
from quattuor.kernels.w4a16_linear.fragments.finish import finish
from quattuor.kernels.w4a16_linear.fragments.loads import hold_loads, load_block, load_values
from quattuor.kernels.w4a16_linear.fragments.text import BFLOAT, EXACT, RAW
from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, FewTile, Layout

__all__ = ["fragments_kernel", "launch_fragments"]


@gluon.jit
def fetch(
    at,
    packed_address,
    scale,
    zero_point,
    warp,
    lane_row,
    N_PADDED,
    NUM_BLOCKS,
    NUM_STEPS,
    R: gl.constexpr,
    W: gl.constexpr,
    WORDS: gl.constexpr,
    PLANE_K: gl.constexpr,
    PIECES: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    ZERO: gl.constexpr,
    SCALE_BYTES: gl.constexpr,
    ZERO_BYTES: gl.constexpr,
):
    """The words, scales and zero points of each thread for a step; a warp past the last block reads that again."""
    GROUP: gl.constexpr = GROUP_SIZE if GROUP_SIZE > 0 else 1 << 30
    first_row = at // NUM_STEPS * (16 * R)
    block = gl.minimum(at % NUM_STEPS * W + warp, NUM_BLOCKS - 1)
    corner = (first_row // 128).to(gl.int64) * NUM_BLOCKS
    address = packed_address + (corner + block) * (WORDS * 128 * PLANE_K * 2) + first_row % 128 * (PLANE_K * 2)
    row = first_row + lane_row
    words = load_block(address, WORDS, PLANE_K, R)
    scales = ()
    zeros = ()
    if GROUP_SIZE > 0:
        scales = load_values(scale.to(gl.int64), row, block, N_PADDED, SCALE_BYTES, R, PIECES, BLOCK_K, GROUP)
    if ZERO != MIDDLE:
        zeros = load_values(zero_point.to(gl.int64), row, block, N_PADDED, ZERO_BYTES, R, PIECES, BLOCK_K, GROUP)
    return words, scales, zeros


@gluon.jit(do_not_specialize=["M", "NUM_BLOCKS", "NUM_STEPS"])
def fragments_kernel(
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
    NUM_STEPS,
    R: gl.constexpr,
    T: gl.constexpr,
    W: gl.constexpr,
    BITS: gl.constexpr,
    PLANES: gl.constexpr,
    WORDS: gl.constexpr,
    PLANE_K: gl.constexpr,
    PIECES: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    ZERO: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    EVEN_K: gl.constexpr,
    AHEAD: gl.constexpr,
    KIND: gl.constexpr,
):
    """An equal share of the steps of all tiles of 16 R rows: in a step each of W warps takes a block of K.

    A tile that several programs share is summed by the last to arrive, in the order of the programs.
    """
    SIZE: gl.constexpr = 32 * W
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    SCALE_BYTES: gl.constexpr = scale.dtype.element_ty.primitive_bitwidth // 8
    ZERO_BYTES: gl.constexpr = 4 if ZERO == OFFSET else 1
    IS_GROUPED: gl.constexpr = GROUP_SIZE > 0
    BLOCK_K: gl.constexpr = PLANES * PLANE_K
    thread = gl.arange(0, SIZE, layout)
    warp = thread // 32
    lane_row = thread % 32 // 4 * (2 * R)
    lane_k = thread % 4 * 8
    token = thread % 32 // 4
    program = gl.program_id(0).to(gl.int64)
    total_steps = gl.cdiv(N, 16 * R) * NUM_STEPS
    begin = (program * total_steps // gl.num_programs(0)).to(gl.int32)
    end = ((program + 1) * total_steps // gl.num_programs(0)).to(gl.int32)
    packed_address = packed.to(gl.int64) + (lane_row * PLANE_K + lane_k).to(gl.int64) * 2
    x_address = x.to(gl.int64) + (token.to(gl.int64) * stride_xm + lane_k) * 2
    total = zeros_of(4 * R * T, layout, SIZE)
    nothing = total
    words = ()
    scales = ()
    zeros = ()
    if AHEAD:
        words, scales, zeros = fetch(
            begin,
            packed_address,
            scale,
            zero_point,
            warp,
            lane_row,
            N_PADDED,
            NUM_BLOCKS,
            NUM_STEPS,
            R,
            W,
            WORDS,
            PLANE_K,
            PIECES,
            BLOCK_K,
            GROUP_SIZE,
            ZERO,
            SCALE_BYTES,
            ZERO_BYTES,
        )
    for now in range(begin, end):
        following, following_scales, following_zeros = fetch(
            gl.minimum(now + 1, end - 1) if AHEAD else now,
            packed_address,
            scale,
            zero_point,
            warp,
            lane_row,
            N_PADDED,
            NUM_BLOCKS,
            NUM_STEPS,
            R,
            W,
            WORDS,
            PLANE_K,
            PIECES,
            BLOCK_K,
            GROUP_SIZE,
            ZERO,
            SCALE_BYTES,
            ZERO_BYTES,
        )
        if AHEAD:
            hold_loads(thread)
        block = now % NUM_STEPS * W + warp
        k = block * BLOCK_K
        total = add_block(
            total,
            words if AHEAD else following,
            scales if AHEAD else following_scales,
            zeros if AHEAD else following_zeros,
            x_address + k.to(gl.int64) * 2,
            k + lane_k,
            K,
            # a warp past the last block has no activations
            gl.where(block < NUM_BLOCKS, token, M),
            M,
            stride_xm,
            BITS,
            PLANES,
            PLANE_K,
            PIECES,
            ZERO,
            IS_GROUPED,
            SCALE_BYTES,
            ZERO_BYTES,
            R,
            T,
            EVEN_K,
            KIND,
            SIZE,
            layout,
        )
        if AHEAD:
            words = following
            scales = following_scales
            zeros = following_zeros
        if (now % NUM_STEPS == NUM_STEPS - 1) or (now == end - 1):
            finish(
                total,
                now // NUM_STEPS,
                total_steps,
                scale,
                bias,
                out,
                partial,
                arrivals,
                M,
                N,
                NUM_STEPS,
                R,
                T,
                W,
                HAS_BIAS,
                IS_SPLIT,
                IS_GROUPED,
                KIND,
            )
            total = nothing


def launch_fragments(
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
    tile: FewTile,
) -> None:
    """Fill `out` [M, N]; arguments as for `triton_kernel.launch`, of which `tile.refuses` is None.

    Outputs of 16 bits hide what raw operands lose; others are made of exact ones.
    """
    num_tokens, in_features = x.shape
    num_blocks = packed.shape[1]
    num_steps = triton.cdiv(num_blocks, tile.num_warps)
    num_tiles = triton.cdiv(out.shape[1], 16 * tile.fragments)
    programs = min(tile.programs, num_tiles * num_steps)
    is_split = num_tiles % programs != 0
    spans = triton.cdiv(num_tokens, 8)
    partial = scale
    if is_split:
        shape = (programs * 2 * 32 * 4 * tile.fragments * spans,)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    fields = constants(layout, group_size, zero_point, False)
    del fields["ASM"]
    launcher(fragments_kernel, (programs,))(
        x,
        packed,
        scale,
        scale if zero_point is None else zero_point,
        scale if bias is None else bias,
        out,
        partial,
        arrivals,
        num_tokens,
        out.shape[1],
        in_features,
        x.stride(0),
        packed.shape[0] * TILE_ROWS,
        num_blocks,
        num_steps,
        R=tile.fragments,
        T=spans,
        W=tile.num_warps,
        HAS_BIAS=bias is not None,
        IS_SPLIT=is_split,
        EVEN_K=in_features % layout.block_k == 0,
        AHEAD=tile.ahead,
        KIND=BFLOAT if x.dtype == torch.bfloat16 else EXACT if out.dtype == torch.float32 else RAW,
        **fields,
        num_warps=tile.num_warps,
        **({} if tile.max_registers is None else {"maxnreg": tile.max_registers}),
    )
