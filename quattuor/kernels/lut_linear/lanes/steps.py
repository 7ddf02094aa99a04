# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel does with one step of a block: bytes of the weight times bytes of the tokens."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.lanes.instructions import (
    ONCE,
    SHARED,
    load_words,
    multiply,
    permute,
    selectors,
    shift_right,
)

__all__ = ["add_entries_step", "add_planes_step", "load_block", "load_table", "load_tokens", "start_sums"]


@triton.jit
def load_block(weight, block, NUM_BLOCKS, BITS: tl.constexpr, ASM: tl.constexpr):
    """The words of a block, those of the last block beyond the end."""
    words = ()
    start = weight + tl.minimum(block, NUM_BLOCKS - 1) * (BITS * 128)
    for load in tl.static_range(BITS):
        words += load_words(start + load * 128, ONCE, ASM)
    return words


@triton.jit
def load_tokens(operand, stride, PAIR: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr):
    """Bytes of the tokens for two steps: four words for each tile."""
    words = ()
    for tile in tl.static_range(TILES):
        words += load_words(operand + PAIR * stride + tile * 128, SHARED, ASM)
    return words


@triton.jit
def load_table(limbs, group, row_of_lane, ASM: tl.constexpr):
    """The sixteen registers of entries of the rows g and g + 8."""
    start = limbs + group * 128 + row_of_lane * 16
    words = ()
    for load in tl.static_range(4):
        words += load_words(start + load * 4, SHARED, ASM)
    return words


@triton.jit
def start_sums(value, COUNT: tl.constexpr):
    """`COUNT` sums of four registers."""
    return ((value, value, value, value),) * COUNT


@triton.jit
def add_planes_step(
    sums, words, tokens, STEP: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr
):
    """Add one step of every plane: a masked byte is an integer, 0 or 2^STEP, and -128 or 0 for bit 7."""
    MASK: tl.constexpr = -0x7F7F7F80 if STEP == 7 else 0x01010101 << STEP
    result = ()
    for index in tl.static_range(TILES * BITS):
        part = multiply(
            words[4 * (index % BITS)] & MASK,
            words[4 * (index % BITS) + 1] & MASK,
            words[4 * (index % BITS) + 2] & MASK,
            words[4 * (index % BITS) + 3] & MASK,
            tokens[4 * (index // BITS) + 2 * (STEP % 2)],
            tokens[4 * (index // BITS) + 2 * (STEP % 2) + 1],
            sums[index],
            ASM,
        )
        result += (part,)
    return result


@triton.jit
def add_entries_step(
    sums, words, table, tokens, STEP: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr
):
    """Add one step of the high and of the low bytes of entries; of sixteen entries each half adds its part."""
    s0 = selectors(words, STEP, 0, BITS)
    s1 = selectors(words, STEP, 1, BITS)
    s2 = shift_right(s0, 16)
    s3 = shift_right(s1, 16)
    u0, u1, u2, u3 = s0, s1, s2, s3
    if BITS == 4:
        u0 = s0 ^ -0x77777778
        u1 = s1 ^ -0x77777778
        u2 = shift_right(u0, 16)
        u3 = shift_right(u1, 16)
    result = ()
    for index in tl.static_range(TILES * 2):
        b0 = tokens[4 * (index // 2) + 2 * (STEP % 2)]
        b1 = tokens[4 * (index // 2) + 2 * (STEP % 2) + 1]
        total = multiply(
            permute(table[4 * (index % 2)], table[4 * (index % 2) + 1], s0, ASM),
            permute(table[4 * (index % 2) + 8], table[4 * (index % 2) + 9], s1, ASM),
            permute(table[4 * (index % 2)], table[4 * (index % 2) + 1], s2, ASM),
            permute(table[4 * (index % 2) + 8], table[4 * (index % 2) + 9], s3, ASM),
            b0,
            b1,
            sums[index],
            ASM,
        )
        if BITS == 4:
            total = multiply(
                permute(table[4 * (index % 2) + 2], table[4 * (index % 2) + 3], u0, ASM),
                permute(table[4 * (index % 2) + 10], table[4 * (index % 2) + 11], u1, ASM),
                permute(table[4 * (index % 2) + 2], table[4 * (index % 2) + 3], u2, ASM),
                permute(table[4 * (index % 2) + 10], table[4 * (index % 2) + 11], u3, ASM),
                b0,
                b1,
                total,
                ASM,
            )
        result += (total,)
    return result
