# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that writes tokens as four signed bytes for each element."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher

__all__ = ["DIGITS", "Digits", "digits_kernel", "digits_of"]

#: Bytes of an element.
DIGITS = 4
#: Bits of the integers without their sign; four signed bytes hold a little more.
BITS = tl.constexpr(30)
#: Elements that a program writes, and elements that it searches at once for the largest.
BLOCK = 1024
SEARCH = 4096


@dataclass(frozen=True, slots=True)
class Digits:
    """Tokens as integers below 2^30: `digits` of an element, `unit` of a token, `sums` of its elements.

    digits  int8 [M * 4, K'], least first
    unit    float32 [M]; NaN for a token with an element that is not finite
    sums    float32 [K' / L, M, 2], in units, of the two lower digits and of the two upper ones; L elements each
    """

    digits: Tensor
    unit: Tensor
    sums: Tensor


@triton.jit
def digits_kernel(
    x,
    digits,
    unit,
    sums,
    K,
    K_PADDED,
    stride_xm,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    STARTS: tl.constexpr,
    WAITS: tl.constexpr,
):
    """BLOCK elements of one token; LENGTH is that of a sum, 0 for the sum of the token, and less for none."""
    if STARTS:
        gdc_launch_dependents()
    if WAITS:
        gdc_wait()
    block = tl.program_id(0)
    token = tl.program_id(1)
    x += token.to(tl.int64) * stride_xm
    largest = tl.zeros((SEARCH,), dtype=tl.int32)
    total = tl.zeros((SEARCH,), dtype=tl.float32)
    for first in range(0, K, SEARCH):
        k = first + tl.arange(0, SEARCH)
        value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        # as an integer, a number that is not finite is above all others
        largest = tl.maximum(largest, tl.abs(value).to(tl.int32, bitcast=True))
        if LENGTH == 0:
            total += value
    exponent = tl.max(largest, axis=0) >> 23
    is_finite = exponent < 255
    # neither the power of two nor its inverse leaves the normal numbers
    exponent = tl.minimum(tl.maximum(exponent, BITS), 254)
    scale = ((-exponent + (BITS + 253)) << 23).to(tl.float32, bitcast=True)
    if block == 0:
        tl.store(unit + token, tl.where(is_finite, 1.0 / scale, float("nan")))
        if LENGTH == 0:
            tl.store(sums + 2 * token, 0.0)
            tl.store(sums + 2 * token + 1, tl.sum(total, axis=0) * (scale / 65536.0))
    k = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32) * scale
    # from 2^23 on a float32 is an integer, which a half would make another
    half = tl.where(tl.abs(value) < 8388608.0, 0.5, 0.0)
    integer = (value + tl.where(value < 0, -half, half)).to(tl.int32)
    # bytes of i + 128 (1 + 256 + 65536), less 128 each, are signed digits of i
    integer = (integer + 0x808080) ^ 0x808080
    where = digits + (token * 4).to(tl.int64) * K_PADDED + k
    for digit in tl.static_range(4):
        tl.store(where + digit * K_PADDED, (integer >> (8 * digit)).to(tl.int8), mask=k < K_PADDED)
    if LENGTH > 0:
        part = block * (BLOCK // LENGTH) + tl.arange(0, BLOCK // LENGTH)
        where = sums + (part * tl.num_programs(1) + token) * 2
        mask = part * LENGTH < K_PADDED
        # the two digits of each half, put together
        low = ((integer << 24) >> 24) + ((integer << 16) >> 24) * 256
        high = ((integer << 8) >> 24) + (integer >> 24) * 256
        tl.store(where, tl.sum(tl.reshape(low, (BLOCK // LENGTH, LENGTH)), axis=1).to(tl.float32), mask=mask)
        tl.store(where + 1, tl.sum(tl.reshape(high, (BLOCK // LENGTH, LENGTH)), axis=1).to(tl.float32), mask=mask)


def digits_of(x: Tensor, padded_features: int, length: int | None, *, overlap: str) -> Digits:
    """Return the integers of the tokens x [M, K], zero beyond K.

    Args:
        x: Floating point, rows contiguous.
        padded_features: K', a multiple of 16.
        length: Elements of a sum, a power of two up to 1024; 0 for the sum of a token, None for no sums.
        overlap: Of the product, which starts at once but with "none" and has to wait before it reads.
    """
    num_tokens, in_features = x.shape
    digits = torch.empty(num_tokens * DIGITS, padded_features, dtype=torch.int8, device=x.device)
    unit = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    num_sums = triton.cdiv(padded_features, length) if length else 1
    sums = torch.empty(num_sums, num_tokens, 2, dtype=torch.float32, device=x.device)
    launcher(digits_kernel, (triton.cdiv(padded_features, BLOCK), num_tokens))(
        x,
        digits,
        unit,
        sums,
        in_features,
        padded_features,
        x.stride(0),
        LENGTH=-1 if length is None else length,
        BLOCK=BLOCK,
        SEARCH=SEARCH,
        STARTS=overlap != "none",
        WAITS=overlap in ("early", "late"),
        num_warps=8,
        launch_pdl=overlap in ("early", "late"),
    )
    return Digits(digits, unit, sums)
