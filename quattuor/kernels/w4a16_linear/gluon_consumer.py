# SPDX-License-Identifier: Apache-2.0
"""The consumers of the Hopper kernel: make operands of words, multiply, and store the tile or leave its sums.

A consumer holds an accumulator for each of its one or two blocks of 64 rows. The words of a block of K go to
registers at once; planes are unpacked one after the other, each while the products of the one before run.
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

from quattuor.kernels.w4a8_linear.gluon_consumer import collect_sums, finish, leave_sums, load_row_values
from quattuor.kernels.w4a8_linear.gluon_schedule import num_items, place, share
from quattuor.kernels.w4a16_linear.unpacking import assembly, constraints, position

__all__ = ["CARRIED", "CHANNEL", "SUMMED", "consume"]

# Where a scale meets the products; from SUMMED on it is float32 sums, whose products have ended.
CHANNEL = gl.constexpr(0)  # one for each row: at the end of the tile
SUMMED = gl.constexpr(1)  # the sums over its group
CARRIED = gl.constexpr(2)  # all sums so far, which are kept in units of the scale of the present group

#: What stands for a scale of zero where sums are divided by scales.
TINY = gl.constexpr(2.0**-80)


@gluon.jit
def as_pairs(value):
    """Write 16 bits twice, in an int32."""
    bits = value.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return bits | (bits << 16)


@gluon.jit
def addend(zero, dtype: gl.constexpr, BITS: gl.constexpr, PLANE: gl.constexpr):
    """What `assembly` adds to a field, twice in an int32, as `decode_kernel.addend` has it."""
    if dtype == gl.float16:
        low: gl.constexpr = position(BITS, PLANE, True)
        value = zero * (0x00010001 << low) + ((0xE400 - (low << 10)) * 0x00010001 - 0x100000000)
    elif BITS < 8:
        value = zero * 0x00010001 + (0xC300C300 - 0x100000000)
    else:
        value = as_pairs((-zero.to(gl.float32)).to(gl.bfloat16))
    return value


@gluon.jit
def decode(words, zero, dtype: gl.constexpr, BITS: gl.constexpr, PLANE: gl.constexpr, HAS_ZERO: gl.constexpr):
    """The codes of one plane less `zero` [rows, 1] or the middle of the range; exact."""
    text: gl.constexpr = assembly(BITS, PLANE, dtype == gl.float16, HAS_ZERO)
    registers: gl.constexpr = constraints(BITS, PLANE, HAS_ZERO)
    operands = [words, addend(zero, dtype, BITS, PLANE)] if HAS_ZERO else [words]
    # the type of the result has to be written out
    if dtype == gl.float16:
        value = gl.inline_asm_elementwise(text, registers, operands, dtype=gl.float16, is_pure=True, pack=2)
    else:
        value = gl.inline_asm_elementwise(text, registers, operands, dtype=gl.bfloat16, is_pure=True, pack=2)
    return value


@gluon.jit
def load_rows(values_smem, index, first_row: gl.constexpr, layout: gl.constexpr):
    """The values of 64 rows for one piece of a block, [64, 1] in a layout of two dimensions."""
    flat = values_smem.index(index).reshape((values_smem.shape[2],)).slice(first_row, 64)
    return gl.expand_dims(flat.load(gl.SliceLayout(1, layout)), 1)


@gluon.jit
def load_words(
    w_smem,
    barriers,
    w_step,
    first_row: gl.constexpr,
    CHUNKS: gl.constexpr,
    BLOCKS: gl.constexpr,
    W_STAGES: gl.constexpr,
    layout: gl.constexpr,
):
    """The words of BLOCKS times 64 rows of a block of K, when they have arrived."""
    w_stage = w_step % W_STAGES
    mbarrier.wait(barriers.index(w_stage), w_step // W_STAGES & 1)
    chunk = w_smem.index(w_stage * CHUNKS + first_row // 128)
    words0 = chunk.slice(first_row % 128, 64).load(layout)
    words1 = words0
    if BLOCKS == 2:
        words1 = chunk.slice(first_row % 128 + 64, 64).load(layout)
    return words0, words1


@gluon.jit
def load_piece(
    scale_smem,
    zero_smem,
    barriers,
    w_step,
    piece: gl.constexpr,
    first_row: gl.constexpr,
    BLOCKS: gl.constexpr,
    PIECES: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    MODE: gl.constexpr,
    W_STAGES: gl.constexpr,
    mma: gl.constexpr,
    layout: gl.constexpr,
):
    """Zero points and scales [64, 1] of each block of rows; the last piece releases the stage of its words.

    They are int32 and float32.
    """
    index = w_step % W_STAGES * PIECES + piece
    zero0, zero1, scale0, scale1 = 0, 0, 0, 0
    if HAS_ZERO:
        zero0 = load_rows(zero_smem, index, first_row, layout).to(gl.int32)
        zero1 = zero0
        if BLOCKS == 2:
            zero1 = load_rows(zero_smem, index, first_row + 64, layout).to(gl.int32)
    if MODE >= SUMMED:
        scale0 = load_rows(scale_smem, index, first_row, mma).to(gl.float32)
        scale1 = scale0
        if BLOCKS == 2:
            scale1 = load_rows(scale_smem, index, first_row + 64, mma).to(gl.float32)
    if piece == PIECES - 1:
        fence_async_shared()
        mbarrier.arrive(barriers.index(W_STAGES + w_step % W_STAGES))
    return zero0, zero1, scale0, scale1


@gluon.constexpr_function
def is_last(plane, planes, run):
    """Return whether a consumer waits for all its products when a plane has been issued."""
    return plane == planes - 1 or plane % run == run - 1


@gluon.constexpr_function
def ended(plane, planes, run, together):
    """Return the stages of tokens that no product reads any more when a plane has been issued.

    Where a consumer does not wait for all products it waits for those of the planes before.
    """
    return (plane + 1 if plane < 0 or is_last(plane, planes, run) else plane) // together


@gluon.jit
def add_product(acc, operand, x, IS_ADDED: gl.constexpr):
    """Issue the product of an operand with the tokens of a plane; the caller waits for it."""
    return warpgroup_mma(operand, x.permute((1, 0)), acc, use_acc=IS_ADDED, is_async=True)


@gluon.jit
def settle(sum0, sum1, BLOCKS: gl.constexpr, FLYING: gl.constexpr):
    """Wait until no more than FLYING products are left."""
    if BLOCKS == 2:
        sum0, sum1 = warpgroup_mma_wait(FLYING, deps=(sum0, sum1))
    else:
        sum0 = warpgroup_mma_wait(FLYING, deps=(sum0,))
    return sum0, sum1


@gluon.jit
def add_scaled(acc, sums, row_scale):
    """acc + sums * row_scale, in the order of the program.

    The compiler would put it off behind the products of the next group, whose sums then need registers as well.
    """
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [sums, row_scale, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def carry(sums, unit, row_scale):
    """Sums in units of a new scale, and the new unit; a scale of zero counts as one that leaves no trace."""
    next_unit = gl.where(row_scale == 0.0, TINY, row_scale)
    return sums * gl.div_rn(unit, next_unit), next_unit


@gluon.jit
def multiply_blocks(
    acc0,
    acc1,
    unit0,
    unit1,
    x_smem,
    w_smem,
    scale_smem,
    zero_smem,
    barriers,
    step,
    first_row: gl.constexpr,
    BLOCKS: gl.constexpr,
    CHUNKS: gl.constexpr,
    BITS: gl.constexpr,
    PLANES: gl.constexpr,
    PIECES: gl.constexpr,
    TOGETHER: gl.constexpr,
    UNROLL: gl.constexpr,
    LAGS: gl.constexpr,
    HAS_ZERO: gl.constexpr,
    MODE: gl.constexpr,
    W_STAGES: gl.constexpr,
    X_STAGES: gl.constexpr,
    mma: gl.constexpr,
    layout: gl.constexpr,
):
    """Add UNROLL blocks of K to the accumulators, each of PLANES planes in PIECES pieces of one group.

    The operand of a plane is made while the products of the plane before run.
    """
    RUN: gl.constexpr = PLANES // PIECES
    TOTAL: gl.constexpr = UNROLL * PLANES
    WAIT: gl.constexpr = RUN if MODE >= SUMMED and not LAGS else TOTAL
    FULL: gl.constexpr = 2 * W_STAGES
    FREE: gl.constexpr = FULL + X_STAGES
    dtype: gl.constexpr = x_smem.dtype
    x_step = step * (TOTAL // TOGETHER)
    sum0, sum1 = acc0, acc1
    last0, last_scale0 = acc0, 0
    for plane in gl.static_range(TOTAL):
        w_step = step * UNROLL + plane // PLANES
        if plane % PLANES == 0:
            words0, words1 = load_words(w_smem, barriers, w_step, first_row, CHUNKS, BLOCKS, W_STAGES, layout)
        if plane % RUN == 0:
            zero0, zero1, scale0, scale1 = load_piece(
                scale_smem,
                zero_smem,
                barriers,
                w_step,
                plane % PLANES // RUN,
                first_row,
                BLOCKS,
                PIECES,
                HAS_ZERO,
                MODE,
                W_STAGES,
                mma,
                layout,
            )
            if MODE == CARRIED:
                sum0, unit0 = carry(sum0, unit0, scale0)
                if BLOCKS == 2:
                    sum1, unit1 = carry(sum1, unit1, scale1)
        x_stage = (x_step + plane // TOGETHER) % X_STAGES
        operand = decode(words0, zero0, dtype, BITS, plane % PLANES, HAS_ZERO)
        if plane % TOGETHER == 0:
            mbarrier.wait(barriers.index(FULL + x_stage), (x_step + plane // TOGETHER) // X_STAGES & 1)
        x = x_smem.index(x_stage * TOGETHER + plane % TOGETHER)
        sum0 = add_product(sum0, operand, x, MODE != SUMMED or plane % RUN > 0)
        if BLOCKS == 2:
            # three operands at most are in registers
            if plane % WAIT > 0:
                sum0, sum1 = settle(sum0, sum1, BLOCKS, 1)
            operand = decode(words1, zero1, dtype, BITS, plane % PLANES, HAS_ZERO)
            sum1 = add_product(sum1, operand, x, MODE != SUMMED or plane % RUN > 0)
        if LAGS and plane % RUN == 0 and plane > 0:
            # the products of the group before have ended, those of this plane run
            sum0, last0 = settle(sum0, last0, 2, 1)
            acc0 = add_scaled(acc0, last0, last_scale0)
        if is_last(plane, TOTAL, WAIT):
            sum0, sum1 = settle(sum0, sum1, BLOCKS, 0)
            if MODE == SUMMED:
                acc0 = add_scaled(acc0, sum0, scale0)
                if BLOCKS == 2:
                    acc1 = add_scaled(acc1, sum1, scale1)
        elif plane % WAIT > 0 and not (LAGS and plane % RUN == 0):
            sum0, sum1 = settle(sum0, sum1, BLOCKS, 1)
        for done in gl.static_range(ended(plane - 1, TOTAL, WAIT, TOGETHER), ended(plane, TOTAL, WAIT, TOGETHER)):
            mbarrier.arrive(barriers.index(FREE + (x_step + done) % X_STAGES))
        if LAGS and plane % RUN == RUN - 1:
            last0, last_scale0 = sum0, scale0
            sum0 = gl.zeros_like(acc0)
    if MODE != SUMMED:
        acc0, acc1 = sum0, sum1
    return acc0, acc1, unit0, unit1


@gluon.jit
def consume(
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
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCKS: gl.constexpr,
    TOKENS: gl.constexpr,
    BITS: gl.constexpr,
    PLANES: gl.constexpr,
    PIECES: gl.constexpr,
    TOGETHER: gl.constexpr,
    UNROLL: gl.constexpr,
    LAGS: gl.constexpr,
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
    """Multiply BLOCKS blocks of 64 rows of every work item; store the result or leave it to the tile owner."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    of_token: gl.constexpr = gl.SliceLayout(0, mma)
    base: gl.constexpr = CONSUMER * BLOCKS * 64
    CHUNKS: gl.constexpr = CONSUMERS * BLOCKS // 2
    num_row_tiles = gl.cdiv(num_rows, CONSUMERS * BLOCKS * 64)
    num_token_tiles = gl.cdiv(num_tokens, TOKENS)
    num_tiles = num_row_tiles * num_token_tiles
    num_steps = gl.cdiv(num_blocks, UNROLL)
    me = gl.num_programs(0) - 1 - gl.program_id(0)
    step = 0
    if PDL:
        gdc_wait()
    for item in range(num_items(num_tiles, num_steps, whole, sharers, IS_CUT)):
        tile, first, last = share(item, num_tiles, num_steps, whole, sharers, IS_CUT)
        row_tile, token_tile = place(tile, num_row_tiles, num_token_tiles, BAND)
        first_row = row_tile * (CONSUMERS * BLOCKS * 64) + base
        first_token = token_tile * TOKENS
        # fetched now, since they would take as long as several planes when the products are done
        row_scale0 = gl.full((64,), 1.0, gl.float32, gl.SliceLayout(1, mma))
        row_scale1, offset0, offset1 = row_scale0, row_scale0, row_scale0
        if MODE == CHANNEL:
            row_scale0 = load_row_values(scale, first_row, num_rows, mma)
            if BLOCKS == 2:
                row_scale1 = load_row_values(scale, first_row + 64, num_rows, mma)
        if HAS_BIAS:
            offset0 = load_row_values(bias, first_row, num_rows, mma)
            if BLOCKS == 2:
                offset1 = load_row_values(bias, first_row + 64, num_rows, mma)
        acc0 = gl.zeros((64, TOKENS), gl.float32, mma)
        acc1 = gl.zeros((64, TOKENS), gl.float32, mma)
        unit0 = gl.full((64, 1), 1.0, gl.float32, mma)
        unit1 = unit0
        for _ in range(first, last):
            acc0, acc1, unit0, unit1 = multiply_blocks(
                acc0,
                acc1,
                unit0,
                unit1,
                x_smem,
                w_smem,
                scale_smem,
                zero_smem,
                barriers,
                step,
                base,
                BLOCKS,
                CHUNKS,
                BITS,
                PLANES,
                PIECES,
                TOGETHER,
                UNROLL,
                LAGS,
                HAS_ZERO,
                MODE,
                W_STAGES,
                X_STAGES,
                mma,
                layout,
            )
            step += 1
        if MODE == CARRIED:
            acc0 = acc0 * unit0
            acc1 = acc1 * unit1
        is_owner = True
        if IS_CUT:
            is_owner = first == 0
            if first > 0:
                leave_sums(acc0, acc1, partial, arrivals, me, CONSUMER, CONSUMERS, BLOCKS, mma)
            elif last < num_steps:
                # the rest of this tile is with the next programs, up to the one that holds its last block
                units = (num_tiles - whole) * num_steps
                final = ((tile - whole + 1) * num_steps * sharers - 1) // units
                acc0, acc1 = collect_sums(
                    acc0, acc1, partial, arrivals, me + 1, final + 1, CONSUMER, CONSUMERS, BLOCKS, mma
                )
        if is_owner:
            for part in gl.static_range(BLOCKS):
                finish(
                    acc1 if part else acc0,
                    out_desc,
                    out,
                    out_smem.index(CONSUMER),
                    row_scale1 if part else row_scale0,
                    gl.full((TOKENS,), 1.0, gl.float32, of_token),
                    offset1 if part else offset0,
                    first_row + part * 64,
                    first_token,
                    num_tokens,
                    num_rows,
                    HAS_BIAS,
                    BULK_STORE,
                    mma,
                )
    if BULK_STORE:
        tma.store_wait(0)
