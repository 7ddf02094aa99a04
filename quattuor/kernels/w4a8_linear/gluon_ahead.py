# SPDX-License-Identifier: Apache-2.0
"""Consumers that unpack the next K block while the products of this one run.

A loop may not carry the register operand of products that the next iteration issues: the assembler would wait for
each product. It may carry values that one instruction turns into operands. Group modes carry products of codes and
scales with 128 added, and flip sign bits; one scale per channel carries the packed words.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quattuor.kernels.w4a8_linear.gluon_modes import CHANNEL, HALF, INTEGER, load_group_scale
from quattuor.kernels.w4a8_linear.unpacking import (
    FLIP_SIGNS,
    HIGH_CHANNEL,
    HIGH_HALF_BIASED,
    HIGH_INTEGER_BIASED,
    HIGH_UNCLAMPED_BIASED,
    LOW_HALF_BIASED,
    LOW_INTEGER_BIASED,
    LOW_UNCLAMPED_BIASED,
)

__all__ = ["multiply_ahead", "unpack_stage"]

#: The packed weight as words; the swizzle is that of its bytes.
WORD_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))


@gluon.jit
def scale_words(packed, group_scale, HIGH: gl.constexpr, MODE: gl.constexpr):
    """Words of four codes of one plane, scaled, 128 added; with one scale per channel as they are."""
    if MODE == CHANNEL:
        words = packed if HIGH else packed << 4
    elif MODE == INTEGER:
        addend = group_scale * -0x08080808 - 0x7F7F7F80
        words = gl.inline_asm_elementwise(
            HIGH_INTEGER_BIASED if HIGH else LOW_INTEGER_BIASED,
            "=r,r,r,r",
            [packed, group_scale, addend],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    elif MODE == HALF:
        words = gl.inline_asm_elementwise(
            HIGH_HALF_BIASED if HIGH else LOW_HALF_BIASED,
            "=r,r,r",
            [packed, group_scale],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        words = gl.inline_asm_elementwise(
            HIGH_UNCLAMPED_BIASED if HIGH else LOW_UNCLAMPED_BIASED,
            "=r,r,r",
            [packed, group_scale],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
    return words


@gluon.jit
def as_operand(words, MODE: gl.constexpr, layout: gl.constexpr):
    """The int8 operand [64, 128] of words [64, 32]; every element of a word is told the whole word."""
    pairs = gl.join(words, words)
    spread = gl.join(pairs, pairs).reshape([64, 128])
    if MODE == CHANNEL:
        operand = gl.inline_asm_elementwise(
            HIGH_CHANNEL, "=r,r,r,r,r", [spread], dtype=gl.int8, is_pure=True, pack=4
        )
    else:
        operand = gl.inline_asm_elementwise(
            FLIP_SIGNS, "=r,r,r,r,r", [spread], dtype=gl.int8, is_pure=True, pack=4
        )
    return gl.convert_layout(operand, layout, assert_trivial=True)


@gluon.jit
def unpack_stage(
    w_smem,
    group_smem,
    stage,
    first_row: gl.constexpr,
    CHUNKS: gl.constexpr,
    MODE: gl.constexpr,
    layout: gl.constexpr,
):
    """Words of both planes of 64 rows, but for their last instruction."""
    of_words: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout.parent, k_width=1)
    chunk = w_smem.index(stage * CHUNKS + first_row // 128)._reinterpret(gl.int32, [128, 32], WORD_LAYOUT)
    packed = chunk.slice(first_row % 128, 64).load(of_words)
    low_scale, high_scale = 0, 0
    if MODE != CHANNEL:
        low_scale = load_group_scale(group_smem.index(2 * stage), first_row, of_words, MODE)
        high_scale = load_group_scale(group_smem.index(2 * stage + 1), first_row, of_words, MODE)
    return scale_words(packed, low_scale, False, MODE), scale_words(packed, high_scale, True, MODE)


@gluon.jit
def issue(acc0, acc1, low, high, x_smem, stage, SPANS: gl.constexpr, MODE: gl.constexpr, layout: gl.constexpr):
    """Issue the products of both planes of 64 rows with every span of tokens."""
    span: gl.constexpr = x_smem.shape[1] // SPANS
    for plane in gl.static_range(2):
        operand = as_operand(high if plane else low, MODE, layout)
        x = x_smem.index(2 * stage + plane)
        acc0 = warpgroup_mma(operand, x.slice(0, span).permute((1, 0)), acc0, is_async=True)
        if SPANS == 2:
            acc1 = warpgroup_mma(operand, x.slice(span, span).permute((1, 0)), acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def unpack_meanwhile(
    w_smem,
    group_smem,
    barriers,
    step,
    is_there,
    first_row: gl.constexpr,
    CHUNKS: gl.constexpr,
    STAGES: gl.constexpr,
    MODE: gl.constexpr,
    layout: gl.constexpr,
):
    """Unpack 64 rows of a stage behind the products issued before, and before what follows."""
    stage, phase = step % STAGES, step // STAGES & 1
    mbarrier.wait(barriers.index(stage), phase, pred=is_there)
    low, high = unpack_stage(w_smem, group_smem, stage, first_row, CHUNKS, MODE, layout)
    # waiting again takes no time, and the assembler moves no instruction across it
    mbarrier.wait(barriers.index(stage), phase, pred=is_there)
    return low, high


@gluon.jit
def multiply_ahead(
    acc0,
    acc1,
    low,
    high,
    w_smem,
    x_smem,
    group_smem,
    barriers,
    step,
    is_followed,
    first_row: gl.constexpr,
    CHUNKS: gl.constexpr,
    BLOCKS: gl.constexpr,
    SPANS: gl.constexpr,
    STAGES: gl.constexpr,
    MODE: gl.constexpr,
    layout: gl.constexpr,
):
    """Add a K block whose words are at hand, and return the words of the block after it, if one follows."""
    stage = step % STAGES
    acc0, acc1 = issue(acc0, acc1, low, high, x_smem, stage, SPANS, MODE, layout)
    if BLOCKS == 2:
        low, high = unpack_meanwhile(
            w_smem, group_smem, barriers, step, True, first_row + 64, CHUNKS, STAGES, MODE, layout
        )
        acc1, _ = issue(acc1, acc1, low, high, x_smem, stage, SPANS, MODE, layout)
        # the products of the first rows are done, and their registers free, when two remain
        acc0 = warpgroup_mma_wait(2, deps=(acc0,))
    low, high = unpack_meanwhile(
        w_smem, group_smem, barriers, step + 1, is_followed, first_row, CHUNKS, STAGES, MODE, layout
    )
    if BLOCKS * SPANS == 2:
        acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
    else:
        acc0 = warpgroup_mma_wait(0, deps=(acc0,))
    fence_async_shared()
    mbarrier.arrive(barriers.index(STAGES + stage))
    return acc0, acc1, low, high
