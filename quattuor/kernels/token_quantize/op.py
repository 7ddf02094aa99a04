# SPDX-License-Identifier: Apache-2.0
"""The public wrapper: checks the input and calls the registered operator."""

import functools
import importlib.util

import torch
from torch import Tensor

from quattuor.kernels.dispatch import OUTPUT_DTYPES, check
from quattuor.kernels.token_quantize.reference import quantize_tokens

__all__ = ["token_quantize"]

PLACE = "token_quantize"


@functools.cache
def runs_on_triton(device: torch.device) -> bool:
    """Return whether a device runs the Triton kernel: CUDA with triton installed. Both give the same bits."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


# `custom_op` would infer the schema, but adds several times the latency of a small batch to each call.
torch.library.define("quattuor::token_quantize", "(Tensor x) -> (Tensor, Tensor)")


@torch.library.impl("quattuor::token_quantize", "CompositeExplicitAutograd")
def quantize_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize tokens [M, K]; `token_quantize` checks the argument."""
    if runs_on_triton(x.device):
        from quattuor.kernels.token_quantize import triton_kernel

        return triton_kernel.quantize_tokens(x)
    return quantize_tokens(x)


@torch.library.register_fake("quattuor::token_quantize")
def fake_quantize_op(x):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0],), dtype=torch.float32)


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
    check(x.dim() == 2, "x.dim()", x.dim(), "is not 2", PLACE, "flatten tokens to [M, K]")
    check(
        x.dtype in OUTPUT_DTYPES,
        "x.dtype",
        x.dtype,
        "is not float16, bfloat16 or float32",
        PLACE,
        "convert it",
    )
    return torch.ops.quattuor.token_quantize(x)
