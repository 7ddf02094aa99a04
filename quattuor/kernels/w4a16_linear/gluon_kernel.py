# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of the operation in Gluon, for many tokens, and its launch. README.md explains the design.

One program per multiprocessor, as in w4a8_linear. A producer warp fills two rings in shared memory with the bulk
copy engine: blocks of packed words with the scales of their groups, and planes of tokens. Two consumer warpgroups
take words into registers, make operands of 16 bits of them, and multiply these, as the register operand of the
warpgroup instruction, with tokens in shared memory. A work item is a range of steps along K of one output tile.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.w4a8_linear.gluon_schedule import num_items, place, share
from quattuor.kernels.w4a8_linear.hopper import Schedule
from quattuor.kernels.w4a16_linear.gluon_consumer import CARRIED, CHANNEL, SUMMED, consume
from quattuor.kernels.w4a16_linear.hopper import HopperTile
from quattuor.kernels.w4a16_linear.planes import TILE_ROWS, Layout

__all__ = ["CONSUMERS", "launch_hopper", "mode_of", "w4a16_hopper_kernel"]

#: Token tiles that share one pass over the weight: 1024 tokens of 8192 features are 16 MB of activations.
BAND_TOKENS = 1024
CONSUMERS = 2

#: Modes by the `scaling` of a tile.
MODES = {"sums": SUMMED, "carried": CARRIED}


@gluon.jit
def copy_words(
    w_desc,
    scale_desc,
    zero_desc,
    w_smem,
    scale_smem,
    zero_smem,
    ready,
    stage,
    row_tile,
    block,
    num_blocks,
    pred,
    ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    PIECES: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    HAS_SCALE: gl.constexpr,
):
    """Bring the words of one block, and the scales and zero points of its pieces."""
    CHUNKS: gl.constexpr = ROWS // 128
    for chunk in gl.static_range(CHUNKS):
        row = ((row_tile * CHUNKS + chunk) * num_blocks + block) * 128
        tma.async_copy_global_to_shared(w_desc, [row, 0], ready, w_smem.index(stage * CHUNKS + chunk), pred=pred)
    for piece in gl.static_range(PIECES):
        group = 0
        if GROUP_SIZE > 0:
            group = (block * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP_SIZE
        place_of = stage * PIECES + piece
        where = [group, row_tile * ROWS]
        if HAS_SCALE:
            tma.async_copy_global_to_shared(scale_desc, where, ready, scale_smem.index(place_of), pred=pred)
        if HAS_ZERO:
            tma.async_copy_global_to_shared(zero_desc, where, ready, zero_smem.index(place_of), pred=pred)


@gluon.jit
def produce(
    x_desc,
    w_desc,
    scale_desc,
    zero_desc,
    x_smem,
    w_smem,
    scale_smem,
    zero_smem,
    barriers,
    num_tokens,
    num_rows,
    num_blocks,
    whole,
    sharers,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    PLANES: gl.constexpr,
    PIECES: gl.constexpr,
    TOGETHER: gl.constexpr,
    UNROLL: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    MODE: gl.constexpr,
    BAND: gl.constexpr,
    W_STAGES: gl.constexpr,
    X_STAGES: gl.constexpr,
    IS_CUT: gl.constexpr,
    PDL: gl.constexpr,
):
    """Copy words with what belongs to their groups, and the tokens of their planes, into the two rings.

    The weight does not depend on the kernel before this one, so the first stages receive it before `gdc_wait`.
    """
    PLANE_K: gl.constexpr = w_smem.shape[2]
    BLOCK_K: gl.constexpr = PLANES * PLANE_K
    HAS_SCALE: gl.constexpr = MODE != CHANNEL
    num_row_tiles = gl.cdiv(num_rows, ROWS)
    num_token_tiles = gl.cdiv(num_tokens, TOKENS)
    num_tiles = num_row_tiles * num_token_tiles
    num_steps = gl.cdiv(num_blocks, UNROLL)
    scale_bytes: gl.constexpr = PIECES * ROWS * (scale_desc.dtype.primitive_bitwidth // 8) if HAS_SCALE else 0
    w_bytes: gl.constexpr = ROWS * 2 * PLANE_K + scale_bytes + (PIECES * ROWS if HAS_ZERO else 0)
    x_bytes: gl.constexpr = TOGETHER * TOKENS * 2 * PLANE_K
    items = num_items(num_tiles, num_steps, whole, sharers, IS_CUT)
    early = 0
    if PDL:
        tile, first, last = share(0, num_tiles, num_steps, whole, sharers, IS_CUT)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        early = gl.where(items > 0, gl.minimum(W_STAGES, (last - first) * UNROLL), 0)
        for stage in range(early):
            ready = barriers.index(stage)
            mbarrier.expect(ready, w_bytes)
            copy_words(
                w_desc,
                scale_desc,
                zero_desc,
                w_smem,
                scale_smem,
                zero_smem,
                ready,
                stage,
                row_tile,
                first * UNROLL + stage,
                num_blocks,
                True,
                ROWS,
                BLOCK_K,
                PIECES,
                GROUP_SIZE,
                HAS_ZERO,
                HAS_SCALE,
            )
        gdc_wait()
    step = 0
    for item in range(items):
        tile, first, last = share(item, num_tiles, num_steps, whole, sharers, IS_CUT)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        for block in range(first * UNROLL, last * UNROLL):
            stage = step % W_STAGES
            ready = barriers.index(stage)
            is_late = step >= early
            mbarrier.wait(barriers.index(W_STAGES + stage), (step // W_STAGES & 1) ^ 1, pred=is_late)
            mbarrier.expect(ready, w_bytes, pred=is_late)
            copy_words(
                w_desc,
                scale_desc,
                zero_desc,
                w_smem,
                scale_smem,
                zero_smem,
                ready,
                stage,
                row_tile,
                block,
                num_blocks,
                is_late,
                ROWS,
                BLOCK_K,
                PIECES,
                GROUP_SIZE,
                HAS_ZERO,
                HAS_SCALE,
            )
            for turn in gl.static_range(PLANES // TOGETHER):
                x_step = step * (PLANES // TOGETHER) + turn
                x_stage = x_step % X_STAGES
                x_ready = barriers.index(2 * W_STAGES + x_stage)
                mbarrier.wait(barriers.index(2 * W_STAGES + X_STAGES + x_stage), (x_step // X_STAGES & 1) ^ 1)
                mbarrier.expect(x_ready, x_bytes)
                for plane in gl.static_range(TOGETHER):
                    where = [token_tile * TOKENS, block * BLOCK_K + (turn * TOGETHER + plane) * PLANE_K]
                    buffer = x_smem.index(x_stage * TOGETHER + plane)
                    tma.async_copy_global_to_shared(x_desc, where, x_ready, buffer)
            step += 1


# a kernel serves every batch and every length of K: these sizes decide nothing that is compiled
@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "whole", "sharers"])
def w4a16_hopper_kernel(
    x_desc,
    w_desc,
    scale_desc,
    zero_desc,
    out_desc,
    out,
    scale,
    bias,
    partial,
    arrivals,
    num_tokens,
    num_rows,
    num_blocks,
    whole,
    sharers,
    CONSUMERS: gl.constexpr,
    BLOCKS: gl.constexpr,
    TOKENS: gl.constexpr,
    BITS: gl.constexpr,
    PLANES: gl.constexpr,
    PIECES: gl.constexpr,
    TOGETHER: gl.constexpr,
    UNROLL: gl.constexpr,
    LAGS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    MODE: gl.constexpr,
    BAND: gl.constexpr,
    W_STAGES: gl.constexpr,
    X_STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BULK_STORE: gl.constexpr,
    IS_CUT: gl.constexpr,
    PDL: gl.constexpr,
):
    """All tiles of one layer: CONSUMERS warpgroups of BLOCKS * 64 rows, TOKENS tokens."""
    ROWS: gl.constexpr = CONSUMERS * BLOCKS * 64
    PLANE_K: gl.constexpr = w_desc.block_type.shape[1]
    if PDL:
        gdc_launch_dependents()
    w_smem = gl.allocate_shared_memory(gl.int16, [W_STAGES * ROWS // 128, 128, PLANE_K], w_desc.layout)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES * TOGETHER, TOKENS, PLANE_K], x_desc.layout)
    scale_smem = w_smem
    if MODE != CHANNEL:
        scale_smem = gl.allocate_shared_memory(scale_desc.dtype, [W_STAGES * PIECES, 1, ROWS], scale_desc.layout)
    zero_smem = w_smem
    if HAS_ZERO:
        zero_smem = gl.allocate_shared_memory(zero_desc.dtype, [W_STAGES * PIECES, 1, ROWS], zero_desc.layout)
    out_smem = w_smem
    if BULK_STORE:
        out_smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, TOKENS, 64], out_desc.layout)
    # a stage is full when its copies have arrived, and empty when every consumer is done with it
    barriers = gl.allocate_shared_memory(gl.int64, [2 * W_STAGES + 2 * X_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(W_STAGES):
        mbarrier.init(barriers.index(stage), count=1)
        mbarrier.init(barriers.index(W_STAGES + stage), count=CONSUMERS)
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(barriers.index(2 * W_STAGES + stage), count=1)
        mbarrier.init(barriers.index(2 * W_STAGES + X_STAGES + stage), count=CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_desc,
                    out,
                    x_smem,
                    w_smem,
                    scale_smem,
                    zero_smem,
                    out_smem,
                    barriers,
                    scale,
                    bias,
                    partial,
                    arrivals,
                    num_tokens,
                    num_rows,
                    num_blocks,
                    whole,
                    sharers,
                    0,
                    CONSUMERS,
                    BLOCKS,
                    TOKENS,
                    BITS,
                    PLANES,
                    PIECES,
                    TOGETHER,
                    UNROLL,
                    LAGS,
                    HAS_ZERO,
                    MODE,
                    BAND,
                    W_STAGES,
                    X_STAGES,
                    HAS_BIAS,
                    BULK_STORE,
                    IS_CUT,
                    PDL,
                ),
            ),
            (
                consume,
                (
                    out_desc,
                    out,
                    x_smem,
                    w_smem,
                    scale_smem,
                    zero_smem,
                    out_smem,
                    barriers,
                    scale,
                    bias,
                    partial,
                    arrivals,
                    num_tokens,
                    num_rows,
                    num_blocks,
                    whole,
                    sharers,
                    1,
                    CONSUMERS,
                    BLOCKS,
                    TOKENS,
                    BITS,
                    PLANES,
                    PIECES,
                    TOGETHER,
                    UNROLL,
                    LAGS,
                    HAS_ZERO,
                    MODE,
                    BAND,
                    W_STAGES,
                    X_STAGES,
                    HAS_BIAS,
                    BULK_STORE,
                    IS_CUT,
                    PDL,
                ),
            ),
            (
                produce,
                (
                    x_desc,
                    w_desc,
                    scale_desc,
                    zero_desc,
                    x_smem,
                    w_smem,
                    scale_smem,
                    zero_smem,
                    barriers,
                    num_tokens,
                    num_rows,
                    num_blocks,
                    whole,
                    sharers,
                    ROWS,
                    TOKENS,
                    PLANES,
                    PIECES,
                    TOGETHER,
                    UNROLL,
                    GROUP_SIZE,
                    HAS_ZERO,
                    MODE,
                    BAND,
                    W_STAGES,
                    X_STAGES,
                    IS_CUT,
                    PDL,
                ),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[232, 40],
    )


def mode_of(tile: HopperTile, group_size: int | None) -> gl.constexpr:
    """Return where the kernel applies scales."""
    return CHANNEL if group_size is None else MODES[tile.scaling]


def row_descriptor(values: Tensor, rows: int) -> TensorDescriptor:
    """Describe copies of what belongs to one group of so many rows, of a [G', N'] tensor."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * values.element_size(), rank=2)
    # a tensor of one row may have any stride between rows
    return TensorDescriptor(values, list(values.shape), [values.shape[1], 1], [1, rows], layout)


def launch_hopper(
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
    tile: HopperTile,
    schedule: Schedule,
    overlap: bool = True,
) -> None:
    """Fill `out` [M, N] with a program on each multiprocessor; the weight tensors are those of `planes`.

    `x` is float16 or bfloat16 with rows aligned to 16 bytes, `zero_point` uint8 or None. `arrivals` holds a flag
    for each consumer of each program, zero before and after. `schedule` is of the steps of the tile. `overlap`
    starts the program while the kernel before it drains; the weight must not be written by a kernel in flight.
    """
    num_tokens, in_features = x.shape
    out_features = out.shape[1]
    num_tiles = triton.cdiv(out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    partial = scale
    if schedule.whole < num_tiles:
        shape = (schedule.programs * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    plane_k = layout.plane_k
    planes = gl.NVMMASharedLayout(swizzle_byte_width=2 * plane_k, element_bitwidth=16, rank=2)
    x_desc = TensorDescriptor(x, [num_tokens, in_features], [x.stride(0), 1], [tile.tokens, plane_k], planes)
    w_desc = TensorDescriptor(
        packed, [packed.numel() // plane_k, plane_k], [plane_k, 1], [TILE_ROWS, plane_k], planes
    )
    scale_desc = w_desc if group_size is None else row_descriptor(scale, tile.rows)
    # bulk stores write 16-bit elements in rows aligned to 16 bytes; other outputs are stored directly
    bulk_store = out.element_size() == 2 and out_features % 8 == 0
    out_desc = w_desc
    if bulk_store:
        out_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        box = [tile.tokens, 64]
        out_desc = TensorDescriptor(out, [num_tokens, out_features], [out_features, 1], box, out_layout)
    launcher(w4a16_hopper_kernel, (schedule.programs,))(
        x_desc,
        w_desc,
        scale_desc,
        w_desc if zero_point is None else row_descriptor(zero_point, tile.rows),
        out_desc,
        out,
        scale,
        scale if bias is None else bias,
        partial,
        arrivals,
        num_tokens,
        out_features,
        packed.shape[1],
        schedule.whole,
        schedule.sharers,
        CONSUMERS=CONSUMERS,
        BLOCKS=tile.blocks,
        TOKENS=tile.tokens,
        BITS=layout.bits,
        PLANES=layout.planes,
        PIECES=layout.pieces(group_size),
        TOGETHER=tile.together,
        UNROLL=tile.unroll,
        LAGS=tile.lags,
        GROUP_SIZE=group_size or 0,
        HAS_ZERO=zero_point is not None,
        MODE=mode_of(tile, group_size),
        BAND=BAND_TOKENS // tile.tokens,
        W_STAGES=tile.w_stages,
        X_STAGES=tile.x_stages,
        HAS_BIAS=bias is not None,
        BULK_STORE=bulk_store,
        IS_CUT=tile.cut != "none",
        PDL=overlap,
        num_warps=4,
        launch_pdl=overlap,
    )
