# SPDX-License-Identifier: Apache-2.0
"""Uniform levels that lie symmetrically around zero without containing it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as IntegerArray
from torch import Tensor

from quattuor.formats.base import Format, Parameters
from quattuor.formats.integer import check_bits

__all__ = ["MidRise"]


@dataclass(frozen=True, slots=True)
class MidRise(Format):
    """Codes in [-2^(b-1), 2^(b-1) - 1],  x = scale * (codes + 1/2).

    As many levels lie on either side of zero: at 2 bits +-1/2 and +-3/2. Reads `scale` (any sign, not zero).

    Args:
        bits: Width of a code, 2 to 8.
    """

    bits: int

    def __post_init__(self) -> None:
        """Reject widths that do not exist."""
        check_bits(self.bits, "MidRise")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest legal code."""
        half = 2 ** (self.bits - 1)
        return -half, half - 1

    def encode(self, values: Float[Tensor, "*lead S"], parameters: Parameters) -> IntegerArray[Tensor, "*lead S"]:
        """clamp(round(values / scale - 1/2), lowest, highest), int8.

        Computes in float32, or float64 when the values or the scale are.
        """
        lowest, highest = self.code_range
        steps = values.to(torch.promote_types(values.dtype, torch.float32)) / parameters["scale"].unsqueeze(-1)
        return torch.round(steps - 0.5).clamp(lowest, highest).to(torch.int8)

    def decode(self, codes: IntegerArray[Tensor, "*lead S"], parameters: Parameters) -> Float[Tensor, "*lead S"]:
        """scale * (codes + 1/2)."""
        scale = parameters["scale"]
        scale = scale if scale.dtype == torch.float64 else scale.float()
        return (codes.to(scale.dtype) + 0.5) * scale.unsqueeze(-1)
