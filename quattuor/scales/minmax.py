# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points whose range is that of the data, entry by entry excludable."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.integer import Integer
from quattuor.scales.absmax import require_integer
from quattuor.scales.base import ScaleDtype, ScaleRule, round_scale

__all__ = ["MinMax", "group_range", "require_zero_point"]


def require_zero_point(number_format: Format, place: str) -> Integer:
    """Return the format as an asymmetric Integer, or refuse."""
    integer = require_integer(number_format, place)
    if integer.symmetric:
        raise UnsupportedError(
            compose(
                subject="format",
                value=number_format,
                constraint="has no zero point",
                place=place,
                remedy="use Integer(bits, symmetric=False), or AbsMax() or ClipSearch() as the scale rule",
            )
        )
    return integer


def group_range(
    values: Float[Tensor, "R G S"], importance: Float[Tensor, "*R G S"] | None, *, include_zero: bool
) -> tuple[Float[Tensor, "R G"], Float[Tensor, "R G"]]:
    """Return the smallest and the largest entry of each group, leaving out those of importance 0.

    A group of which nothing counts has the range [0, 0].
    """
    low, high = values, values
    if importance is not None:
        counts = importance > 0
        low, high = torch.where(counts, values, torch.inf), torch.where(counts, values, -torch.inf)
    lowest, highest = low.amin(dim=-1), high.amax(dim=-1)
    is_empty = lowest > highest
    lowest, highest = lowest.masked_fill(is_empty, 0.0), highest.masked_fill(is_empty, 0.0)
    return (lowest.clamp(max=0), highest.clamp(min=0)) if include_zero else (lowest, highest)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinMax(ScaleRule):
    """Asymmetric grids over the range of the data; entries whose importance is 0 do not count.

    scale = (high - low) / (2^b - 1),   zero_point = clamp(round(-low / scale), 0, 2^b - 1)

    Args:
        include_zero: Stretch the range to contain 0. Off spends all codes on the data, but the zero point is still
            a code: a group that lies on one side of 0 then saturates at its far end, as in AWQ's code.
        scale_dtype: How the scale is stored, and therefore rounded.

    References:
        Frantar et al., 2022, arXiv:2210.17323 (code); Lin et al., 2023, arXiv:2306.00978 (code).
    """

    include_zero: bool = True
    scale_dtype: ScaleDtype = "float16"

    def check(self, number_format: Format) -> None:
        """Refuse formats without a zero point."""
        require_zero_point(number_format, "MinMax")

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `scale` and `zero_point`."""
        highest = require_zero_point(number_format, "MinMax").code_range[1]
        low, high = group_range(values, importance, include_zero=self.include_zero)
        scale = round_scale((high - low) / highest, self.scale_dtype)
        zero_point = torch.round(-low / scale.to(low.dtype)).clamp(0, highest)
        return Parameters(scale=scale, zero_point=zero_point.to(torch.uint8))
