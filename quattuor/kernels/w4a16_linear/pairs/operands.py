# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernel of pairs does with a block of the weight: masked bytes times bytes of tokens."""

import triton
import triton.language as tl

from quattuor.kernels.lut_linear.lanes.instructions import HELD, load_words, multiply, permute
from quattuor.kernels.w4a16_linear.pairs.fields import both_mask, byte_mask, byte_of, expands, has_part, word_of
from quattuor.kernels.w4a16_linear.pairs.sums import load_groups

__all__ = ["add_slot", "load_ahead"]


@triton.jit
def load_block(start, WORDS: tl.constexpr, PLANE_K: tl.constexpr, ASM: tl.constexpr):
    """Eight words of the rows 2 g and 2 g + 1 for each half of a plane: [word, half, row, 4 registers]."""
    found = ()
    for word in tl.static_range(WORDS):
        for half in tl.static_range(PLANE_K // 32):
            for r in tl.static_range(2):
                found += load_words(start + word * (64 * PLANE_K) + r * (PLANE_K // 2) + half * 16, HELD, ASM)
    return found


@triton.jit
def load_ahead(
    weight,
    scale,
    zero_point,
    piece,
    block,
    NUM_BLOCKS,
    N_PADDED,
    WORDS: tl.constexpr,
    PLANE_K: tl.constexpr,
    PIECES: tl.constexpr,
    STRIDE: tl.constexpr,
    PIECE_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ASM: tl.constexpr,
):
    """The words of a block, its scales and its zero points."""
    block = tl.minimum(block, NUM_BLOCKS - 1)
    words = load_block(weight + block * (WORDS * 64 * PLANE_K), WORDS, PLANE_K, ASM)
    scales = load_groups(scale, piece, block, N_PADDED, PIECES, STRIDE, PIECE_K, GROUP_SIZE)
    zeros = ()
    if HAS_ZERO:
        zeros = load_groups(zero_point, piece, block, N_PADDED, PIECES, STRIDE, PIECE_K, GROUP_SIZE)
    return words, scales, zeros


@triton.jit
def of_part(
    here,
    SLOT: tl.constexpr,
    HALF: tl.constexpr,
    PIECE: tl.constexpr,
    TWO: tl.constexpr,
    HALVES: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Four bytes of a part for both rows, from bytes apart; zeros where the slot has none."""
    if has_part(BITS, PLANES, PIECES, SLOT, PIECE):
        AT: tl.constexpr = (word_of(BITS, PLANES, PIECES, SLOT, PIECE) * HALVES + HALF) * 8 + TWO
        PLACE: tl.constexpr = AT + 2 * byte_of(BITS, PLANES, PIECES, SLOT, PIECE)
        MASK: tl.constexpr = byte_mask(BITS, PLANES, PIECES, SLOT, PIECE)
        result = here[PLACE] & MASK, here[PLACE + 4] & MASK
    else:
        result = here[0] * 0, here[0] * 0
    return result


@triton.jit
def add_slot(
    integers,
    here,
    operands,
    expand,
    SLOT: tl.constexpr,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    PIECES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Add both products of a slot for half a plane; `operands` are the bytes of the token."""
    for two in tl.static_range(2):
        if BITS == 3:
            a0, a1 = of_part(here, SLOT, HALF, 0, two, HALVES, BITS, PLANES, PIECES)
            a2, a3 = of_part(here, SLOT, HALF, 1, two, HALVES, BITS, PLANES, PIECES)
        else:
            a0 = here[HALF * 8 + 2 * two] & both_mask(BITS, PLANES, PIECES, SLOT)
            a1 = here[HALF * 8 + 4 + 2 * two] & both_mask(BITS, PLANES, PIECES, SLOT)
            a2 = here[HALF * 8 + 2 * two + 1] & both_mask(BITS, PLANES, PIECES, SLOT)
            a3 = here[HALF * 8 + 4 + 2 * two + 1] & both_mask(BITS, PLANES, PIECES, SLOT)
        if expands(BITS):
            word = operands[(SLOT * HALVES + HALF) % 2 * 2 + two]
            b0 = permute(word, word * 0, expand[0], ASM)
            b1 = permute(word, word * 0, expand[1], ASM)
        else:
            b0 = operands[2 * two]
            b1 = operands[2 * two + 1]
        integers = multiply(a0, a1, a2, a3, b0, b1, integers, False, ASM)
    return integers
