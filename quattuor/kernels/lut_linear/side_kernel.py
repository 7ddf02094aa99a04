# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels that run before the products: sums of tokens, single entries, and constants of rows."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from quattuor.kernels.launch import launcher
from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = ["has_constant", "side_kernel", "side_of", "sums_kernel", "sums_of"]

#: Rows of a program beside the products, and single entries of a row that it adds at once.
SIDE_ROWS = 32
SIDE_CHUNK = 32


@triton.jit
def sums_kernel(x, sums, M, K, stride_xm, UNIT, BLOCK: tl.constexpr):
    """sums[u, m] = sum of the tokens' elements of unit u of K, in float32."""
    unit = tl.program_id(0)
    token = tl.program_id(1)
    inside = tl.arange(0, BLOCK)
    k = unit * UNIT + inside
    mask = (inside < UNIT) & (k < K)
    values = tl.load(x + token.to(tl.int64) * stride_xm + k, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + unit.to(tl.int64) * M + token, tl.sum(values, axis=0))


@triton.jit
def side_kernel(
    x,
    table,
    offset,
    row_offsets,
    columns,
    values,
    side,
    N,
    K,
    stride_xm,
    N_PADDED,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SPARSE: tl.constexpr,
    STARTS: tl.constexpr,
):
    """side[m, n] = single entries times token m, plus the constant of row n times the sum of the token."""
    if STARTS:
        gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = x + tl.program_id(1).to(tl.int64) * stride_xm
    total = tl.zeros((ROWS,), dtype=tl.float32)
    if HAS_SPARSE:
        start = tl.load(row_offsets + row, mask=row < N, other=0)
        stop = tl.load(row_offsets + row + 1, mask=row < N, other=0)
        for first in range(0, tl.max(stop - start, axis=0), CHUNK):
            place = start[:, None] + (tl.arange(0, CHUNK) + first)[None, :]
            mask = place < stop[:, None]
            k = tl.load(columns + place, mask=mask, other=0).to(tl.int32)
            value = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(value * tl.load(tokens + k, mask=mask, other=0.0).to(tl.float32), axis=1)
    if HAS_SUM:
        constant = tl.zeros((ROWS,), dtype=tl.float32)
        if MASKED:
            for plane in tl.static_range(BITS):
                constant -= tl.load(table + plane * N_PADDED + row).to(tl.float32)
        if HAS_OFFSET:
            constant += tl.load(offset + row).to(tl.float32)
        sums = tl.zeros((4096,), dtype=tl.float32)
        for first in range(0, K, 4096):
            k = first + tl.arange(0, 4096)
            sums += tl.load(tokens + k, mask=k < K, other=0.0).to(tl.float32)
        total += constant * tl.sum(sums, axis=0)
    tl.store(side + tl.program_id(1).to(tl.int64) * N_PADDED + row, total)


def sums_of(x: Tensor, num_units: int, unit: int) -> Tensor:
    """Return the float32 sums [units, M] of the tokens over each unit of K."""
    num_tokens, in_features = x.shape
    sums = torch.empty(num_units, num_tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(unit)
    launcher(sums_kernel, (num_units, num_tokens))(
        x, sums, num_tokens, in_features, x.stride(0), unit, BLOCK=block, num_warps=1
    )
    return sums


def side_of(
    problem: LutProblem, x: Tensor, operand: Mapping[str, Tensor], padded_rows: int, is_masked: bool, starts: bool
) -> Tensor:
    """Return float32 [M, N']: what the products of the codes lack, by a kernel that lets the next one start."""
    num_tokens, in_features = x.shape
    table = operand["table"]
    side = torch.empty(num_tokens, padded_rows, dtype=torch.float32, device=x.device)
    launcher(side_kernel, (padded_rows // SIDE_ROWS, num_tokens))(
        x,
        table,
        operand.get("offset", table),
        operand.get("row_offsets", table),
        operand.get("columns", table),
        operand.get("values", table),
        side,
        padded_rows,
        in_features,
        x.stride(0),
        padded_rows,
        ROWS=SIDE_ROWS,
        CHUNK=SIDE_CHUNK,
        BITS=problem.weight_bits,
        HAS_SUM=has_constant(problem, is_masked) and problem.group_size is None,
        HAS_OFFSET="offset" in operand,
        MASKED=is_masked,
        HAS_SPARSE="values" in operand,
        STARTS=starts,
        num_warps=4,
    )
    return side


def has_constant(problem: LutProblem, is_masked: bool) -> bool:
    """Return whether every input of a group has a share that does not depend on its code."""
    return problem.kind == "planes" and (is_masked or problem.offset)
