# SPDX-License-Identifier: Apache-2.0
"""Scales computed from each token while the model runs."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quattuor.activations.base import ActivationQuantizer
from quattuor.errors import UnsupportedError, compose
from quattuor.formats.integer import Integer as IntegerFormat
from quattuor.granularity import Granularity, PerToken
from quattuor.kernels.token_quantize import reference, token_quantize

__all__ = ["DynamicQuantizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicQuantizer(ActivationQuantizer):
    """Symmetric integers, one scale per token.

    scale[m] = max_k |x[m, k]| / 127,   codes = clamp(round(x / scale), -127, 127)   (127 = 2^(bits-1) - 1)

    A token of zeros gets codes 0. Computes in float32.

    References:
        Zhang et al., 2024, arXiv:2406.09904 (QQQ), section 3.1; Yao et al., 2022, arXiv:2206.01861.
    """

    number_format: IntegerFormat = field(default_factory=lambda: IntegerFormat(8, narrow=True))
    granularity: Granularity = field(default_factory=PerToken)

    def __post_init__(self) -> None:
        """Refuse the combinations that have no implementation."""
        if not isinstance(self.granularity, PerToken) or self.number_format != IntegerFormat(8, narrow=True):
            raise UnsupportedError(
                compose(
                    subject="number_format, granularity",
                    value=(self.number_format, self.granularity),
                    constraint="is not symmetric int8 per token",
                    place="DynamicQuantizer",
                    remedy="use Integer(8, narrow=True) with PerToken()",
                )
            )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.number_format.bits

    def encode(self, x: Float[Tensor, "M K"]) -> tuple[Integer[Tensor, "M K"], Float[Tensor, " M"]]:
        """Return int8 codes and the float32 scale of each token."""
        if torch.compiler.is_compiling():  # in plain PyTorch, which the compiler fuses into what produced x
            return reference.quantize_tokens(x)
        codes, scale = token_quantize(x)
        return codes, scale

    def fake_quantize(self, x: Float[Tensor, "*lead K"]) -> Float[Tensor, "*lead K"]:
        """scale * codes, in the dtype of x."""
        codes, scale = self.encode(x.reshape(-1, x.shape[-1]))
        return (codes.float() * scale.unsqueeze(-1)).to(x.dtype).view(x.shape)
