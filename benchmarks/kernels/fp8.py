# SPDX-License-Identifier: Apache-2.0
"""Per-token fp8 codes in one Triton kernel, so that the fp8 product of cuBLAS is not charged for slow steps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["quantize_tokens_fp8"]


@triton.jit
def quantize_kernel(x, codes, scale, K, BLOCK: tl.constexpr):
    """Codes x / s with s = max |x| / 448, the largest e4m3 number, of one token that fits one block."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(x + token * K + column, mask=column < K, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(value)), 1e-12) / 448.0
    tl.store(scale + token, step)
    tl.store(codes + token * K + column, (value / step).to(tl.float8e4nv), mask=column < K)


def quantize_tokens_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn codes and float32 scales of contiguous tokens [M, K]."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    quantize_kernel[(x.shape[0],)](
        x, codes, scale, x.shape[1], BLOCK=block, num_warps=max(4, min(16, block // 1024))
    )
    return codes, scale
