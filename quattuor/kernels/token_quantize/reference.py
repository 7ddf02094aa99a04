# SPDX-License-Identifier: Apache-2.0
"""The definition of the operation in plain PyTorch."""

import torch
from torch import Tensor

__all__ = ["quantize_tokens"]


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and float32 scales of tokens [M, K].

    s = max_k |x| / 127 and q = clamp(rne(x / s), -127, 127), all in float32. A token with s = 0 has
    q = 0. A token that is not finite has q = 0 and s = NaN, so that its outputs are NaN and not plausible.
    """
    x_MK = x.float()
    absmax_M = x_MK.abs().amax(dim=1) if x.shape[1] else x_MK.new_zeros(x.shape[0])
    scale_M = absmax_M / 127.0
    scale_M = torch.where(scale_M.isfinite(), scale_M, torch.nan)
    ratio_MK = x_MK / scale_M[:, None]
    is_regular_M = scale_M > 0  # false for zero and for NaN
    codes_MK = torch.round(ratio_MK).clamp(-127, 127)
    codes_MK = torch.where(is_regular_M[:, None], codes_MK, 0.0).to(torch.int8).contiguous()
    return codes_MK, scale_M
