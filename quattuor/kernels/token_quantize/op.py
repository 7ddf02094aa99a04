# SPDX-License-Identifier: Apache-2.0
"""The public wrappers: check the inputs and call the registered operators."""

import torch
from torch import Tensor

from quattuor.kernels.dispatch import OUTPUT_DTYPES, check, check_tensor, is_plain_call
from quattuor.kernels.requirements import runs_on_triton
from quattuor.kernels.token_quantize import reference

__all__ = ["rms_norm_quantize", "silu_mul_quantize", "token_quantize"]


def implementation(device: torch.device):
    """Return the module that computes on a device: the Triton kernels or the reference."""
    if runs_on_triton(device):
        from quattuor.kernels.token_quantize import triton_kernel

        return triton_kernel
    return reference


def empty_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what codes and scales of these tokens look like, for tracing."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)


# `custom_op` would infer the schemas, but adds several times the latency of a small batch to each call.
torch.library.define("quattuor::token_quantize", "(Tensor x) -> (Tensor, Tensor)")
torch.library.define(
    "quattuor::rms_norm_quantize",
    "(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("quattuor::silu_mul_quantize", "(Tensor gate, Tensor up) -> (Tensor, Tensor)")


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize tokens [M, K]; `token_quantize` checks the argument."""
    with torch.cuda.device_of(x):
        return implementation(x.device).quantize_tokens(x)


def rms_norm_quantize_tokens(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add, normalize and quantize tokens [M, K]; `rms_norm_quantize` checks the arguments."""
    with torch.cuda.device_of(x):
        return implementation(x.device).rms_norm_quantize_tokens(x, weight, eps, residual)


def silu_mul_quantize_tokens(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and quantize tokens [M, K]; `silu_mul_quantize` checks the arguments."""
    with torch.cuda.device_of(gate):
        return implementation(gate.device).silu_mul_quantize_tokens(gate, up)


torch.library.impl("quattuor::token_quantize", "CompositeExplicitAutograd", quantize_tokens)
torch.library.impl("quattuor::rms_norm_quantize", "CompositeExplicitAutograd", rms_norm_quantize_tokens)
torch.library.impl("quattuor::silu_mul_quantize", "CompositeExplicitAutograd", silu_mul_quantize_tokens)


@torch.library.register_fake("quattuor::token_quantize")
def fake_token_quantize(x):
    return empty_outputs(x)


@torch.library.register_fake("quattuor::rms_norm_quantize")
def fake_rms_norm_quantize(x, weight, eps, residual):
    return *empty_outputs(x), x.new_empty(x.shape)


@torch.library.register_fake("quattuor::silu_mul_quantize")
def fake_silu_mul_quantize(gate, up):
    return empty_outputs(gate)


def check_tokens(name: str, x: Tensor, place: str) -> None:
    """Raise `InputError` unless the tensor holds floating-point tokens [M, K]."""
    check(x.dim() == 2, f"{name}.dim()", x.dim(), "is not 2", place, "flatten tokens to [M, K]")
    check_tensor(name, x, tuple(x.shape), OUTPUT_DTYPES, x.device, place)


def token_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each token to int8 with its own scale.

    s = max_k |x| / 127, q = clamp(rne(x / s), -127, 127), both divisions in float32. An all-zero token has
    q = 0 and s = 0; a token with NaN or infinity has q = 0 and s = NaN, which makes its outputs NaN.

    Args:
        x: float16, bfloat16 or float32 [M, K]; M may be 0; any strides.

    Returns:
        Codes int8 [M, K], contiguous, and scales float32 [M]; x is approximated by codes * scale[:, None].

    Raises:
        InputError: The input has the wrong dtype or number of dimensions.
    """
    check_tokens("x", x, "token_quantize")
    if is_plain_call(x):
        return quantize_tokens(x)
    return torch.ops.quattuor.token_quantize(x)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the residual, normalize by the root mean square, and quantize each token, reading it once.

    h = x + residual; n = h / sqrt(mean_k h^2 + eps); codes and scale of n * weight as in `token_quantize`. Each of
    h, n and n * weight is computed in float32 and rounded to the dtype of x, as separate modules would.

    Args:
        x: float16, bfloat16 or float32 [M, K]; M may be 0; any strides.
        weight: Gain of the norm, floating point [K].
        eps: Added to the mean square; positive.
        residual: Tokens to add, of the shape and dtype of x, or None.

    Returns:
        Codes int8 [M, K], scales float32 [M], and h [M, K], contiguous.

    Raises:
        InputError: An input has the wrong dtype, shape or device, or eps is not positive.
    """
    place = "rms_norm_quantize"
    check_tokens("x", x, place)
    check_tensor("weight", weight, tuple(x.shape[1:]), OUTPUT_DTYPES, x.device, place)
    check(eps > 0, "eps", eps, "is not positive", place, "use the eps of the norm, for example 1e-6")
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), (x.dtype,), x.device, place)
    if is_plain_call(x) and is_plain_call(weight):
        return rms_norm_quantize_tokens(x, weight, eps, residual)
    return torch.ops.quattuor.rms_norm_quantize(x, weight, eps, residual)


def silu_mul_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and quantize each token: codes and scale of silu(gate) * up.

    The gate and the product are each computed in float32 and rounded to the dtype of `gate`, as separate modules
    would.

    Args:
        gate: float16, bfloat16 or float32 [M, K]; M may be 0; any strides, so halves of one tensor will do.
        up: Of the shape and dtype of `gate`.

    Returns:
        Codes int8 [M, K], contiguous, and scales float32 [M], as in `token_quantize`.

    Raises:
        InputError: An input has the wrong dtype, shape or device.
    """
    place = "silu_mul_quantize"
    check_tokens("gate", gate, place)
    check_tensor("up", up, tuple(gate.shape), (gate.dtype,), gate.device, place)
    if is_plain_call(gate) and is_plain_call(up):
        return silu_mul_quantize_tokens(gate, up)
    return torch.ops.quattuor.silu_mul_quantize(gate, up)
