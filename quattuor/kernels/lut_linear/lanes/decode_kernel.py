# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that decodes some rows of a weight in the order of lanes into a dense one, and its launch."""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.decode_kernel import add_entries
from quattuor.kernels.lut_linear.lanes.instructions import ONCE, load_words, permute, selectors, shift_right
from quattuor.kernels.lut_linear.lanes.layout import ONE_GROUP, TILE_ROWS
from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = ["decode_kernel", "decode_rows"]

#: Warps of a decoding program, a block of 256 elements of K each.
WARPS = 4


@triton.jit
def sum_of_planes(words, base, scales, shift: tl.constexpr, first: tl.constexpr, BITS: tl.constexpr):
    """base plus the scales of one bit of each plane with their signs."""
    for plane in tl.static_range(BITS):
        sign = (words[4 * plane + first] << (31 - shift)) & -0x80000000
        base += (sign ^ scales[plane]).to(tl.float32, bitcast=True)
    return base


@triton.jit
def as_entries(pair):
    """The two float16 numbers of a word."""
    low = pair.to(tl.int16).to(tl.float16, bitcast=True)
    return low, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def looked_up(selector, table, BITS: tl.constexpr, ASM: tl.constexpr):
    """The float16 entries of four codes in the low nibbles of `selector`."""
    t0, t1, t2, t3, t4, t5, t6, t7 = table
    code = selector & 0x77777777 if BITS == 4 else selector
    low = permute(t0, t1, code, ASM)
    high = permute(t4, t5, code, ASM)
    if BITS == 4:
        which = ((selector >> 1) & 0x44444444) | 0x32103210
        low = permute(low, permute(t2, t3, code, ASM), which, ASM)
        high = permute(high, permute(t6, t7, code, ASM), which, ASM)
    e0, e1 = as_entries(permute(low, high, selector * 0 + 0x5140, ASM))
    e2, e3 = as_entries(permute(low, high, selector * 0 + 0x7362, ASM))
    return e0, e1, e2, e3


@triton.jit
def load_numbers(table, group, row, N_PADDED, NUM_GROUPS, COUNT: tl.constexpr, IS_ROWS: tl.constexpr):
    """The scales of a row's planes, negated, as bits; or its eight registers of entries."""
    numbers = ()
    for index in tl.static_range(COUNT):
        if IS_ROWS:
            numbers += (tl.load(table + (group * COUNT + index).to(tl.int64) * N_PADDED + row),)
        else:
            scale = tl.load(table + (index * NUM_GROUPS + group).to(tl.int64) * N_PADDED + row).to(tl.float32)
            numbers += ((-scale).to(tl.int32, bitcast=True),)
    return numbers


@triton.jit(do_not_specialize=["first_tile", "NUM_BLOCKS", "NUM_GROUPS"])
def decode_kernel(
    packed,
    table,
    offset,
    out,
    first_tile,
    N,
    K,
    N_PADDED,
    NUM_BLOCKS,
    NUM_GROUPS,
    WARPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    ASM: tl.constexpr,
):
    """Decode a tile of 16 rows over one block of K for each warp; N is the number of rows of `out`."""
    lanes = tl.arange(0, WARPS * 32)
    lane = lanes % 32
    tile = tl.program_id(0)
    block = tl.program_id(1) * WARPS + lanes // 32
    is_real = block < NUM_BLOCKS
    block = tl.minimum(block, NUM_BLOCKS - 1)
    weight = packed + ((first_tile + tile).to(tl.int64) * NUM_BLOCKS + block) * (BITS * 128) + lane * 4
    words = ()
    for load in tl.static_range(BITS):
        words += load_words(weight + load * 128, ONCE, ASM)
    for r in tl.static_range(2):
        place = tile * 16 + lane // 4 + 8 * r
        row = first_tile * 16 + place
        for half in tl.static_range(16):
            first = block * 256 + half * 16 + lane % 4 * 4
            group = first // GROUP_SIZE
            if half == 0 or GROUP_SIZE < 256:
                base = tl.zeros(lanes.shape, dtype=tl.float32)
                if PLANES:
                    numbers = load_numbers(table, group, row, N_PADDED, NUM_GROUPS, BITS, False)
                else:
                    numbers = load_numbers(table, group, row, N_PADDED, NUM_GROUPS, 8, True)
                if HAS_OFFSET:
                    base += tl.load(offset + group.to(tl.int64) * N_PADDED + row).to(tl.float32)
            if PLANES:
                e0 = sum_of_planes(words, base, numbers, half // 2, half % 2 * 2 + r, BITS)
                e1 = sum_of_planes(words, base, numbers, 8 + half // 2, half % 2 * 2 + r, BITS)
                e2 = sum_of_planes(words, base, numbers, 16 + half // 2, half % 2 * 2 + r, BITS)
                e3 = sum_of_planes(words, base, numbers, 24 + half // 2, half % 2 * 2 + r, BITS)
            else:
                selector = selectors(words, half // 2, r, BITS)
                if half % 2 == 1:
                    selector = shift_right(selector, 16)
                e0, e1, e2, e3 = looked_up(selector, numbers, BITS, ASM)
            value = tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), (WARPS * 32, 4))
            k = first[:, None] + tl.arange(0, 4)[None, :]
            mask = (is_real & (place < N))[:, None] & (k < K)
            tl.store(out + place[:, None].to(tl.int64) * K + k, value.to(out.dtype.element_ty), mask=mask)


def decode_rows(
    problem: LutProblem, operand: Mapping[str, Tensor], first_row: int, out: Tensor, *, interpret: bool = False
) -> None:
    """Fill `out` [rows, K] with the weight from `first_row` on, a multiple of 16, single entries included."""
    packed, table, is_planes = operand["packed"], operand["table"], problem.kind == "planes"
    row_tiles, num_blocks = packed.shape[:2]
    group_size = problem.group_size or ONE_GROUP
    launcher(decode_kernel, (triton.cdiv(len(out), TILE_ROWS), triton.cdiv(num_blocks, WARPS)))(
        packed,
        table,
        operand.get("offset", table),
        out,
        first_row // TILE_ROWS,
        len(out),
        problem.in_features,
        row_tiles * TILE_ROWS,
        num_blocks,
        table.shape[1] if is_planes else table.shape[0],
        WARPS=WARPS,
        GROUP_SIZE=group_size,
        BITS=problem.weight_bits,
        PLANES=is_planes,
        HAS_OFFSET="offset" in operand,
        ASM=not interpret,
        num_warps=WARPS,
    )
    add_entries(operand, first_row, out)
