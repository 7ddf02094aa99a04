# SPDX-License-Identifier: Apache-2.0
"""Uniform integers: x is approximated by `scale * (codes - zero_point)`."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from jaxtyping import Integer as IntegerArray
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.formats.base import Format, Parameters

__all__ = ["Integer"]


def check_bits(bits: object, place: str) -> None:
    """Reject a width outside 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(
            compose(
                subject="bits",
                value=bits,
                constraint="is not an integer from 2 to 8",
                place=place,
                remedy="choose a width from 2 to 8, for example 4",
            )
        )


@dataclass(frozen=True, slots=True)
class Integer(Format):
    """Uniform integers of `bits` bits.

    symmetric:  codes in [-2^(b-1), 2^(b-1) - 1] (`narrow`: from -(2^(b-1) - 1)),  x = scale * codes
    asymmetric: codes in [0, 2^b - 1],  x = scale * (codes - zero_point)

    Reads `scale` (any sign, not zero) and, when asymmetric, `zero_point` (a legal code).

    Args:
        bits: Width of a code, 2 to 8.
        symmetric: Whether zero is the code 0 rather than a stored zero point.
        narrow: Leave out the most negative code, so that the range is symmetric as well.
    """

    bits: int
    symmetric: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        """Reject widths and combinations that do not exist."""
        check_bits(self.bits, "Integer")
        if self.narrow and not self.symmetric:
            raise InputError(
                compose(
                    subject="narrow",
                    value=True,
                    constraint="has no meaning for an asymmetric format",
                    place="Integer",
                    remedy="drop narrow or set symmetric=True",
                )
            )

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest legal code."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return -half + int(self.narrow), half - 1

    def encode(self, values: Float[Tensor, "*lead S"], parameters: Parameters) -> IntegerArray[Tensor, "*lead S"]:
        """clamp(round(values / scale) + zero_point, lowest, highest); int8, or uint8 when asymmetric.

        Computes in float32, or float64 when the values or the scale are.
        """
        lowest, highest = self.code_range
        # Two float16 tensors would be divided in float16, whose rounding moves values across ties.
        codes = torch.round(
            values.to(torch.promote_types(values.dtype, torch.float32)) / parameters["scale"].unsqueeze(-1)
        )
        if self.symmetric:
            return codes.clamp(lowest, highest).to(torch.int8)
        return (codes + parameters["zero_point"].unsqueeze(-1)).clamp(lowest, highest).to(torch.uint8)

    def decode(self, codes: IntegerArray[Tensor, "*lead S"], parameters: Parameters) -> Float[Tensor, "*lead S"]:
        """scale * (codes - zero_point)."""
        scale = parameters["scale"]
        scale = scale if scale.dtype == torch.float64 else scale.float()
        steps = codes.to(scale.dtype)
        if not self.symmetric:
            steps = steps - parameters["zero_point"].to(scale.dtype).unsqueeze(-1)
        return steps * scale.unsqueeze(-1)

    def fake_quantize(self, values: Float[Tensor, "*lead S"], parameters: Parameters) -> Float[Tensor, "*lead S"]:
        """decode(encode(values)) in floating point throughout: the same numbers, ten times faster."""
        if not self.symmetric:
            return self.decode(self.encode(values, parameters), parameters).to(values.dtype)
        lowest, highest = self.code_range
        scale = parameters["scale"].unsqueeze(-1)
        steps = values.to(torch.promote_types(values.dtype, torch.float32)) / scale
        return steps.round_().clamp_(lowest, highest).mul_(scale).to(values.dtype)
