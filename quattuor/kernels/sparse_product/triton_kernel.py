# SPDX-License-Identifier: Apache-2.0
"""The operation in Triton: one row of entries and some tokens for each program, summed in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quattuor.kernels.launch import launcher

__all__ = ["multiply", "tile_of"]

#: Tokens up to which a program reads x as it is; with more, neighbouring tokens have to be neighbours in memory.
FEW_TOKENS = 8
MAX_TOKENS = 128


@triton.jit
def sparse_product_kernel(
    x, row_offsets, columns, values, out, M, stride_m, stride_k, stride_out_m, stride_out_n,
    ENTRIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    first, last = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    lane = tl.arange(0, ENTRIES)
    at_token = x + token[None, :].to(tl.int64) * stride_m
    sums = tl.zeros((ENTRIES, TOKENS), tl.float32)
    for start in range(first, last, ENTRIES):
        entry = start + lane
        is_entry = entry < last
        column = tl.load(columns + entry, mask=is_entry, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=is_entry, other=0.0).to(tl.float32)
        is_wanted = is_entry[:, None] & (token < M)[None, :]
        inputs = tl.load(at_token + column[:, None] * stride_k, mask=is_wanted, other=0.0)
        sums += value[:, None] * inputs.to(tl.float32)
    at_out = out + token.to(tl.int64) * stride_out_m + row.to(tl.int64) * stride_out_n
    tl.store(at_out, tl.sum(sums, axis=0), mask=token < M)


def tile_of(num_tokens: int) -> tuple[int, int]:
    """Return entries and tokens that a program takes at a time."""
    tokens = min(MAX_TOKENS, max(1, triton.next_power_of_2(num_tokens)))
    return (32 if num_tokens <= FEW_TOKENS else 4), tokens


def multiply(x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return x [M, K] times the entries in compressed rows, transposed: float32 [M, N]."""
    num_tokens, num_rows = x.shape[0], row_offsets.numel() - 1
    entries, tokens = tile_of(num_tokens)
    if num_tokens <= FEW_TOKENS:
        out = torch.empty(num_tokens, num_rows, dtype=torch.float32, device=x.device)
    else:
        x = x.T.contiguous().T
        out = torch.empty(num_rows, num_tokens, dtype=torch.float32, device=x.device).T
    if out.numel() == 0:
        return out
    launcher(sparse_product_kernel, (num_rows, triton.cdiv(num_tokens, tokens), 1))(
        x, row_offsets, columns, values, out, num_tokens, *x.stride(), *out.stride(),
        ENTRIES=entries, TOKENS=tokens, num_warps=1 if tokens <= 32 else 4,
    )  # fmt: skip
    return out.contiguous()
