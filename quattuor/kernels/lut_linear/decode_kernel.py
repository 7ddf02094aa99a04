# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that decode rows of a weight with a byte for each code, and add single entries to rows."""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = ["add_entries", "add_entries_kernel", "decode_kernel", "decode_rows"]

#: Weights of one program of the decoder, and single entries that a program adds at once.
BLOCK = 1024
CHUNK = 128


@triton.jit(do_not_specialize=["first_row"])
def decode_kernel(
    codes,
    table,
    offset,
    out,
    first_row,
    K,
    NUM_GROUPS,
    GROUP_SIZE,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode a block of one row; row `first_row` goes to row 0 of `out`."""
    place = tl.program_id(0).to(tl.int64)
    row = first_row + place
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + row * K + k, mask=k < K, other=0).to(tl.int32)
    group = row * NUM_GROUPS + tl.minimum(k, K - 1) // GROUP_SIZE
    if PLANES:
        value = tl.zeros((BLOCK,), dtype=tl.float32)
        for plane in tl.static_range(BITS):
            value += (((code >> plane) & 1) * 2 - 1) * tl.load(table + group * BITS + plane).to(tl.float32)
        if HAS_OFFSET:
            value += tl.load(offset + group).to(tl.float32)
    else:
        value = tl.load(table + group * (2**BITS) + code)
    tl.store(out + place * K + k, value.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def add_entries_kernel(row_offsets, columns, values, out, K, CHUNK: tl.constexpr):
    """Add the single entries of one row to a dense row; their columns differ, so that no sum is lost."""
    row = tl.program_id(0)
    start = tl.load(row_offsets + row)
    stop = tl.load(row_offsets + row + 1)
    for first in range(start, stop, CHUNK):
        place = first + tl.arange(0, CHUNK)
        mask = place < stop
        where = out + row.to(tl.int64) * K + tl.load(columns + place, mask=mask, other=0).to(tl.int32)
        total = tl.load(where, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(where, total.to(out.dtype.element_ty), mask=mask)


def add_entries(operand: Mapping[str, Tensor], first_row: int, out: Tensor) -> None:
    """Add the single entries of the rows from `first_row` on to `out` [rows, K], where the weight has any."""
    if "values" in operand:
        row_offsets = operand["row_offsets"][first_row:]
        launcher(add_entries_kernel, (len(out),))(
            row_offsets, operand["columns"], operand["values"], out, out.shape[1], CHUNK=CHUNK, num_warps=1
        )


def decode_rows(problem: LutProblem, operand: Mapping[str, Tensor], first_row: int, out: Tensor) -> None:
    """Fill `out` [rows, K] with the weight from `first_row` on, single entries included, rounded to its dtype."""
    table, in_features = operand["table"], problem.in_features
    launcher(decode_kernel, (len(out), triton.cdiv(in_features, BLOCK)))(
        operand["codes"],
        table,
        operand.get("offset", table),
        out,
        first_row,
        in_features,
        problem.num_groups,
        problem.group_size or in_features,
        BITS=problem.weight_bits,
        PLANES=problem.kind == "planes",
        HAS_OFFSET=problem.offset,
        BLOCK=BLOCK,
        num_warps=4,
    )
    add_entries(operand, first_row, out)
