# SPDX-License-Identifier: Apache-2.0
"""The operations in Triton: one program per token. Plain quantization gives the bits of the reference.

With few tokens the program is what a product waits for, so many threads share a token; it is read once, kept in
registers in its own dtype, and divided in five multiply-adds.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher

__all__ = ["quantize_tokens", "rms_norm_quantize_tokens", "silu_mul_quantize_tokens"]

#: Elements of a token that a program keeps in registers; what lies beyond is read again.
MAX_HELD = 28672
#: Threads of a program, and elements that each takes from a step.
MAX_THREADS, VECTOR = 512, 4
#: Long tokens have more threads while programs are few: no more tokens than this, and no fewer elements.
FEW_TOKENS, LONG_TOKEN = 256, 8192
#: Scales from which multiply-adds divide exactly: no residual is lost below the smallest normal number.
SAFE_STEP = tl.constexpr(2.0**-60)


@triton.jit
def load_step(pointer, first, column, K):
    """Part of a token in its dtype, zero beyond its end."""
    return tl.load(pointer + first + column, mask=first + column < K, other=0.0)


@triton.jit
def load_steps(pointer, column, K, STEP: tl.constexpr, STEPS: tl.constexpr):
    """The parts of a token that stay in registers."""
    found = ()
    for step in tl.static_range(STEPS):
        found += (load_step(pointer, step * STEP, column, K),)
    return found


@triton.jit
def larger(largest, value):
    """Elementwise maximum of magnitudes; NaN stays."""
    return tl.maximum(largest, tl.abs(value.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def step_size(largest):
    """max / 127, NaN when a token is not finite: as integers, magnitudes keep their order below NaN."""
    absmax = tl.max(largest.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
    return tl.where(absmax < float("inf"), tl.div_rn(absmax, 127.0), float("nan"))


@triton.jit
def divide(value, step, inverse):
    """value / step, rounded once: two corrections by the residual, which a multiply-add leaves exact.

    P. Markstein, IBM J. Res. Dev. 34 (1990): with 1 / step rounded correctly and a quotient off by less than a
    unit in the last place, the corrected quotient is rounded correctly.
    """
    quotient = value * inverse
    quotient = tl.fma(tl.fma(-quotient, step, value), inverse, quotient)
    return tl.fma(tl.fma(-quotient, step, value), inverse, quotient)


@triton.jit
def round_fast(value, step, inverse):
    """rne(value / step) of a regular token: the low byte after adding 1.5 * 2^23, which rounds halves to even."""
    divisor = tl.zeros_like(value) + step
    return (divide(value, divisor, inverse) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def round_codes(value, step):
    """clamp(rne(value / step), -127, 127); zero where the step is zero or NaN."""
    is_regular = step > 0.0
    divisor = tl.zeros_like(value) + tl.where(is_regular, step, 1.0)
    ratio = tl.minimum(tl.maximum(tl.div_rn(value, divisor), -127.0), 127.0)
    rounded = (ratio + 12582912.0) - 12582912.0
    return tl.where(is_regular, rounded, 0.0).to(tl.int8)


@triton.jit
def store_codes(values, step, codes, column, K, STEP: tl.constexpr, STEPS: tl.constexpr, DEVICE: tl.constexpr):
    """Quantize the parts in registers."""
    is_fast = step >= SAFE_STEP if DEVICE else False
    if is_fast:
        inverse = tl.div_rn(1.0, step)
        for part in tl.static_range(STEPS):
            at = part * STEP + column
            tl.store(codes + at, round_fast(values[part].to(tl.float32), step, inverse), mask=at < K)
    else:
        for part in tl.static_range(STEPS):
            at = part * STEP + column
            tl.store(codes + at, round_codes(values[part].to(tl.float32), step), mask=at < K)


@triton.jit
def token_quantize_kernel(
    x,
    codes,
    scale,
    K,
    stride_x,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Codes and scale of one token; IS_WHOLE when STEPS parts of STEP elements hold it, which are read once."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    x += token * stride_x
    codes += token * K
    column = tl.arange(0, STEP)
    values = load_steps(x, column, K, STEP, STEPS)
    largest = tl.zeros((STEP,), dtype=tl.float32)
    for part in tl.static_range(STEPS):
        largest = larger(largest, values[part])
    if not IS_WHOLE:
        for first in range(STEPS * STEP, K, STEP):
            largest = larger(largest, load_step(x, first, column, K))
    step = step_size(largest)
    tl.store(scale + token, step)
    store_codes(values, step, codes, column, K, STEP, STEPS, DEVICE)
    if not IS_WHOLE:
        for first in range(STEPS * STEP, K, STEP):
            value = load_step(x, first, column, K).to(tl.float32)
            tl.store(codes + first + column, round_codes(value, step), mask=first + column < K)


@triton.jit
def scaled(value, gain, inverse, dtype: tl.constexpr):
    """value * inverse * gain, in this order, each product rounded to the dtype of the tokens."""
    normalized = (value.to(tl.float32) * inverse).to(dtype).to(tl.float32)
    return (normalized * gain.to(tl.float32)).to(dtype)


@triton.jit
def add_residual(x, residual, hidden, first, column, K, HAS_RESIDUAL: tl.constexpr):
    """Part of x + residual, rounded to the dtype of `hidden` and stored there."""
    value = load_step(x, first, column, K).to(tl.float32)
    if HAS_RESIDUAL:
        value += load_step(residual, first, column, K).to(tl.float32)
    rounded = value.to(hidden.dtype.element_ty)
    tl.store(hidden + first + column, rounded, mask=first + column < K)
    return rounded


@triton.jit
def add_square(squares, value):
    """squares + value^2."""
    wide = value.to(tl.float32)
    return squares + wide * wide


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
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Residual sum, codes and scale of one normalized token; each thread re-reads only what it wrote.

    IS_WHOLE when STEPS parts of STEP elements hold the token, which then stays in registers.
    """
    token = tl.program_id(0).to(tl.int64)
    x += token * stride_x
    residual += token * stride_residual
    hidden += token * K
    codes += token * K
    column = tl.arange(0, STEP)
    dtype: tl.constexpr = hidden.dtype.element_ty
    if OVERLAP:
        gdc_launch_dependents()
    # the gain does not depend on the kernel before this one
    gains = load_steps(weight, column, K, STEP, STEPS)
    if OVERLAP:
        gdc_wait()
    values = ()
    squares = tl.zeros((STEP,), dtype=tl.float32)
    for part in tl.static_range(STEPS):
        values += (add_residual(x, residual, hidden, part * STEP, column, K, HAS_RESIDUAL),)
    for part in tl.static_range(STEPS):
        squares = add_square(squares, values[part])
    if not IS_WHOLE:
        for first in range(STEPS * STEP, K, STEP):
            squares = add_square(squares, add_residual(x, residual, hidden, first, column, K, HAS_RESIDUAL))
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    normalized = ()
    largest = tl.zeros((STEP,), dtype=tl.float32)
    for part in tl.static_range(STEPS):
        normalized += (scaled(values[part], gains[part], inverse, dtype),)
        largest = larger(largest, normalized[part])
    if not IS_WHOLE:
        for first in range(STEPS * STEP, K, STEP):
            gain = load_step(weight, first, column, K)
            largest = larger(largest, scaled(load_step(hidden, first, column, K), gain, inverse, dtype))
    step = step_size(largest)
    tl.store(scale + token, step)
    store_codes(normalized, step, codes, column, K, STEP, STEPS, DEVICE)
    if not IS_WHOLE:
        for first in range(STEPS * STEP, K, STEP):
            gain = load_step(weight, first, column, K)
            value = scaled(load_step(hidden, first, column, K), gain, inverse, dtype).to(tl.float32)
            tl.store(codes + first + column, round_codes(value, step), mask=first + column < K)


@triton.jit
def gated(gate, up, DEVICE: tl.constexpr):
    """silu(gate) * up, both rounded to their dtype; on a device by the exponential and division of PyTorch."""
    dtype: tl.constexpr = gate.dtype
    value = gate.to(tl.float32)
    activated = tl.div_rn(value, 1.0 + libdevice.exp(-value)) if DEVICE else value / (1.0 + tl.exp(-value))
    return (activated.to(dtype).to(tl.float32) * up.to(tl.float32)).to(dtype)


@triton.jit
def silu_mul_quantize_kernel(
    gate,
    up,
    codes,
    scale,
    K,
    stride_gate,
    stride_up,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Codes and scale of one gated token; IS_WHOLE when STEPS parts of STEP elements hold it, read once."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    gate += token * stride_gate
    up += token * stride_up
    codes += token * K
    column = tl.arange(0, STEP)
    values = ()
    largest = tl.zeros((STEP,), dtype=tl.float32)
    gates = load_steps(gate, column, K, STEP, STEPS)
    ups = load_steps(up, column, K, STEP, STEPS)
    for part in tl.static_range(STEPS):
        values += (gated(gates[part], ups[part], DEVICE),)
        largest = larger(largest, values[part])
    if not IS_WHOLE:
        for first in range(STEPS * STEP, K, STEP):
            value = gated(load_step(gate, first, column, K), load_step(up, first, column, K), DEVICE)
            largest = larger(largest, value)
    step = step_size(largest)
    tl.store(scale + token, step)
    store_codes(values, step, codes, column, K, STEP, STEPS, DEVICE)
    if not IS_WHOLE:
        for first in range(STEPS * STEP, K, STEP):
            value = gated(load_step(gate, first, column, K), load_step(up, first, column, K), DEVICE)
            tl.store(codes + first + column, round_codes(value.to(tl.float32), step), mask=first + column < K)


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


def steps_of(in_features: int, is_latency_bound: bool = False) -> tuple[int, int, int]:
    """Return threads of a program, elements of a step, and steps that stay in registers."""
    most = MAX_THREADS * 2 if is_latency_bound else MAX_THREADS
    vector = MAX_THREADS * VECTOR // most
    threads = min(most, max(32, triton.next_power_of_2(triton.cdiv(in_features, 2 * vector))))
    return threads, threads * vector, triton.cdiv(min(in_features, MAX_HELD), threads * vector)


def launch_options(x: Tensor, is_sum_ordered: bool = False) -> dict[str, int | bool]:
    """Return how a program walks a token, and how it starts.

    Where the order of a sum shows in the result, it depends on the length of the token only: a token is worth the
    same in every batch.
    """
    num_tokens, in_features = x.shape
    is_few = num_tokens <= FEW_TOKENS and in_features >= LONG_TOKEN
    threads, step, steps = steps_of(in_features, is_few and not is_sum_ordered)
    overlap = overlaps(x.device)
    options: dict[str, int | bool] = {
        "STEP": step,
        "STEPS": steps,
        "IS_WHOLE": in_features <= step * steps,
        "OVERLAP": overlap,
        # the interpreter knows neither functions of the device nor multiply-adds that round once
        "DEVICE": isinstance(token_quantize_kernel, triton.JITFunction),
        "num_warps": threads // 32,
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
            x, codes, scale, in_features, x.stride(0), **launch_options(x)
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
            **launch_options(x, is_sum_ordered=True),
        )
    return codes, scale, hidden


def silu_mul_quantize_tokens(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the reference returns, bit for bit on a CUDA device."""
    codes, scale = outputs(gate)
    num_tokens, in_features = gate.shape
    if num_tokens:
        gate, up = rows_contiguous(gate), rows_contiguous(up)
        launcher(silu_mul_quantize_kernel, (num_tokens,))(
            gate, up, codes, scale, in_features, gate.stride(0), up.stride(0), **launch_options(gate)
        )
    return codes, scale
