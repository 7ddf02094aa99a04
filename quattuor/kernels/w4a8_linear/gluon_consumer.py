# SPDX-License-Identifier: Apache-2.0
"""The consumers of the Hopper kernel: unpack the weight, multiply, and store the tile or leave its sums.

A consumer holds two accumulators at most: BLOCKS blocks of 64 rows by SPANS spans of tokens, whose operand is
unpacked once for all spans.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from quattuor.kernels.w4a8_linear.gluon_modes import CHANNEL, INTEGER, UNCLAMPED, load_group_scale
from quattuor.kernels.w4a8_linear.gluon_schedule import num_items, place, share
from quattuor.kernels.w4a8_linear.unpacking import (
    HIGH_CHANNEL,
    HIGH_HALF,
    HIGH_INTEGER,
    HIGH_UNCLAMPED,
    LOW_CHANNEL,
    LOW_HALF,
    LOW_INTEGER,
    LOW_UNCLAMPED,
)

__all__ = ["consume"]


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
    elif MODE == UNCLAMPED:
        operand = gl.inline_asm_elementwise(
            HIGH_UNCLAMPED if HIGH else LOW_UNCLAMPED,
            "=r,r,r,r,r,r",
            [packed, group_scale],
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
def multiply(
    acc0,
    acc1,
    w_smem,
    x_smem,
    group_smem,
    stage,
    first_row: gl.constexpr,
    CHUNKS: gl.constexpr,
    SPANS: gl.constexpr,
    MODE: gl.constexpr,
    layout: gl.constexpr,
):
    """Issue the products of both planes of 64 rows with every span of tokens; the caller waits for them."""
    packed = w_smem.index(stage * CHUNKS + first_row // 128).slice(first_row % 128, 64).load(layout)
    span: gl.constexpr = x_smem.shape[1] // SPANS
    for plane in gl.static_range(2):
        group_scale = 0
        if MODE != CHANNEL:
            group_scale = load_group_scale(group_smem.index(2 * stage + plane), first_row, layout, MODE)
        operand = unpack(packed, group_scale, plane == 1, MODE)
        x = x_smem.index(2 * stage + plane)
        acc0 = warpgroup_mma(operand, x.slice(0, span).permute((1, 0)), acc0, is_async=True)
        if SPANS == 2:
            acc1 = warpgroup_mma(operand, x.slice(span, span).permute((1, 0)), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def multiply_stages(
    acc0,
    acc1,
    w_smem,
    x_smem,
    group_smem,
    barriers,
    step,
    COUNT: gl.constexpr,
    first_row: gl.constexpr,
    CHUNKS: gl.constexpr,
    BLOCKS: gl.constexpr,
    SPANS: gl.constexpr,
    STAGES: gl.constexpr,
    MODE: gl.constexpr,
    layout: gl.constexpr,
):
    """Add COUNT K blocks to the accumulators; one is unpacked while the one before it is multiplied."""
    for ahead in gl.static_range(COUNT):
        stage = (step + ahead) % STAGES
        mbarrier.wait(barriers.index(stage), (step + ahead) // STAGES & 1)
        acc0, acc1 = multiply(
            acc0, acc1, w_smem, x_smem, group_smem, stage, first_row, CHUNKS, SPANS, MODE, layout
        )
        if BLOCKS == 2:
            acc1, _ = multiply(
                acc1, acc1, w_smem, x_smem, group_smem, stage, first_row + 64, CHUNKS, SPANS, MODE, layout
            )
    if BLOCKS * SPANS == 2:
        acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
    else:
        acc0 = warpgroup_mma_wait(0, deps=(acc0,))
    fence_async_shared()
    for ahead in gl.static_range(COUNT):
        mbarrier.arrive(barriers.index(STAGES + (step + ahead) % STAGES))
    return acc0, acc1


@gluon.jit
def load_row_values(values, first_row, num_rows, mma: gl.constexpr):
    """float32 values of 64 rows, spread over the accumulator; 0 from `num_rows` on."""
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma))
    return gl.load(values + row, mask=row < num_rows, other=0.0).to(gl.float32)


@gluon.jit
def load_token_scale(x_scale, first_token, num_tokens, TOKENS: gl.constexpr, layout: gl.constexpr):
    """Scales of a span of tokens; 0 from `num_tokens` on."""
    token = first_token + gl.arange(0, TOKENS, layout)
    return gl.load(x_scale + token, mask=token < num_tokens, other=0.0)


@gluon.jit
def finish(
    acc,
    out_desc,
    out,
    out_smem,
    row_scale,
    token_scale,
    offset,
    first_row,
    first_token,
    num_tokens,
    num_rows,
    HAS_BIAS: gl.constexpr,
    BULK_STORE: gl.constexpr,
    mma: gl.constexpr,
):
    """Scale, add the bias, round once and store one accumulator, transposed to [tokens, rows]."""
    result = acc.to(gl.float32) * gl.expand_dims(row_scale, 1) * gl.expand_dims(token_scale, 0)
    if HAS_BIAS:
        result = result + gl.expand_dims(offset, 1)
    if BULK_STORE:
        tma.store_wait(0)  # the previous tile has left the buffer
        gl.thread_barrier()
        out_smem.permute((1, 0)).store(result.to(out_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [first_token, first_row], out_smem)
    else:
        row = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma))
        token = first_token + gl.arange(0, acc.shape[1], gl.SliceLayout(0, mma))
        where = out + gl.expand_dims(token, 0).to(gl.int64) * num_rows + gl.expand_dims(row, 1)
        mask = (gl.expand_dims(token, 0) < num_tokens) & (gl.expand_dims(row, 1) < num_rows)
        gl.store(where, result.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def slab_pointer(partial, slab, TOKENS: gl.constexpr, mma: gl.constexpr):
    """Addresses of one accumulator that a program leaves for the owner of a tile.

    Squares of 8 rows by 8 tokens follow each other, so that a warp moves 256 bytes in a row at a time.
    """
    row = gl.arange(0, 64, gl.SliceLayout(1, mma))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))
    of_row = row // 8 * (8 * TOKENS) + row % 8 * 8
    of_token = token // 8 * 64 + token % 8
    return partial + slab * (64 * TOKENS) + gl.expand_dims(of_row, 1) + gl.expand_dims(of_token, 0)


@gluon.jit
def leave_sums(
    acc0,
    acc1,
    partial,
    arrivals,
    me,
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    PARTS: gl.constexpr,
    mma: gl.constexpr,
):
    """Store the accumulators for the owner of the tile, and raise this consumer's flag."""
    for part in gl.static_range(PARTS):
        slab = (me * CONSUMERS + CONSUMER) * PARTS + part
        gl.store(slab_pointer(partial, slab, acc0.shape[1], mma), acc1 if part else acc0)
    gl.thread_barrier()
    gl.atomic_xchg(arrivals + me * CONSUMERS + CONSUMER, 1, sem="release")


@gluon.jit
def collect_sums(
    acc0,
    acc1,
    partial,
    arrivals,
    first,
    last,
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    PARTS: gl.constexpr,
    mma: gl.constexpr,
):
    """Add what the programs from `first` to before `last` leave, waiting for their flags and lowering them."""
    for other in range(first, last):
        flag = arrivals + other * CONSUMERS + CONSUMER
        while gl.atomic_cas(flag, 1, 0, sem="acquire") == 0:
            pass
        gl.thread_barrier()
        slab = (other * CONSUMERS + CONSUMER) * PARTS
        acc0 += gl.load(slab_pointer(partial, slab, acc0.shape[1], mma), cache_modifier=".cg")
        if PARTS == 2:
            acc1 += gl.load(slab_pointer(partial, slab + 1, acc0.shape[1], mma), cache_modifier=".cg")
    return acc0, acc1


@gluon.jit
def consume(
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
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCKS: gl.constexpr,
    SPANS: gl.constexpr,
    TOKENS: gl.constexpr,
    MODE: gl.constexpr,
    BAND: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BULK_STORE: gl.constexpr,
    EARLY_SCALE: gl.constexpr,
    IS_CUT: gl.constexpr,
    PDL: gl.constexpr,
):
    """Multiply BLOCKS blocks of 64 rows of every work item; store the result or leave it to the tile owner."""
    SPAN: gl.constexpr = TOKENS // SPANS
    PARTS: gl.constexpr = BLOCKS * SPANS
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SPAN, 32])
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=4)
    of_token: gl.constexpr = gl.SliceLayout(0, mma)
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    base: gl.constexpr = CONSUMER * BLOCKS * 64
    CHUNKS: gl.constexpr = CONSUMERS * BLOCKS // 2
    num_row_tiles = gl.cdiv(num_rows, CONSUMERS * BLOCKS * 64)
    num_token_tiles = gl.cdiv(num_tokens, TOKENS)
    padded_rows = num_row_tiles * (CONSUMERS * BLOCKS * 64)
    me = gl.num_programs(0) - 1 - gl.program_id(0)
    num_tiles = num_row_tiles * num_token_tiles
    step = 0
    if PDL:
        gdc_wait()
    for item in range(num_items(num_tiles, num_blocks, whole, sharers, IS_CUT)):
        tile, first, last = share(item, num_tiles, num_blocks, whole, sharers, IS_CUT)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        first_row = row_tile * (CONSUMERS * BLOCKS * 64) + base
        first_token = token_tile * TOKENS
        # fetched now, since they would take as long as several K blocks when the products are done
        row_scale0 = load_row_values(scale, first_row, padded_rows, mma)
        row_scale1, offset0, offset1 = row_scale0, row_scale0, row_scale0
        if BLOCKS == 2:
            row_scale1 = load_row_values(scale, first_row + 64, padded_rows, mma)
        if HAS_BIAS:
            offset0 = load_row_values(bias, first_row, num_rows, mma)
            if BLOCKS == 2:
                offset1 = load_row_values(bias, first_row + 64, num_rows, mma)
        if EARLY_SCALE:
            token_scale0 = load_token_scale(x_scale, first_token, num_tokens, SPAN, one_each)
            token_scale1 = token_scale0
            if SPANS == 2:
                token_scale1 = load_token_scale(x_scale, first_token + SPAN, num_tokens, SPAN, one_each)
        acc0 = gl.zeros((64, SPAN), gl.int32, mma)
        acc1 = gl.zeros((64, SPAN), gl.int32, mma)
        rest = (last - first) % UNROLL
        for _ in range(first, last - rest, UNROLL):
            acc0, acc1 = multiply_stages(
                acc0,
                acc1,
                w_smem,
                x_smem,
                group_smem,
                barriers,
                step,
                UNROLL,
                base,
                CHUNKS,
                BLOCKS,
                SPANS,
                STAGES,
                MODE,
                layout,
            )
            step += UNROLL
        if UNROLL > 1:
            for _ in range(rest):
                acc0, acc1 = multiply_stages(
                    acc0,
                    acc1,
                    w_smem,
                    x_smem,
                    group_smem,
                    barriers,
                    step,
                    1,
                    base,
                    CHUNKS,
                    BLOCKS,
                    SPANS,
                    STAGES,
                    MODE,
                    layout,
                )
                step += 1
        is_owner = True
        if IS_CUT:
            is_owner = first == 0
            if first > 0:
                leave_sums(acc0, acc1, partial, arrivals, me, CONSUMER, CONSUMERS, PARTS, mma)
            elif last < num_blocks:
                # the rest of this tile is with the next programs, up to the one that holds its last block
                units = (num_tiles - whole) * num_blocks
                final = ((tile - whole + 1) * num_blocks * sharers - 1) // units
                acc0, acc1 = collect_sums(
                    acc0, acc1, partial, arrivals, me + 1, final + 1, CONSUMER, CONSUMERS, PARTS, mma
                )
        if is_owner:
            for part in gl.static_range(PARTS):
                if EARLY_SCALE:
                    token_scale = gl.convert_layout(token_scale1 if part % SPANS else token_scale0, of_token)
                else:
                    token = first_token + part % SPANS * SPAN
                    token_scale = load_token_scale(x_scale, token, num_tokens, SPAN, of_token)
                finish(
                    acc1 if part else acc0,
                    out_desc,
                    out,
                    out_smem.index(CONSUMER),
                    row_scale1 if part // SPANS else row_scale0,
                    token_scale,
                    offset1 if part // SPANS else offset0,
                    first_row + part // SPANS * 64,
                    first_token + part % SPANS * SPAN,
                    num_tokens,
                    num_rows,
                    HAS_BIAS,
                    BULK_STORE,
                    mma,
                )
    if BULK_STORE:
        tma.store_wait(0)
