# SPDX-License-Identifier: Apache-2.0
"""Scales proportional to the root mean square, for weights whose entries look like draws from one Gaussian."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.mid_rise import MidRise
from quattuor.scales.base import ScaleDtype, ScaleRule, round_scale

__all__ = ["NORMAL_MULTIPLES", "RootMeanSquare"]

NORMAL_MULTIPLES = {2: 1.4935, 3: 2.0511, 4: 2.5140, 5: 2.9162, 6: 3.2780, 7: 3.6111, 8: 3.9222}
"""Where the outermost of 2^bits even levels lie for the least squared error of a normal variable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RootMeanSquare(ScaleRule):
    """The outermost levels lie at +-multiple * rms, whatever the largest entry is.

    scale = 2 * multiple * sqrt(mean(x^2)) / (2^b - 1)

    A group of zeros has the smallest scale that can be stored, since no level is zero.

    Args:
        multiple: Where the outermost levels lie, in root mean squares; None for where a normal variable has the
            least error at the format's width.
        scale_dtype: How the scale is stored, and therefore rounded.

    References:
        Chee et al., 2023, arXiv:2307.13304, algorithm 1 (code: rho = 2.4). None: Max, 1960, Quantizing for minimum
        distortion, table II.
    """

    multiple: float | None = 2.4
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        """Reject levels that all coincide."""
        if self.multiple is not None and not 0 < self.multiple < 1e3:
            raise InputError(
                compose(
                    subject="multiple",
                    value=self.multiple,
                    constraint="is not a positive number of root mean squares",
                    place="RootMeanSquare",
                    remedy="use 2.4, the authors' choice, or None, the best of a normal variable",
                )
            )

    def check(self, number_format: Format) -> None:
        """Refuse formats other than MidRise."""
        if not isinstance(number_format, MidRise):
            raise UnsupportedError(
                compose(
                    subject="format",
                    value=number_format,
                    constraint="does not have its levels symmetrically around zero",
                    place="RootMeanSquare",
                    remedy="use MidRise(bits), or AbsMax() or ClipSearch() as the scale rule",
                )
            )

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `scale`. Ignores the importance."""
        self.check(number_format)
        rms = values.square().mean(dim=-1).sqrt()
        multiple = NORMAL_MULTIPLES[number_format.bits] if self.multiple is None else self.multiple
        scale = 2 * multiple * rms / (2**number_format.bits - 1)
        return Parameters(scale=round_scale(scale.clamp(min=torch.finfo(scale.dtype).tiny), self.scale_dtype))
