# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that writes tokens as integers of four signed bytes, in the order of lanes."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.w4a16_linear.lanes.fields import (
    FACTOR_BITS,
    INTEGER_BITS,
    exponent_of,
    num_terms,
    part_exponent,
    part_plane,
)
from quattuor.kernels.w4a16_linear.planes import Layout

__all__ = ["Integers", "integers_kernel", "integers_of", "num_pairs"]

#: Most elements of a token that a program searches at once for the largest.
MAX_SEARCH = 8192


@dataclass(frozen=True, slots=True)
class Integers:
    """Tokens as integers: `words` for the tensor cores, `unit` of a product, `middles` of each piece of a block.

    words    int32 [blocks, pairs, tiles, 32, 4] of two tokens each, [blocks, pairs, 16, 4] of a single one: for
             two products, lane 4 g + t has two words each, byte g % 4 of the integers of token g // 4 that meet
             the codes 8 t .. 8 t + 3 and 8 t + 4 .. 8 t + 7 of half a row of a plane
    unit     float32 [M], of the sums of products; NaN for a token with an element that is not finite
    middles  int32 [blocks * pieces, tiles, 8], or [blocks * pieces, 4]: for each byte of each token, what codes in
             the middle of their range would add, negated
    """

    words: Tensor
    unit: Tensor
    middles: Tensor


def num_pairs(layout: Layout) -> int:
    """Return the pairs of products of a block."""
    return -(-num_terms(layout.bits, layout.planes, layout.plane_k // 32) // 2)


@triton.jit
def integer_of(value, scale):
    """The nearest integer of value * scale, below 2^30."""
    value *= scale
    # from 2^23 on a float32 is an integer, which a half would make another
    half = tl.where(tl.abs(value) < 8388608.0, 0.5, 0.0)
    return (value + tl.where(value < 0, -half, half)).to(tl.int32)


@triton.jit
def to_bytes(integer):
    """The four signed bytes of integers: those of i + 128 (1 + 256 + 65536), less 128 each."""
    return (integer + 0x808080) ^ 0x808080


@triton.jit
def add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    """Add four sums at once: one turn through shared memory instead of four."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit(do_not_specialize=["M"])
def integers_kernel(
    x,
    words,
    unit,
    middles,
    M,
    K,
    stride_xm,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE_K: tl.constexpr,
    PIECES: tl.constexpr,
    TERMS: tl.constexpr,
    SIZE: tl.constexpr,
    INTEGER_BITS: tl.constexpr,
    FACTOR_BITS: tl.constexpr,
    SEARCH: tl.constexpr,
    STARTS: tl.constexpr,
    WAITS: tl.constexpr,
):
    """One block of one token, in two programs: its words, 32 for each of TERMS products, and its middles.

    SIZE is a power of two that holds the words.
    """
    if STARTS:
        gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    block = tl.program_id(0)
    token = tl.program_id(1)
    writes_words = tl.program_id(2) == 0
    x += token.to(tl.int64) * stride_xm
    # where the token's words, and its middles, lie among those of its neighbours
    tiles = (M + 1) // 2
    width = tl.where(M > 1, 128, 64)
    columns = tl.where(M > 1, 8 * tiles, 4)
    HALVES: tl.constexpr = PLANE_K // 32
    BLOCK_K: tl.constexpr = PLANES * PLANE_K
    ROUNDED: tl.constexpr = (TERMS + 1) // 2 * 2
    index = tl.arange(0, SIZE)
    lane = index // 4 % 16
    term = index // 64 * 2 + index % 4 // 2
    part = term // HALVES
    start = block * BLOCK_K + part_plane(part, BITS) * PLANE_K + term % HALVES * 32 + lane % 4 * 8 + index % 2 * 4
    start = tl.where((term < TERMS) & writes_words, start, K)
    v0 = tl.load(x + start, mask=start < K, other=0.0).to(tl.float32)
    v1 = tl.load(x + start + 1, mask=start + 1 < K, other=0.0).to(tl.float32)
    v2 = tl.load(x + start + 2, mask=start + 2 < K, other=0.0).to(tl.float32)
    v3 = tl.load(x + start + 3, mask=start + 3 < K, other=0.0).to(tl.float32)
    inside = tl.arange(0, BLOCK_K)
    own = tl.where(writes_words, K, block * BLOCK_K + inside)
    all_of = tl.load(x + own, mask=own < K, other=0.0).to(tl.float32)

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
    scale = ((INTEGER_BITS - 1 + 254 - exponent) << 23).to(tl.float32, bitcast=True)
    if writes_words:
        if block == 0:
            tl.store(unit + token, tl.where(is_finite, (1.0 / (1 << FACTOR_BITS)) / scale, float("nan")))
        four = (v0, v1, v2, v3)
        shift = part_exponent(part, BITS)
        result = tl.zeros((SIZE,), dtype=tl.int32)
        for place in tl.static_range(4):
            integer = to_bytes(integer_of(four[place], scale) << shift)
            result |= ((integer >> (lane // 4 * 8)) & 255) << (8 * place)
        pair = (block * (ROUNDED // 2) + index // 64) * tiles + token // 2
        tl.store(words + pair * width + token % 2 * 64 + index % 64, result, mask=term < ROUNDED)
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
        where = middles + (block * PIECES + tl.arange(0, PIECES)) * columns + token * 4
        tl.store(where, -d0)
        tl.store(where + 1, -d1)
        tl.store(where + 2, -d2)
        tl.store(where + 3, -d3)


def integers_of(x: Tensor, num_blocks: int, layout: Layout, *, pieces: int, overlap: str) -> Integers:
    """Return the integers of tokens x [M, K], zero beyond K.

    Args:
        x: Floating point, rows contiguous.
        num_blocks: Blocks to write.
        layout: Of the weight.
        pieces: Parts of a block with middles of their own.
        overlap: Of the product, which starts at once but with "none" and has to wait before it reads.
    """
    num_tokens, in_features = x.shape
    pairs = num_pairs(layout)
    # a single token fills half a tile, which the other half repeats
    lanes = 16 if num_tokens == 1 else 32 * -(-num_tokens // 2)
    words = torch.empty(num_blocks * pairs * lanes * 4, dtype=torch.int32, device=x.device)
    unit = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    middles = torch.empty(num_blocks * pieces * lanes // 4, dtype=torch.int32, device=x.device)
    launcher(integers_kernel, (num_blocks, num_tokens, 2))(
        x,
        words,
        unit,
        middles,
        num_tokens,
        in_features,
        x.stride(0),
        BITS=layout.bits,
        PLANES=layout.planes,
        PLANE_K=layout.plane_k,
        PIECES=pieces,
        TERMS=num_terms(layout.bits, layout.planes, layout.plane_k // 32),
        SIZE=triton.next_power_of_2(pairs * 64),
        INTEGER_BITS=INTEGER_BITS[layout.bits],
        FACTOR_BITS=FACTOR_BITS[layout.bits],
        SEARCH=min(MAX_SEARCH, triton.next_power_of_2(in_features)),
        STARTS=overlap != "none",
        WAITS=overlap in ("early", "late"),
        num_warps=8,
        launch_pdl=overlap in ("early", "late"),
    )
    return Integers(words, unit, middles)
