# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of the operation in Gluon, and its launch. The design is explained in README.md.

One program per multiprocessor. A producer warp fills a ring of shared-memory stages with the bulk copy engine;
one or two consumer warpgroups take the packed weight from shared memory into registers, unpack it there, and
multiply it, as the register operand of the warpgroup instruction, with activations in shared memory.

A work item is a range of K blocks of one output tile (`gluon_schedule.py`). Sums of a tile that several programs
share are added in int32, exact in any order.
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
from quattuor.kernels.w4a8_linear.gluon_consumer import consume
from quattuor.kernels.w4a8_linear.gluon_modes import CHANNEL, HALF, INTEGER, UNCLAMPED
from quattuor.kernels.w4a8_linear.gluon_schedule import num_items, place, share
from quattuor.kernels.w4a8_linear.hopper import Schedule
from quattuor.kernels.w4a8_linear.planes import HopperTile

__all__ = ["MODES", "launch", "w4a8_hopper_kernel"]

MODES = {"channel": CHANNEL, "integer": INTEGER, "half": HALF, "unclamped": UNCLAMPED}

BULK_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
OUT_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
#: Token tiles that share one pass over the weight: 1024 tokens of 8192 features are 8 MB of activations.
BAND_TOKENS = 1024


@gluon.jit
def produce(
    x_desc,
    w_desc,
    group_desc,
    x_smem,
    w_smem,
    group_smem,
    barriers,
    num_tokens,
    num_rows,
    num_blocks,
    whole,
    sharers,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    MODE: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    IS_CUT: gl.constexpr,
    PDL: gl.constexpr,
):
    """Copy packed weights, the activations of both planes and their group scales into the ring of stages.

    The weight does not depend on the kernel before this one, so the first stages receive it before `gdc_wait`.
    """
    CHUNKS: gl.constexpr = ROWS // 128
    num_row_tiles = gl.cdiv(num_rows, ROWS)
    num_token_tiles = gl.cdiv(num_tokens, TOKENS)
    num_tiles = num_row_tiles * num_token_tiles
    group_bytes: gl.constexpr = 0 if MODE == CHANNEL else (2 * ROWS if MODE == INTEGER else 4 * ROWS)
    stage_bytes: gl.constexpr = ROWS * 128 + 2 * TOKENS * 128 + group_bytes
    items = num_items(num_tiles, num_blocks, whole, sharers, IS_CUT)
    early = 0
    if PDL:
        tile, first, last = share(0, num_tiles, num_blocks, whole, sharers, IS_CUT)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        early = gl.where(items > 0, gl.minimum(STAGES, last - first), 0)
        for stage in range(early):
            ready = barriers.index(stage)
            mbarrier.expect(ready, stage_bytes)
            for chunk in gl.static_range(CHUNKS):
                row = ((row_tile * CHUNKS + chunk) * num_blocks + first + stage) * 128
                tma.async_copy_global_to_shared(w_desc, [row, 0], ready, w_smem.index(stage * CHUNKS + chunk))
        gdc_wait()
    step = 0
    for item in range(items):
        tile, first, last = share(item, num_tiles, num_blocks, whole, sharers, IS_CUT)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        for block in range(first, last):
            stage = step % STAGES
            ready = barriers.index(stage)
            is_late = step >= early
            mbarrier.wait(barriers.index(STAGES + stage), (step // STAGES & 1) ^ 1, pred=is_late)
            mbarrier.expect(ready, stage_bytes, pred=is_late)
            for chunk in gl.static_range(CHUNKS):
                row = ((row_tile * CHUNKS + chunk) * num_blocks + block) * 128
                tma.async_copy_global_to_shared(
                    w_desc, [row, 0], ready, w_smem.index(stage * CHUNKS + chunk), pred=is_late
                )
            token = token_tile * TOKENS
            tma.async_copy_global_to_shared(x_desc, [token, block * 256], ready, x_smem.index(2 * stage))
            tma.async_copy_global_to_shared(x_desc, [token, block * 256 + 128], ready, x_smem.index(2 * stage + 1))
            if MODE != CHANNEL:
                for plane in gl.static_range(2):
                    group = (block * 256 + plane * 128) // GROUP_SIZE
                    tma.async_copy_global_to_shared(
                        group_desc, [group, row_tile * ROWS], ready, group_smem.index(2 * stage + plane)
                    )
            step += 1


# a kernel serves every batch and every length of K: these sizes decide nothing that is compiled
@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "whole", "sharers"])
def w4a8_hopper_kernel(
    x_desc,
    w_desc,
    group_desc,
    out_desc,
    out,
    scale,
    x_scale,
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
    SPANS: gl.constexpr,
    TOKENS: gl.constexpr,
    MODE: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BULK_STORE: gl.constexpr,
    EARLY_SCALE: gl.constexpr,
    IS_CUT: gl.constexpr,
    PDL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """All tiles of one layer: CONSUMERS warpgroups of BLOCKS * 64 rows, TOKENS tokens, STAGES K blocks deep."""
    ROWS: gl.constexpr = CONSUMERS * BLOCKS * 64
    if PDL:
        gdc_launch_dependents()
    w_smem = gl.allocate_shared_memory(gl.int8, [STAGES * ROWS // 128, 128, 128], w_desc.layout)
    x_smem = gl.allocate_shared_memory(gl.int8, [2 * STAGES, TOKENS, 128], x_desc.layout)
    if MODE == CHANNEL:
        group_smem = w_smem
    else:
        group_smem = gl.allocate_shared_memory(group_desc.dtype, [2 * STAGES, 1, ROWS], group_desc.layout)
    if BULK_STORE:
        out_smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, TOKENS // SPANS, 64], out_desc.layout)
    else:
        out_smem = w_smem
    # a stage is full when its copies have arrived, and empty when every consumer has multiplied it
    barriers = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=1)
        mbarrier.init(barriers.index(STAGES + stage), count=CONSUMERS)
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
                    group_smem,
                    out_smem,
                    barriers,
                    scale,
                    x_scale,
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
                    SPANS,
                    TOKENS,
                    MODE,
                    BAND,
                    STAGES,
                    UNROLL,
                    HAS_BIAS,
                    BULK_STORE,
                    EARLY_SCALE,
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
                    group_smem,
                    out_smem,
                    barriers,
                    scale,
                    x_scale,
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
                    SPANS,
                    TOKENS,
                    MODE,
                    BAND,
                    STAGES,
                    UNROLL,
                    HAS_BIAS,
                    BULK_STORE,
                    EARLY_SCALE,
                    IS_CUT,
                    PDL,
                ),
            ),
            (
                produce,
                (
                    x_desc,
                    w_desc,
                    group_desc,
                    x_smem,
                    w_smem,
                    group_smem,
                    barriers,
                    num_tokens,
                    num_rows,
                    num_blocks,
                    whole,
                    sharers,
                    ROWS,
                    TOKENS,
                    MODE,
                    GROUP_SIZE,
                    BAND,
                    STAGES,
                    IS_CUT,
                    PDL,
                ),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[CONSUMER_REGISTERS, 40],
    )


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
    num_blocks: int,
    tile: HopperTile,
    schedule: Schedule,
    overlap: bool = True,
) -> None:
    """Fill `out` [M, N] with a program on each multiprocessor; the weight tensors are those of `planes`.

    `x_codes` has rows aligned to 16 bytes. `arrivals` holds a flag for each consumer of each program, zero before
    and after. `overlap` starts the program while the kernel before it drains; the weight must not be written by a
    kernel still in flight.
    """
    num_tokens, in_features = x_codes.shape
    out_features = out.shape[1]
    num_tiles = triton.cdiv(out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    partial = arrivals
    if schedule.whole < num_tiles:
        shape = (schedule.programs * tile.rows * tile.tokens,)
        partial = torch.empty(shape, dtype=torch.int32, device=out.device)
    x_desc = TensorDescriptor(
        x_codes, [num_tokens, in_features], [x_codes.stride(0), 1], [tile.tokens, 128], BULK_LAYOUT
    )
    w_desc = TensorDescriptor(packed, [packed.numel() // 128, 128], [128, 1], [128, 128], BULK_LAYOUT)
    group_desc = w_desc
    if group_scale is not None:
        bits = 8 * group_scale.element_size()
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)
        shape, strides = list(group_scale.shape), list(group_scale.stride())
        group_desc = TensorDescriptor(group_scale, shape, strides, [1, tile.rows], layout)
    # bulk stores write 16-bit elements in rows aligned to 16 bytes; other outputs are stored directly
    bulk_store = out.element_size() == 2 and out_features % 8 == 0
    out_desc = w_desc
    if bulk_store:
        out_desc = TensorDescriptor(
            out, [num_tokens, out_features], [out_features, 1], [tile.tokens // tile.spans, 64], OUT_LAYOUT
        )
    launcher(w4a8_hopper_kernel, (schedule.programs,))(
        x_desc,
        w_desc,
        group_desc,
        out_desc,
        out,
        scale,
        x_scale,
        scale if bias is None else bias,
        partial,
        arrivals,
        num_tokens,
        out_features,
        num_blocks,
        schedule.whole,
        schedule.sharers,
        CONSUMERS=tile.consumers,
        BLOCKS=tile.blocks,
        SPANS=tile.spans,
        TOKENS=tile.tokens,
        MODE=MODES[mode],
        GROUP_SIZE=group_size or 128,
        BAND=BAND_TOKENS // tile.tokens,
        STAGES=tile.stages,
        UNROLL=tile.unroll,
        HAS_BIAS=bias is not None,
        BULK_STORE=bulk_store,
        EARLY_SCALE=tile.has_room_for_scales(mode),
        IS_CUT=tile.cut != "none",
        PDL=overlap,
        CONSUMER_REGISTERS=tile.registers,
        num_warps=4,
        maxnreg=tile.max_registers,
        launch_pdl=overlap,
        # the float32 steps of the epilogue must round one by one, as in the reference
        enable_fp_fusion=False,
    )
