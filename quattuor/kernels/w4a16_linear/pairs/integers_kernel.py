# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that writes a token as integers of four signed bytes, in the order of lanes and for pairs."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.w4a16_linear.lanes.fields import FACTOR_BITS, INTEGER_BITS, exponent_of
from quattuor.kernels.w4a16_linear.lanes.integers_kernel import (
    MAX_SEARCH,
    Integers,
    add_four,
    integer_of,
    to_bytes,
)
from quattuor.kernels.w4a16_linear.lanes.sums import MAGIC_BITS, MAGIC_K
from quattuor.kernels.w4a16_linear.pairs.fields import expands, first_slot, slot_code
from quattuor.kernels.w4a16_linear.planes import Layout

__all__ = ["WORDS_OF_PROGRAM", "integers_kernel", "integers_of", "is_magic", "num_slots", "num_steps"]

#: Words that a program writes.
WORDS_OF_PROGRAM = 512


def num_slots(layout: Layout, pieces: int) -> int:
    """Return the slots of a block."""
    return int(first_slot(layout.bits, layout.planes, pieces, pieces // 2))


def num_steps(layout: Layout, pieces: int) -> int:
    """Return how often a block loads words of the token: for four products each, or for two with zeros."""
    return -(-num_slots(layout, pieces) * layout.plane_k // (64 if expands(layout.bits) else 32))


def is_magic(layout: Layout, pieces: int) -> bool:
    """Return whether the sums of a piece begin at `MAGIC_BITS`."""
    return layout.block_k // pieces <= MAGIC_K.value


@triton.jit
def scale_of(x, K, BITS: tl.constexpr, SEARCH: tl.constexpr):
    """The power of two that makes a token integers of BITS bits, and whether it is finite."""
    largest = tl.zeros((SEARCH,), dtype=tl.int32)
    for first in range(0, K, SEARCH):
        k = first + tl.arange(0, SEARCH)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        # as an integer, a number that is not finite is above all others
        largest = tl.maximum(largest, tl.abs(value).to(tl.int32, bitcast=True))
    exponent = tl.max(largest, axis=0) >> 23
    is_finite = exponent < 255
    # neither the power of two nor its inverse leaves the normal numbers
    exponent = tl.minimum(tl.maximum(exponent, 40), 254)
    return ((BITS - 1 + 254 - exponent) << 23).to(tl.float32, bitcast=True), is_finite


@triton.jit
def load_two(x, start, has, K):
    """Two neighbouring elements, zero beyond K and where there are none."""
    first = tl.load(x + start, mask=has & (start < K), other=0.0).to(tl.float32)
    return first, tl.load(x + start + 1, mask=has & (start + 1 < K), other=0.0).to(tl.float32)


@triton.jit
def integers_kernel(
    x,
    words,
    unit,
    middles,
    K,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_K: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    STEPS: tl.constexpr,
    WRITERS: tl.constexpr,
    SIZE: tl.constexpr,
    INTEGER_BITS: tl.constexpr,
    FACTOR_BITS: tl.constexpr,
    START: tl.constexpr,
    SEARCH: tl.constexpr,
    STARTS: tl.constexpr,
    WAITS: tl.constexpr,
):
    """One block: its words in WRITERS programs of SIZE each, its middles, from START, in another."""
    if STARTS:
        gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    block = tl.program_id(0)
    writer = tl.program_id(1)
    HALVES: tl.constexpr = PLANE_K // 32
    BLOCK_K: tl.constexpr = PLANES * PLANE_K
    PAIRS: tl.constexpr = PIECES // 2
    # product and lane: a slot has two products for each half of a plane
    index = writer * SIZE + tl.arange(0, SIZE)
    EXPANDS: tl.constexpr = expands(BITS)
    product = index // 128 * 4 + index % 4 if EXPANDS else index // 128 * 2 + index % 4 // 2
    slot = product // (2 * HALVES)
    lane = index // 4 % 32
    code = tl.full((SIZE,), -1, dtype=tl.int32)
    for own_slot in tl.static_range(SLOTS):
        for own_half in tl.static_range(2):
            is_own = (slot == own_slot) & (lane // 16 == own_half)
            code = tl.where(is_own, slot_code(BITS, PLANES, PIECES, own_slot, own_half), code)
    writes_words = writer < WRITERS
    start = block * BLOCK_K + (code & 15) * PLANE_K + product // 2 % HALVES * 32 + lane % 4 * 8 + product % 2 * 4
    has = writes_words & (code >= 0)
    if not EXPANDS:
        start += index % 2 * 2
    v0, v1 = load_two(x, start, has, K)
    v2, v3 = load_two(x, start + 2, has & EXPANDS, K)
    inside = tl.arange(0, BLOCK_K)
    own = tl.where(writes_words, K, block * BLOCK_K + inside)
    all_of = tl.load(x + own, mask=own < K, other=0.0).to(tl.float32)
    scale, is_finite = scale_of(x, K, INTEGER_BITS, SEARCH)
    if writes_words:
        if (block == 0) & (writer == 0):
            tl.store(unit, tl.where(is_finite, (1.0 / (1 << FACTOR_BITS)) / scale, float("nan")))
        four = (v0, v1, v2, v3)
        result = tl.zeros((SIZE,), dtype=tl.int32)
        for byte in tl.static_range(4 if EXPANDS else 2):
            integer = to_bytes(integer_of(four[byte], scale) << (code >> 4 & 15))
            digit = (integer >> (lane // 4 % 4 * 8)) & 255
            # else two elements, at the bytes 0 and 2 for one piece of a pair and 1 and 3 for the other
            result |= digit << (8 * byte if EXPANDS else 16 * byte + lane // 16 * 8)
        tl.store(words + block * (STEPS * 128) + index, result, mask=index < STEPS * 128)
    else:
        own_shift = exponent_of(inside // PLANE_K, BITS)
        number = to_bytes(integer_of(all_of, scale) << own_shift)
        middle = (1 << (BITS - 1 + FACTOR_BITS)) >> own_shift
        SHAPE: tl.constexpr = (PIECES, BLOCK_K // PIECES)
        d0 = tl.reshape(((number << 24) >> 24) * middle, SHAPE)
        d1 = tl.reshape(((number << 16) >> 24) * middle, SHAPE)
        d2 = tl.reshape(((number << 8) >> 24) * middle, SHAPE)
        d3 = tl.reshape((number >> 24) * middle, SHAPE)
        d0, d1, d2, d3 = tl.reduce((d0, d1, d2, d3), 1, add_four)
        piece = tl.arange(0, PIECES)
        pair = piece // 2 if BITS == 3 else piece % PAIRS
        half = piece % 2 if BITS == 3 else piece // PAIRS
        where = middles + (block * PAIRS + pair) * 16 + half * 8
        for again in tl.static_range(2):
            tl.store(where + 2 * again, START - d0)
            tl.store(where + 2 * again + 1, START - d1)
            tl.store(where + 2 * again + 4, START - d2)
            tl.store(where + 2 * again + 5, START - d3)


def integers_of(x: Tensor, num_blocks: int, layout: Layout, *, pieces: int, overlap: str) -> Integers:
    """Return the integers of one token x [1, K], zero beyond K.

    The words are int32 [blocks, steps, 32, 4]: for each of four products, lane 4 g + t has the bytes g % 4 of the
    integers that meet its codes of piece g // 4 of a pair; for each of two products where no lane `expands` them,
    with a zero for each code of the other piece. The middles are int32 [blocks, pairs, 4, 4]: those of
    the columns 2 t and 2 t + 1 of a product, twice each, above what sums begin at.

    Args:
        x: Floating point.
        num_blocks: Blocks to write.
        layout: Of the weight.
        pieces: Parts of a block with sums of their own.
        overlap: Of the product, which starts at once but with "none" and has to wait before it reads.
    """
    steps = num_steps(layout, pieces)
    words = torch.empty(num_blocks * steps * 128, dtype=torch.int32, device=x.device)
    unit = torch.empty(1, dtype=torch.float32, device=x.device)
    middles = torch.empty(num_blocks * pieces * 8, dtype=torch.int32, device=x.device)
    writers = triton.cdiv(steps * 128, WORDS_OF_PROGRAM)
    launcher(integers_kernel, (num_blocks, writers + 1))(
        x,
        words,
        unit,
        middles,
        x.shape[1],
        BITS=layout.bits,
        PLANES=layout.planes,
        PLANE_K=layout.plane_k,
        PIECES=pieces,
        SLOTS=num_slots(layout, pieces),
        STEPS=steps,
        WRITERS=writers,
        SIZE=WORDS_OF_PROGRAM,
        INTEGER_BITS=INTEGER_BITS[layout.bits],
        FACTOR_BITS=FACTOR_BITS[layout.bits],
        START=MAGIC_BITS.value if is_magic(layout, pieces) else 0,
        SEARCH=min(MAX_SEARCH, triton.next_power_of_2(x.shape[1])),
        STARTS=overlap != "none",
        WAITS=overlap in ("early", "late"),
        num_warps=8,
        launch_pdl=overlap in ("early", "late"),
    )
    return Integers(words, unit, middles)
