# SPDX-License-Identifier: Apache-2.0
"""The operations in Triton: one program per token. Plain quantization gives the bits of the reference."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher

__all__ = ["quantize_tokens", "rms_norm_quantize_tokens", "silu_mul_quantize_tokens"]

#: Elements that a program holds in registers at once; longer tokens are walked in several steps.
MAX_BLOCK = 16384
#: The same for gated tokens, whose exact divisions take more registers.
MAX_GATED_BLOCK = 8192


@triton.jit
def join_chain(OVERLAP: tl.constexpr):
    """Let the next kernel start, then wait for the data of the one before."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def load_row(pointer, column, K):
    """Part of a token in float32, zero beyond its end."""
    return tl.load(pointer + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def magnitude(value):
    """Absolute values, NaN replaced by infinity so that a maximum keeps it."""
    return tl.where(value == value, tl.abs(value), float("inf"))


@triton.jit
def step_size(absmax):
    """absmax / 127, NaN when a token is not finite."""
    return tl.where(absmax < float("inf"), tl.div_rn(absmax, 127.0), float("nan"))


@triton.jit
def round_codes(value, step):
    """clamp(rne(value / step), -127, 127); zero where the step is zero or NaN."""
    is_regular = step > 0.0
    divisor = tl.zeros_like(value) + tl.where(is_regular, step, 1.0)
    ratio = tl.minimum(tl.maximum(tl.div_rn(value, divisor), -127.0), 127.0)
    # adding and subtracting 1.5 * 2^23 rounds to the nearest integer, halves to even
    rounded = (ratio + 12582912.0) - 12582912.0
    return tl.where(is_regular, rounded, 0.0).to(tl.int8)


@triton.jit
def token_quantize_kernel(
    x, codes, scale, K, stride_x, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr, OVERLAP: tl.constexpr
):
    """Codes and scale of one token; IS_WHOLE when a block holds it, which is then read once."""
    join_chain(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    x += token * stride_x
    column = tl.arange(0, BLOCK)
    value = load_row(x, column, K)
    largest = magnitude(value)
    for start in range(BLOCK, K, BLOCK):
        largest = tl.maximum(largest, magnitude(load_row(x, start + column, K)))
    step = step_size(tl.max(largest))
    tl.store(scale + token, step)
    tl.store(codes + token * K + column, round_codes(value, step), mask=column < K)
    if not IS_WHOLE:
        for start in range(BLOCK, K, BLOCK):
            at = start + column
            tl.store(codes + token * K + at, round_codes(load_row(x, at, K), step), mask=at < K)


@triton.jit
def scaled(value, weight, column, inverse, K, dtype: tl.constexpr):
    """value * inverse * weight, in this order, each product rounded to the dtype of the tokens."""
    normalized = (value * inverse).to(dtype).to(tl.float32)
    return (normalized * load_row(weight, column, K)).to(dtype).to(tl.float32)


@triton.jit
def normalized(hidden, weight, column, inverse, K):
    """Part of a normalized token, read back."""
    return scaled(load_row(hidden, column, K), weight, column, inverse, K, hidden.dtype.element_ty)


@triton.jit
def add_residual(x, residual, hidden, column, K, HAS_RESIDUAL: tl.constexpr):
    """Part of x + residual, rounded to the dtype of `hidden` and stored there; returned in float32."""
    value = load_row(x, column, K)
    if HAS_RESIDUAL:
        value += load_row(residual, column, K)
    rounded = value.to(hidden.dtype.element_ty)
    tl.store(hidden + column, rounded, mask=column < K)
    return rounded.to(tl.float32)


@triton.jit
def rms_norm_quantize_kernel(
    x,
    residual,
    weight,
    hidden,
    codes,
    scale,
    K,
    stride_x,
    stride_residual,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Residual sum, codes and scale of one normalized token; each thread re-reads only what it wrote.

    IS_WHOLE when a block holds the token, which then stays in registers.
    """
    join_chain(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    x += token * stride_x
    residual += token * stride_residual
    hidden += token * K
    column = tl.arange(0, BLOCK)
    first = add_residual(x, residual, hidden, column, K, HAS_RESIDUAL)
    squares = first * first
    for start in range(BLOCK, K, BLOCK):
        value = add_residual(x, residual, hidden, start + column, K, HAS_RESIDUAL)
        squares += value * value
    inverse = tl.rsqrt(tl.sum(squares) / K + eps)
    first = scaled(first, weight, column, inverse, K, hidden.dtype.element_ty)
    largest = magnitude(first)
    for start in range(BLOCK, K, BLOCK):
        largest = tl.maximum(largest, magnitude(normalized(hidden, weight, start + column, inverse, K)))
    step = step_size(tl.max(largest))
    tl.store(scale + token, step)
    tl.store(codes + token * K + column, round_codes(first, step), mask=column < K)
    if not IS_WHOLE:
        for start in range(BLOCK, K, BLOCK):
            at = start + column
            value = round_codes(normalized(hidden, weight, at, inverse, K), step)
            tl.store(codes + token * K + at, value, mask=at < K)


@triton.jit
def silu(value, EXACT: tl.constexpr):
    """value / (1 + exp(-value)); EXACT with the exponential and the division of PyTorch's own kernel."""
    if EXACT:
        return tl.div_rn(value, 1.0 + libdevice.exp(-value))
    return value / (1.0 + tl.exp(-value))


@triton.jit
def gated(gate, up, column, K, EXACT: tl.constexpr):
    """silu(gate) * up, both rounded to the dtype of the tokens."""
    dtype: tl.constexpr = gate.dtype.element_ty
    activated = silu(load_row(gate, column, K), EXACT).to(dtype).to(tl.float32)
    return (activated * load_row(up, column, K)).to(dtype).to(tl.float32)


@triton.jit
def silu_mul_quantize_kernel(
    gate,
    up,
    codes,
    scale,
    K,
    stride_gate,
    stride_up,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Codes and scale of one gated token; IS_WHOLE when a block holds it, which is then read once."""
    join_chain(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    gate += token * stride_gate
    up += token * stride_up
    column = tl.arange(0, BLOCK)
    value = gated(gate, up, column, K, EXACT)
    largest = magnitude(value)
    for start in range(BLOCK, K, BLOCK):
        largest = tl.maximum(largest, magnitude(gated(gate, up, start + column, K, EXACT)))
    step = step_size(tl.max(largest))
    tl.store(scale + token, step)
    tl.store(codes + token * K + column, round_codes(value, step), mask=column < K)
    if not IS_WHOLE:
        for start in range(BLOCK, K, BLOCK):
            at = start + column
            tl.store(codes + token * K + at, round_codes(gated(gate, up, at, K, EXACT), step), mask=at < K)


def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialized codes and scales for tokens of this shape."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def rows_contiguous(x: Tensor) -> Tensor:
    """Return the tokens with their elements next to each other; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Return whether kernels of a device can start while the one before them drains."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(x: Tensor, max_block: int) -> dict[str, int | bool]:
    """Return the block that covers a token or the largest allowed, with warps to match, and how to start."""
    in_features, overlap = x.shape[1], overlaps(x.device)
    block = min(max_block, max(128, triton.next_power_of_2(in_features)))
    options: dict[str, int | bool] = {
        "BLOCK": block,
        "IS_WHOLE": in_features <= block,
        "OVERLAP": overlap,
        "num_warps": max(1, min(16, block // 512)),
        "launch_pdl": overlap,
    }
    return options


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of tokens [M, K], bit for bit those of the reference."""
    codes, scale = outputs(x)
    num_tokens, in_features = x.shape
    if in_features == 0:
        return codes, scale.zero_()
    if num_tokens:
        x = rows_contiguous(x)
        launcher(token_quantize_kernel, (num_tokens,))(
            x, codes, scale, in_features, x.stride(0), **launch_options(x, MAX_BLOCK)
        )
    return codes, scale


def rms_norm_quantize_tokens(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the reference returns, up to the order of the sum of squares."""
    codes, scale = outputs(x)
    hidden = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_tokens, in_features = x.shape
    if num_tokens:
        x = rows_contiguous(x)
        other = x if residual is None else rows_contiguous(residual)
        launcher(rms_norm_quantize_kernel, (num_tokens,))(
            x,
            other,
            weight.contiguous(),
            hidden,
            codes,
            scale,
            in_features,
            x.stride(0),
            other.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            **launch_options(x, MAX_BLOCK),
        )
    return codes, scale, hidden


def silu_mul_quantize_tokens(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, bit for bit on a CUDA device."""
    codes, scale = outputs(gate)
    num_tokens, in_features = gate.shape
    if num_tokens:
        gate, up = rows_contiguous(gate), rows_contiguous(up)
        launcher(silu_mul_quantize_kernel, (num_tokens,))(
            gate,
            up,
            codes,
            scale,
            in_features,
            gate.stride(0),
            up.stride(0),
            # the interpreter knows no functions of the device
            EXACT=isinstance(silu_mul_quantize_kernel, triton.JITFunction),
            **launch_options(gate, MAX_GATED_BLOCK),
        )
    return codes, scale
