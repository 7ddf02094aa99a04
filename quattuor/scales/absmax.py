# SPDX-License-Identifier: Apache-2.0
"""Scales that make the largest element of a group representable."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.integer import Integer
from quattuor.scales.base import ScaleDtype, ScaleRule, round_scale

__all__ = ["AbsMax", "check_sign_choice", "require_integer"]


def require_integer(number_format: Format, place: str) -> Integer:
    """Return the format as Integer, or refuse."""
    if isinstance(number_format, Integer):
        return number_format
    raise UnsupportedError(
        compose(
            subject="format",
            value=number_format,
            constraint="is not a uniform integer",
            place=place,
            remedy="use Integer(bits), or TwoLevel(...) as the scale rule of TwoLevelInteger(bits)",
        )
    )


def check_sign_choice(number_format: Integer, place: str) -> None:
    """Refuse a choice of sign for a format whose codes reach equally far to both sides, or only to one."""
    if number_format.symmetric and not number_format.narrow:
        return
    raise UnsupportedError(
        compose(
            subject="choose_sign",
            value=True,
            constraint=f"gains nothing with {number_format}, which has no extra code at one end",
            place=place,
            remedy="use choose_sign=False, or Integer(bits) with symmetric=True and narrow=False",
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsMax(ScaleRule):
    """The range of the data is the range of the codes.

    symmetric:   scale = max|x| / highest code
    choose_sign: scale = -x* / 2^(b-1), where x* is the element of largest magnitude: it takes the lowest code, so
                 all 2^b levels are used and the step is smaller by (2^(b-1) - 1) / 2^(b-1)
    asymmetric:  scale = (max(x, 0) - min(x, 0)) / (2^b - 1), zero_point = round(-min(x, 0) / scale)

    Args:
        choose_sign: Let the scale be negative, see above. Symmetric formats only, and not narrow ones.
        scale_dtype: How the scale is stored, and therefore rounded.
    """

    choose_sign: bool = False
    scale_dtype: ScaleDtype = "float32"

    def check(self, number_format: Format) -> None:
        """Refuse what is not a uniform integer, and a choice of sign where none exists."""
        integer = require_integer(number_format, "AbsMax")
        if self.choose_sign:
            check_sign_choice(integer, "AbsMax")

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `scale`, and `zero_point` when the format is asymmetric. Ignores the importance."""
        self.check(number_format)
        integer = require_integer(number_format, "AbsMax")
        lowest, highest = integer.code_range
        if not integer.symmetric:
            low, high = values.amin(dim=-1).clamp(max=0), values.amax(dim=-1).clamp(min=0)
            scale = round_scale((high - low) / highest, self.scale_dtype)
            zero_point = torch.round(-low / scale.to(low.dtype)).clamp(lowest, highest)
            return Parameters(scale=scale, zero_point=zero_point.to(torch.uint8))
        if self.choose_sign:
            extreme_index = values.abs().argmax(dim=-1, keepdim=True)
            return Parameters(
                scale=round_scale(values.gather(-1, extreme_index).squeeze(-1) / lowest, self.scale_dtype)
            )
        return Parameters(scale=round_scale(values.abs().amax(dim=-1) / highest, self.scale_dtype))
