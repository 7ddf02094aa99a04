# SPDX-License-Identifier: Apache-2.0
"""The definition of the operation in plain PyTorch."""

import torch
from torch import Tensor

__all__ = ["quantize_tokens", "rms_norm_quantize_tokens", "silu_mul_quantize_tokens"]


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of tokens [M, K].

    s = max_k |x| / 127 and q = clamp(rne(x / s), -127, 127), all in float32. A token with s = 0 has
    q = 0. A token that is not finite has q = 0 and s = NaN, so that its outputs are NaN and not plausible.
    """
    x_MK = x.float()
    absmax_M = x_MK.abs().amax(dim=1) if x.shape[1] else x_MK.new_zeros(x.shape[0])
    # a tensor, because CUDA devices divide by a number as they multiply by its rounded reciprocal
    scale_M = absmax_M / torch.full_like(absmax_M, 127.0)
    scale_M = torch.where(scale_M.isfinite(), scale_M, torch.nan)
    ratio_MK = x_MK / scale_M[:, None]
    is_regular_M = scale_M > 0  # false for zero and for NaN
    codes_MK = torch.round(ratio_MK).clamp(-127, 127)
    codes_MK = torch.where(is_regular_M[:, None], codes_MK, 0.0).to(torch.int8).contiguous()
    return codes_MK, scale_M


def rms_norm_quantize_tokens(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and scales of the normalized tokens, and the tokens with the residual added.

    hidden = x + residual, n = hidden * rsqrt(mean hidden^2 + eps) and n * weight are each computed in float32 and
    rounded to the dtype of x, as separate modules would.
    """
    hidden = x.clone() if residual is None else (x.float() + residual.float()).to(x.dtype)
    hidden_MK = hidden.float()
    inverse_M = torch.rsqrt(hidden_MK.square().mean(dim=1) + eps)
    normalized_MK = (hidden_MK * inverse_M[:, None]).to(x.dtype)
    codes, scale = quantize_tokens((normalized_MK.float() * weight.float()).to(x.dtype))
    return codes, scale, hidden.contiguous()


def silu_mul_quantize_tokens(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of silu(gate) * up, each computed in float32 and rounded to the dtype of `gate`."""
    return quantize_tokens(torch.nn.functional.silu(gate) * up)  # PyTorch computes both as the docstring says
