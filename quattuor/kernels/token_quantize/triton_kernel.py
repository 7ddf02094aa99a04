# SPDX-License-Identifier: Apache-2.0
"""The operation in Triton: one program per token, bit for bit the reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["quantize_tokens"]

#: Elements that a program holds in registers at once; longer tokens are read twice.
MAX_BLOCK = 8192


@triton.jit
def absolute(x, column, K):
    """float32 magnitudes of part of a token, NaN replaced by infinity so that a maximum keeps it."""
    value = tl.abs(tl.load(x + column, mask=column < K, other=0.0).to(tl.float32))
    return tl.where(value == value, value, float("inf"))


@triton.jit
def token_quantize_kernel(x, codes, scale, K, stride_x, BLOCK: tl.constexpr):
    """Codes and scale of one token; the token is read a second time from L2 when it exceeds BLOCK."""
    token = tl.program_id(0).to(tl.int64)
    x += token * stride_x
    column = tl.arange(0, BLOCK)
    largest = absolute(x, column, K)
    for start in range(BLOCK, K, BLOCK):
        largest = tl.maximum(largest, absolute(x, start + column, K))
    absmax = tl.max(largest)
    is_finite = absmax < float("inf")
    step = tl.where(is_finite, tl.div_rn(absmax, 127.0), float("nan"))
    tl.store(scale + token, step)
    is_regular = step > 0.0  # false for zero and for NaN
    divisor = tl.where(is_regular, step, 1.0)
    for start in range(0, K, BLOCK):
        inside = start + column < K
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        ratio = tl.div_rn(value, tl.zeros_like(value) + divisor)
        ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
        # adding and subtracting 1.5 * 2^23 rounds to the nearest integer, halves to even
        rounded = (ratio + 12582912.0) - 12582912.0
        rounded = tl.where(is_regular, rounded, 0.0)
        tl.store(codes + token * K + start + column, rounded.to(tl.int8), mask=inside)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of tokens [M, K], as the reference does."""
    num_tokens, in_features = x.shape
    codes = torch.empty(num_tokens, in_features, dtype=torch.int8, device=x.device)
    scale = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return codes, scale
    if in_features == 0:
        return codes, scale.zero_()
    if x.stride(1) != 1:
        x = x.contiguous()
    block = min(MAX_BLOCK, max(128, triton.next_power_of_2(in_features)))
    token_quantize_kernel[(num_tokens,)](
        x, codes, scale, in_features, x.stride(0), BLOCK=block, num_warps=max(1, min(8, block // 512))
    )
    return codes, scale
