# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the operation for one token, compute capability 8.0 and later, and its launch.

A program computes 16 outputs; its warps take blocks of K in turn, and their sums are added at the end. Weights and
the token meet as bytes: masked planes or looked-up entries, and four bytes of each activation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.lanes.instructions import hold
from quattuor.kernels.lut_linear.lanes.layout import BLOCK_K, ONE_GROUP, TILE_ROWS, unit_of
from quattuor.kernels.lut_linear.lanes.limbs_kernel import limbs_of
from quattuor.kernels.lut_linear.lanes.scales import MAGIC_BITS, add_scaled, less_constants, load_scales
from quattuor.kernels.lut_linear.lanes.steps import (
    add_entries_step,
    add_planes_step,
    load_block,
    load_table,
    load_token,
    start_sums,
)
from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = ["Ahead", "ahead_of", "launch", "token_kernel"]


@triton.jit
def single_entries(x, row_offsets, columns, values, row, CHUNK: tl.constexpr):
    """The single entries of each row times the token."""
    start = tl.load(row_offsets + row)
    stop = tl.load(row_offsets + row + 1)
    total = tl.zeros(row.shape, dtype=tl.float32)
    for first in range(0, tl.max(stop - start, axis=0), CHUNK):
        place = start[:, None] + (tl.arange(0, CHUNK) + first)[None, :]
        mask = place < stop[:, None]
        k = tl.load(columns + place, mask=mask, other=0).to(tl.int32)
        value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value * tl.load(x + k, mask=mask, other=0.0).to(tl.float32), axis=1)
    return total


@triton.jit
def of_rows(totals, lane, WARPS: tl.constexpr):
    """The sums of 16 rows over the four bytes of an activation and over the warps."""
    t0, t1, t2, t3 = totals
    # columns 4 .. 7 repeat 0 .. 3
    weight = tl.where(lane % 4 == 0, 1.0, tl.where(lane % 4 == 1, 65536.0, 0.0))
    both = tl.join((t0 + 256.0 * t1) * weight, (t2 + 256.0 * t3) * weight)
    both = tl.permute(tl.reshape(both, (WARPS, 8, 4, 2)), (3, 1, 0, 2))
    return tl.reshape(tl.sum(tl.sum(both, axis=3), axis=2), (16,))


@triton.jit(do_not_specialize=["NUM_BLOCKS", "NUM_GROUPS", "ROUNDS"])
def token_kernel(
    x,
    words,
    unit,
    sums,
    packed,
    table,
    limb_scale,
    offset,
    row_offsets,
    columns,
    values,
    bias,
    out,
    N,
    N_PADDED,
    NUM_BLOCKS,
    NUM_GROUPS,
    ROUNDS,
    WARPS: tl.constexpr,
    EARLY: tl.constexpr,
    HOLDS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WAITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sixteen rows times one token; UNIT is the run of K that shares a table, 0 for whole rows.

    Sums are exact integers over a unit, or over what a warp has of a row, and float32 beyond. With HOLDS the next
    block of the weight is loaded before this one is multiplied, not after; EARLY also loads the token's bytes of
    the next block.
    """
    lanes = tl.arange(0, WARPS * 32)
    warp = lanes // 32
    lane = lanes % 32
    rows = tl.program_id(0)
    row = rows * 16 + lane // 4
    weight = packed + rows.to(tl.int64) * NUM_BLOCKS * (BITS * 128) + lane * 4
    token = words + lane % 16 * 4
    COUNT: tl.constexpr = BITS if PLANES else 2
    SCALES: tl.constexpr = BITS if PLANES else 1
    FACTOR: tl.constexpr = 1.0 / 64 if PLANES else 1.0
    following = load_block(weight + tl.minimum(warp, NUM_BLOCKS - 1) * (BITS * 128), BITS, ASM, HOLDS)
    every = rows * 16 + tl.arange(0, 16)
    constant = tl.zeros((16,), dtype=tl.float32)
    scales = ()
    entries = ()
    if not PLANES:
        entries = load_table(table, rows * NUM_GROUPS, lane // 4, ASM)
    if UNIT == 0:
        scales = load_scales(table if PLANES else limb_scale, warp * 0, row, N_PADDED, NUM_GROUPS, SCALES)
        if PLANES:
            if HAS_OFFSET:
                constant += tl.load(offset + every).to(tl.float32)
            for plane in tl.static_range(BITS):
                constant -= tl.load(table + plane * N_PADDED + every).to(tl.float32)
    last = tl.zeros((16,), dtype=tl.float32)
    if HAS_BIAS:
        last += tl.load(bias + every, mask=every < N, other=0.0).to(tl.float32)
    if HAS_SPARSE:
        last += single_entries(x, row_offsets, columns, values, every, 32)
    if WAITS:
        gdc_wait()

    if EARLY:
        next_bytes = load_token(token + warp * 256, ASM)
    integers = start_sums(lanes * 0, COUNT)
    totals = start_sums(tl.zeros(lanes.shape, dtype=tl.float32), 1)[0]
    for turn in range(ROUNDS):
        block = turn * WARPS + warp
        here = following
        start = weight + tl.minimum(block + WARPS, NUM_BLOCKS - 1) * (BITS * 128)
        following = load_block(start, BITS, ASM, HOLDS)
        if EARLY:
            bytes_of = next_bytes
            next_bytes = load_token(token + tl.minimum(block + WARPS, ROUNDS * WARPS - 1) * 256, ASM)
        if HOLDS:
            hold(ASM)
        if not EARLY:
            bytes_of = load_token(token + block * 256, ASM)
        for step in tl.static_range(8):
            if UNIT > 0:
                group = (tl.minimum(block, NUM_BLOCKS - 1) * 256 + step * 32) // GROUP_SIZE
                if step * 32 % UNIT == 0:
                    integers = start_sums(lanes * 0 + MAGIC_BITS, COUNT)
                    if not PLANES:
                        entries = load_table(table, rows * NUM_GROUPS + group, lane // 4, ASM)
            if PLANES:
                integers = add_planes_step(integers, here, bytes_of, step, BITS, ASM)
            else:
                integers = add_entries_step(integers, here, entries, bytes_of, step, BITS, ASM)
            if UNIT > 0 and (step + 1) * 32 % UNIT == 0:
                own = load_scales(table if PLANES else limb_scale, group, row, N_PADDED, NUM_GROUPS, SCALES)
                totals = add_scaled(totals, integers, own, COUNT, PLANES, True)
                if PLANES:
                    total = tl.load(sums + block * (256 // UNIT) + step * 32 // UNIT)
                    total = tl.where(lane % 4 == 0, total, 0.0)
                    totals = less_constants(totals, own, offset, group, row, total, N_PADDED, COUNT, HAS_OFFSET)
    if UNIT == 0:
        totals = add_scaled(totals, integers, scales, COUNT, PLANES, False)

    y = of_rows(totals, lane, WARPS) * (tl.load(unit) * FACTOR) + last
    if PLANES and UNIT == 0:
        y += constant * tl.load(sums)
    tl.store(out + every, y.to(out.dtype.element_ty), mask=every < N)


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a warp loads before it is needed: see `token_kernel`."""

    early: bool = False
    holds: bool = False


def ahead_of(problem: LutProblem) -> Ahead:
    """Return what to load ahead: as much as tables and scales leave registers for."""
    if problem.kind == "codebook":
        return Ahead()
    return Ahead(early=problem.group_size is None and problem.weight_bits != 3, holds=True)


def launch(
    problem: LutProblem,
    x: Tensor,
    operand: Mapping[str, Tensor],
    bias: Tensor | None,
    out: Tensor,
    *,
    num_warps: int,
    schedule: Ahead | None = None,
    interpret: bool = False,
) -> None:
    """Fill `out` [1, N]; the weight tensors are padded as `prepare_lanes` prepares them.

    `schedule` says what is loaded ahead, by default what was fastest. `interpret` replaces the inline assembly by
    arithmetic that Triton's interpreter knows.
    """
    packed, is_planes = operand["packed"], problem.kind == "planes"
    row_tiles, num_blocks = packed.shape[:2]
    unit, rounds = unit_of(problem), -(-num_blocks // num_warps)
    starts = problem.compute_capability is not None and problem.compute_capability[0] == 9
    parts = BLOCK_K // unit if unit else 0
    ahead = schedule or ahead_of(problem)
    limbs = limbs_of(x, rounds * num_warps, parts=parts, is_shifted=is_planes, starts=starts)
    table = operand["table"] if is_planes else operand["limbs"]
    launcher(token_kernel, (row_tiles,))(
        x,
        limbs.words,
        limbs.unit,
        limbs.sums,
        packed,
        table,
        operand.get("limb_scale", table),
        operand.get("offset", table),
        operand.get("row_offsets", table),
        operand.get("columns", table),
        operand.get("values", table),
        table if bias is None else bias,
        out,
        problem.out_features,
        row_tiles * TILE_ROWS,
        num_blocks,
        table.shape[1],
        rounds,
        WARPS=num_warps,
        EARLY=ahead.early,
        HOLDS=ahead.holds,
        BITS=problem.weight_bits,
        PLANES=is_planes,
        UNIT=unit,
        GROUP_SIZE=problem.group_size or ONE_GROUP,
        HAS_OFFSET=problem.offset,
        HAS_SPARSE=problem.sparse,
        HAS_BIAS=bias is not None,
        WAITS=starts,
        ASM=not interpret,
        num_warps=num_warps,
        num_stages=1,
        launch_pdl=starts,
    )
