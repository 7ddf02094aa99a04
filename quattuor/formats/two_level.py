# SPDX-License-Identifier: Apache-2.0
"""Small integers whose groups are rescaled onto one int8 grid per output channel.

The group scale counts int8 steps, so that a whole row can be multiplied in int8 and summed in int32, and one
float32 channel scale is applied to the sum.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from jaxtyping import Integer as IntegerArray
from torch import Tensor

from quattuor.formats.base import Format, Parameters
from quattuor.formats.integer import check_bits

__all__ = ["INT8_STEPS", "TwoLevelInteger"]

INT8_STEPS = 127


@dataclass(frozen=True, slots=True)
class TwoLevelInteger(Format):
    """Signed integers of `bits` bits on an int8 second level.

    level8 = clamp(round(codes * group_scale), -128, 127),   x = level8 * channel_scale

    Reads `group_scale` (float16 values of any sign, in int8 steps per code) and `channel_scale` (float32, shared
    by the groups of a row). Codes are in [-2^(b-1), 2^(b-1) - 1]. The product of a code and a float16 is exact in
    float32, so there is one rounding, as in the kernel.

    Args:
        bits: Width of a code, 2 to 8.

    References:
        Zhang et al., 2024, arXiv:2406.09904 (QQQ), per-group weights.
    """

    bits: int

    def __post_init__(self) -> None:
        """Reject widths that do not exist."""
        check_bits(self.bits, "TwoLevelInteger")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest legal code."""
        half = 2 ** (self.bits - 1)
        return -half, half - 1

    def level8(self, codes: IntegerArray[Tensor, "*lead S"], parameters: Parameters) -> Int8[Tensor, "*lead S"]:
        """Return the int8 numbers that a kernel multiplies."""
        product = codes.float() * parameters["group_scale"].float().unsqueeze(-1)
        return product.round().clamp(-128, 127).to(torch.int8)

    def encode(self, values: Float[Tensor, "*lead S"], parameters: Parameters) -> Int8[Tensor, "*lead S"]:
        """Return the code whose int8 level is nearest to values / channel_scale.

        The quotient by the combined scale finds the code up to one step. With integer group scales that is all;
        otherwise its two neighbours are compared on the final grid, because rounding to int8 moves the levels.
        """
        group_scale = parameters["group_scale"].float().unsqueeze(-1)
        target = values / parameters["channel_scale"].float().unsqueeze(-1)
        lowest, highest = self.code_range
        guess = (target / group_scale).round().clamp(lowest, highest)
        if not parameters["group_scale"].is_floating_point():
            return guess.to(torch.int8)
        best, best_error = guess, ((guess * group_scale).round().clamp(-128, 127) - target).abs()
        for step in (-1, 1):
            candidate = (guess + step).clamp(lowest, highest)
            error = ((candidate * group_scale).round().clamp(-128, 127) - target).abs()
            closer = error < best_error
            best, best_error = torch.where(closer, candidate, best), torch.where(closer, error, best_error)
        return best.to(torch.int8)

    def decode(self, codes: IntegerArray[Tensor, "*lead S"], parameters: Parameters) -> Float[Tensor, "*lead S"]:
        """level8 * channel_scale."""
        return self.level8(codes, parameters).float() * parameters["channel_scale"].float().unsqueeze(-1)
