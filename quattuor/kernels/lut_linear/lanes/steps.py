# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel does with one step of a block: bytes of the weight times bytes of the tokens."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.lanes.instructions import (
    HELD,
    ONCE,
    SHARED,
    load_words,
    multiply,
    permute,
    selectors,
    shift_right,
)

__all__ = ["add_entries_step", "add_planes_step", "load_block", "load_table", "load_token", "start_sums"]


@triton.jit
def load_block(start, BITS: tl.constexpr, ASM: tl.constexpr, HOLDS: tl.constexpr = False):
    """The words of a block."""
    words = ()
    for load in tl.static_range(BITS):
        words += load_words(start + load * 128, HELD if HOLDS else ONCE, ASM)
    return words


@triton.jit
def load_token(operand, ASM: tl.constexpr):
    """Bytes of the token for a block: two words for each step. Columns 4 .. 7 of a product repeat 0 .. 3."""
    words = ()
    for pair in tl.static_range(4):
        words += load_words(operand + pair * 64, SHARED, ASM)
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
def add_planes_step(sums, words, token, STEP: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Add one step of every plane: a masked byte is an integer, 0 or 2^STEP, and -128 or 0 for bit 7."""
    MASK: tl.constexpr = -0x7F7F7F80 if STEP == 7 else 0x01010101 << STEP
    result = ()
    for plane in tl.static_range(BITS):
        part = multiply(
            words[4 * plane] & MASK,
            words[4 * plane + 1] & MASK,
            words[4 * plane + 2] & MASK,
            words[4 * plane + 3] & MASK,
            token[2 * STEP],
            token[2 * STEP + 1],
            sums[plane],
            True,
            ASM,
        )
        result += (part,)
    return result


@triton.jit
def add_entries_step(sums, words, table, token, STEP: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
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
    b0 = token[2 * STEP]
    b1 = token[2 * STEP + 1]
    result = ()
    for byte in tl.static_range(2):
        total = multiply(
            permute(table[4 * byte], table[4 * byte + 1], s0, ASM),
            permute(table[4 * byte + 8], table[4 * byte + 9], s1, ASM),
            permute(table[4 * byte], table[4 * byte + 1], s2, ASM),
            permute(table[4 * byte + 8], table[4 * byte + 9], s3, ASM),
            b0,
            b1,
            sums[byte],
            True,
            ASM,
        )
        if BITS == 4:
            total = multiply(
                permute(table[4 * byte + 2], table[4 * byte + 3], u0, ASM),
                permute(table[4 * byte + 10], table[4 * byte + 11], u1, ASM),
                permute(table[4 * byte + 2], table[4 * byte + 3], u2, ASM),
                permute(table[4 * byte + 10], table[4 * byte + 11], u3, ASM),
                b0,
                b1,
                total,
                True,
                ASM,
            )
        result += (total,)
    return result
