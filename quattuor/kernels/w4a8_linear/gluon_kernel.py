# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel of the operation in Gluon, and its launch. The design is explained in README.md.

One program per multiprocessor. A producer warp fills a ring of shared-memory stages with the bulk copy engine;
one or two consumer warpgroups take the packed weight from shared memory into registers, unpack it there, and
multiply it, as the register operand of the warpgroup instruction, with activations in shared memory.

A work item is a range of K blocks of one output tile. The tiles that fill whole waves are computed whole; the
rest are cut along K into equal shares, one per program (`share`), and summed in int32, exact in any order.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.w4a8_linear.planes import HopperTile
from quattuor.kernels.w4a8_linear.unpacking import (
    HIGH_CHANNEL,
    HIGH_HALF,
    HIGH_INTEGER,
    LOW_CHANNEL,
    LOW_HALF,
    LOW_INTEGER,
)

__all__ = ["launch", "w4a8_hopper_kernel"]

CHANNEL = gl.constexpr(0)
INTEGER = gl.constexpr(1)
HALF = gl.constexpr(2)
MODES = {"channel": CHANNEL, "integer": INTEGER, "half": HALF}

BULK_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
OUT_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
#: Token tiles that share one pass over the weight: 1024 tokens of 8192 features are 8 MB of activations.
BAND_TOKENS = 1024


@gluon.jit
def unpack(packed, group_scale, HIGH: gl.constexpr, MODE: gl.constexpr):
    """int8 operand of one plane; `group_scale` is int32: r, or two equal float16 in its halves."""
    if MODE == CHANNEL:
        operand = gl.inline_asm_elementwise(
            HIGH_CHANNEL if HIGH else LOW_CHANNEL, "=r,r", [packed], dtype=gl.int8, is_pure=True, pack=4
        )
    elif MODE == INTEGER:
        addend = group_scale * -0x08080808 - 0x7F7F7F80
        operand = gl.inline_asm_elementwise(
            HIGH_INTEGER if HIGH else LOW_INTEGER,
            "=r,r,r,r,r,r,r,r,r,r",
            [packed, group_scale, addend],
            dtype=gl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        operand = gl.inline_asm_elementwise(
            HIGH_HALF if HIGH else LOW_HALF,
            "=r,r,r,r,r,r",
            [packed, group_scale],
            dtype=gl.int8,
            is_pure=True,
            pack=4,
        )
    return operand


@gluon.jit
def share(item, num_tiles, num_blocks):
    """Tile, first and last K block of a work item of this program; its share of a cut tile comes first.

    Programs are numbered from the last, so that one that waits for another waits for one launched earlier.
    """
    programs = gl.num_programs(0)
    me = programs - 1 - gl.program_id(0)
    waves = num_tiles // programs
    units = (num_tiles - waves * programs) * num_blocks
    begin = me * units // programs
    end = (me + 1) * units // programs
    head = begin // num_blocks
    num_cut = 0
    if end > begin:
        num_cut = (end - 1) // num_blocks - head + 1
    is_cut = item < num_cut
    tile = gl.where(is_cut, waves * programs + head + item, (item - num_cut) * programs + me)
    first = gl.where(is_cut & (item == 0), begin - head * num_blocks, 0)
    last = gl.where(is_cut, gl.minimum(num_blocks, end - (head + item) * num_blocks), num_blocks)
    return tile, first, last


@gluon.jit
def num_items(num_tiles, num_blocks):
    """Work items of this program: whole tiles plus the pieces of cut tiles."""
    programs = gl.num_programs(0)
    me = programs - 1 - gl.program_id(0)
    waves = num_tiles // programs
    units = (num_tiles - waves * programs) * num_blocks
    begin = me * units // programs
    end = (me + 1) * units // programs
    count = waves
    if end > begin:
        count += (end - 1) // num_blocks - begin // num_blocks + 1
    return count


@gluon.jit
def place(tile, num_row_tiles, num_token_tiles, BAND: gl.constexpr):
    """Row tile and token tile: all rows of a band of token tiles, whose activations stay in L2, then the next."""
    in_band = tile % (BAND * num_row_tiles)
    first_token_tile = tile // (BAND * num_row_tiles) * BAND
    width = gl.minimum(BAND, num_token_tiles - first_token_tile)
    return in_band // width, first_token_tile + in_band % width


@gluon.jit
def produce(
    x_desc,
    w_desc,
    group_desc,
    x_smem,
    w_smem,
    group_smem,
    full,
    empty,
    num_row_tiles,
    num_token_tiles,
    num_blocks,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    MODE: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Copy packed weights, the activations of both planes and their group scales into the ring of stages.

    The weight does not depend on the kernel before this one, so the first stages receive it before `gdc_wait`.
    """
    CHUNKS: gl.constexpr = ROWS // 128
    num_tiles = num_row_tiles * num_token_tiles
    group_bytes: gl.constexpr = 0 if MODE == CHANNEL else (2 * ROWS if MODE == INTEGER else 4 * ROWS)
    stage_bytes: gl.constexpr = ROWS * 128 + 2 * TOKENS * 128 + group_bytes
    items = num_items(num_tiles, num_blocks)
    early = 0
    if PDL:
        tile, first, last = share(0, num_tiles, num_blocks)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        early = gl.where(items > 0, gl.minimum(STAGES, last - first), 0)
        for stage in range(early):
            ready = full.index(stage)
            mbarrier.expect(ready, stage_bytes)
            for chunk in gl.static_range(CHUNKS):
                row = ((row_tile * CHUNKS + chunk) * num_blocks + first + stage) * 128
                tma.async_copy_global_to_shared(w_desc, [row, 0], ready, w_smem.index(stage * CHUNKS + chunk))
        gdc_wait()
    step = 0
    for item in range(items):
        tile, first, last = share(item, num_tiles, num_blocks)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        for block in range(first, last):
            stage = step % STAGES
            ready = full.index(stage)
            is_late = step >= early
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1, pred=is_late)
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


@gluon.jit
def load_group_scale(group_smem, first_row: gl.constexpr, layout: gl.constexpr, MODE: gl.constexpr):
    """int32 group scales [64, 1] of one plane, spread over the fragment of the packed weight."""
    ROWS: gl.constexpr = 64
    flat = group_smem.reshape((group_smem.shape[1],)).slice(first_row, ROWS)
    value = flat.load(gl.SliceLayout(1, layout))
    if MODE == HALF:
        bits = value.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
        value = bits | (bits << 16)
    else:
        value = value.to(gl.int32)
    return gl.expand_dims(value, 1)


@gluon.jit
def multiply(
    acc,
    w_smem,
    x_smem,
    group_smem,
    stage,
    first_row: gl.constexpr,
    CHUNKS: gl.constexpr,
    MODE: gl.constexpr,
    layout: gl.constexpr,
):
    """Issue the products of both planes of 64 rows; the caller waits for them."""
    packed = w_smem.index(stage * CHUNKS + first_row // 128).slice(first_row % 128, 64).load(layout)
    low_scale, high_scale = 0, 0
    if MODE != CHANNEL:
        low_scale = load_group_scale(group_smem.index(2 * stage), first_row, layout, MODE)
        high_scale = load_group_scale(group_smem.index(2 * stage + 1), first_row, layout, MODE)
    low = unpack(packed, low_scale, False, MODE)
    acc = warpgroup_mma(low, x_smem.index(2 * stage).permute((1, 0)), acc, is_async=True)
    high = unpack(packed, high_scale, True, MODE)
    return warpgroup_mma(high, x_smem.index(2 * stage + 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def finish(
    acc,
    out_desc,
    out,
    out_smem,
    scale,
    x_scale,
    bias,
    first_row,
    first_token,
    num_tokens,
    num_rows,
    TOKENS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BULK_STORE: gl.constexpr,
    mma: gl.constexpr,
):
    """Scale, add the bias, round once and store 64 rows by TOKENS, transposed to [tokens, rows]."""
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma))
    token = first_token + gl.arange(0, TOKENS, gl.SliceLayout(0, mma))
    row_scale = gl.load(scale + row)
    token_scale = gl.load(x_scale + token, mask=token < num_tokens, other=0.0)
    result = acc.to(gl.float32) * gl.expand_dims(row_scale, 1) * gl.expand_dims(token_scale, 0)
    if HAS_BIAS:
        offset = gl.load(bias + row, mask=row < num_rows, other=0.0).to(gl.float32)
        result = result + gl.expand_dims(offset, 1)
    if BULK_STORE:
        tma.store_wait(0)  # the previous tile has left the buffer
        gl.thread_barrier()
        out_smem.permute((1, 0)).store(result.to(out_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [first_token, first_row], out_smem)
    else:
        where = out + gl.expand_dims(token, 0).to(gl.int64) * num_rows + gl.expand_dims(row, 1)
        mask = (gl.expand_dims(token, 0) < num_tokens) & (gl.expand_dims(row, 1) < num_rows)
        gl.store(where, result.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def slab_pointer(partial, program, block, TOKENS: gl.constexpr, BLOCKS: gl.constexpr, mma: gl.constexpr):
    """Addresses of the int32 sums of 64 rows that a program leaves for the owner of a tile."""
    row = gl.arange(0, 64, gl.SliceLayout(1, mma))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))
    start = partial + (program * BLOCKS + block) * (64 * TOKENS)
    return start + gl.expand_dims(row, 1) * TOKENS + gl.expand_dims(token, 0)


@gluon.jit
def consume(
    out_desc,
    out,
    x_smem,
    w_smem,
    group_smem,
    out_smem,
    full,
    empty,
    scale,
    x_scale,
    bias,
    partial,
    arrivals,
    num_tokens,
    num_rows,
    num_row_tiles,
    num_token_tiles,
    num_blocks,
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCKS: gl.constexpr,
    TOKENS: gl.constexpr,
    MODE: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BULK_STORE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Multiply BLOCKS blocks of 64 rows of every work item; store the result or leave it to the tile owner."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 32]
    )
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=4)
    base: gl.constexpr = CONSUMER * BLOCKS * 64
    CHUNKS: gl.constexpr = CONSUMERS * BLOCKS // 2
    rows_per_tile: gl.constexpr = CONSUMERS * BLOCKS * 64
    programs = gl.num_programs(0)
    me = programs - 1 - gl.program_id(0)
    num_tiles = num_row_tiles * num_token_tiles
    waves = num_tiles // programs
    units = (num_tiles - waves * programs) * num_blocks
    step = 0
    if PDL:
        gdc_wait()
    for item in range(num_items(num_tiles, num_blocks)):
        tile, first, last = share(item, num_tiles, num_blocks)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        acc0 = gl.zeros((64, TOKENS), gl.int32, mma)
        acc1 = gl.zeros((64, TOKENS), gl.int32, mma)
        for _ in range(first, last):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            token0 = multiply(acc0, w_smem, x_smem, group_smem, stage, base, CHUNKS, MODE, layout)
            if BLOCKS == 2:
                token1 = multiply(acc1, w_smem, x_smem, group_smem, stage, base + 64, CHUNKS, MODE, layout)
                acc0, acc1 = warpgroup_mma_wait(0, deps=(token0, token1))
            else:
                acc0 = warpgroup_mma_wait(0, deps=(token0,))
            fence_async_shared()
            mbarrier.arrive(empty.index(stage))
            step += 1

        if first > 0:
            gl.store(slab_pointer(partial, me, CONSUMER * BLOCKS, TOKENS, CONSUMERS * BLOCKS, mma), acc0)
            if BLOCKS == 2:
                gl.store(slab_pointer(partial, me, CONSUMER * BLOCKS + 1, TOKENS, CONSUMERS * BLOCKS, mma), acc1)
            gl.thread_barrier()
            gl.atomic_xchg(arrivals + me * CONSUMERS + CONSUMER, 1, sem="release")
        else:
            if last < num_blocks:
                # the rest of this tile is with the next programs, up to the one that holds its last block
                last_unit = (tile - waves * programs + 1) * num_blocks - 1
                final = ((last_unit + 1) * programs - 1) // units
                for other in range(me + 1, final + 1):
                    flag = arrivals + other * CONSUMERS + CONSUMER
                    while gl.atomic_cas(flag, 1, 0, sem="acquire") == 0:
                        pass
                    gl.thread_barrier()
                    acc0 += gl.load(
                        slab_pointer(partial, other, CONSUMER * BLOCKS, TOKENS, CONSUMERS * BLOCKS, mma),
                        cache_modifier=".cg",
                    )
                    if BLOCKS == 2:
                        acc1 += gl.load(
                            slab_pointer(partial, other, CONSUMER * BLOCKS + 1, TOKENS, CONSUMERS * BLOCKS, mma),
                            cache_modifier=".cg",
                        )
            finish(
                acc0,
                out_desc,
                out,
                out_smem.index(CONSUMER),
                scale,
                x_scale,
                bias,
                row_tile * rows_per_tile + base,
                token_tile * TOKENS,
                num_tokens,
                num_rows,
                TOKENS,
                HAS_BIAS,
                BULK_STORE,
                mma,
            )
            if BLOCKS == 2:
                finish(
                    acc1,
                    out_desc,
                    out,
                    out_smem.index(CONSUMER),
                    scale,
                    x_scale,
                    bias,
                    row_tile * rows_per_tile + base + 64,
                    token_tile * TOKENS,
                    num_tokens,
                    num_rows,
                    TOKENS,
                    HAS_BIAS,
                    BULK_STORE,
                    mma,
                )
    if BULK_STORE:
        tma.store_wait(0)


# a kernel serves every batch and every length of K: these sizes decide nothing that is compiled
@gluon.jit(do_not_specialize=["num_tokens", "num_blocks"])
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
    CONSUMERS: gl.constexpr,
    BLOCKS: gl.constexpr,
    TOKENS: gl.constexpr,
    MODE: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BULK_STORE: gl.constexpr,
    PDL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """All tiles of one layer: CONSUMERS warpgroups of BLOCKS * 64 rows, TOKENS tokens, STAGES K blocks deep."""
    ROWS: gl.constexpr = CONSUMERS * BLOCKS * 64
    if PDL:
        gdc_launch_dependents()
    num_row_tiles = gl.cdiv(num_rows, ROWS)
    num_token_tiles = gl.cdiv(num_tokens, TOKENS)
    w_smem = gl.allocate_shared_memory(gl.int8, [STAGES * ROWS // 128, 128, 128], w_desc.layout)
    x_smem = gl.allocate_shared_memory(gl.int8, [2 * STAGES, TOKENS, 128], x_desc.layout)
    if MODE == CHANNEL:
        group_smem = w_smem
    else:
        group_smem = gl.allocate_shared_memory(group_desc.dtype, [2 * STAGES, 1, ROWS], group_desc.layout)
    if BULK_STORE:
        out_smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, TOKENS, 64], out_desc.layout)
    else:
        out_smem = w_smem
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
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
                    full,
                    empty,
                    scale,
                    x_scale,
                    bias,
                    partial,
                    arrivals,
                    num_tokens,
                    num_rows,
                    num_row_tiles,
                    num_token_tiles,
                    num_blocks,
                    0,
                    CONSUMERS,
                    BLOCKS,
                    TOKENS,
                    MODE,
                    BAND,
                    STAGES,
                    HAS_BIAS,
                    BULK_STORE,
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
                    full,
                    empty,
                    scale,
                    x_scale,
                    bias,
                    partial,
                    arrivals,
                    num_tokens,
                    num_rows,
                    num_row_tiles,
                    num_token_tiles,
                    num_blocks,
                    1,
                    CONSUMERS,
                    BLOCKS,
                    TOKENS,
                    MODE,
                    BAND,
                    STAGES,
                    HAS_BIAS,
                    BULK_STORE,
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
                    full,
                    empty,
                    num_row_tiles,
                    num_token_tiles,
                    num_blocks,
                    ROWS,
                    TOKENS,
                    MODE,
                    GROUP_SIZE,
                    BAND,
                    STAGES,
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
    programs: int,
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
    if num_tiles % programs:
        shape = (programs * tile.rows * tile.tokens,)
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
            out, [num_tokens, out_features], [out_features, 1], [tile.tokens, 64], OUT_LAYOUT
        )
    w4a8_hopper_kernel[(programs,)](
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
        CONSUMERS=tile.consumers,
        BLOCKS=tile.blocks,
        TOKENS=tile.tokens,
        MODE=MODES[mode],
        GROUP_SIZE=group_size or 128,
        BAND=BAND_TOKENS // tile.tokens,
        STAGES=tile.stages,
        HAS_BIAS=bias is not None,
        BULK_STORE=bulk_store,
        PDL=overlap,
        CONSUMER_REGISTERS=tile.registers,
        num_warps=4,
        maxnreg=tile.max_registers,
        launch_pdl=overlap,
        # the float32 steps of the epilogue must round one by one, as in the reference
        enable_fp_fusion=False,
    )
