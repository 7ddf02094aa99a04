# SPDX-License-Identifier: Apache-2.0
"""Scales found by trying smaller ranges and keeping the one with the smallest error."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.scales.absmax import AbsMax, check_sign_choice, require_integer
from quattuor.scales.base import ScaleDtype, ScaleRule, round_scale

__all__ = ["ClipSearch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSearch(ScaleRule):
    """Shrink the range step by step and keep the smallest weighted error of each group.

    error(p) = sum_j importance_j |Q_p(x_j) - x_j|^norm,   p = 1, 1 - 1/num_steps, ... >= smallest
    The first minimiser wins, so that p = 1 is kept unless a smaller range is strictly better.

    Args:
        num_steps: Steps that the whole range is divided into.
        smallest: Smallest fraction of the range that is tried.
        norm: Exponent of the error; the importance is meant for 2.
        weighted: Use the importance that the solver offers; off reproduces plain clipping.
        choose_sign: Also try negative scales, see `AbsMax`.
        scale_dtype: How the scale is stored, and therefore rounded.

    References:
        Frantar et al., 2022, arXiv:2210.17323 (code: norm 2.4, unweighted, 80 of 100 steps).
    """

    num_steps: int = 50
    smallest: float = 0.2
    norm: float = 2.0
    weighted: bool = True
    choose_sign: bool = False
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        """Reject an empty or reversed search."""
        if self.num_steps < 1 or not 0 < self.smallest <= 1 or self.norm <= 0:
            raise InputError(
                compose(
                    subject="num_steps, smallest, norm",
                    value=(self.num_steps, self.smallest, self.norm),
                    constraint="do not describe a search",
                    place="ClipSearch",
                    remedy="use num_steps >= 1, 0 < smallest <= 1 and norm > 0",
                )
            )

    def fractions(self) -> list[float]:
        """Return the fractions of the range that are tried, from 1 downwards."""
        fractions = [1 - step / self.num_steps for step in range(self.num_steps)]
        return [fraction for fraction in fractions if fraction >= self.smallest - 1e-9]

    def check(self, number_format: Format) -> None:
        """Refuse what is not a uniform integer, and a choice of sign where none exists."""
        integer = require_integer(number_format, "ClipSearch")
        if self.choose_sign:
            check_sign_choice(integer, "ClipSearch")

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `scale`, and `zero_point` when the format is asymmetric."""
        self.check(number_format)
        integer = require_integer(number_format, "ClipSearch")
        starts = [AbsMax(scale_dtype=self.scale_dtype).fit(values, integer)]
        if self.choose_sign:
            signed = AbsMax(choose_sign=True, scale_dtype=self.scale_dtype).fit(values, integer)["scale"]
            starts = [Parameters(scale=signed), Parameters(scale=-signed)]
        best, best_error = starts[0], None
        for start in starts:
            for fraction in self.fractions():
                scale = round_scale(start["scale"].to(values.dtype) * fraction, self.scale_dtype)
                candidate = Parameters(**{**start, "scale": scale})
                error = self.error(values, integer, candidate, importance)
                if best_error is None:
                    best, best_error = candidate, error
                    continue
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best = Parameters(**{name: torch.where(better, candidate[name], best[name]) for name in candidate})
        return best

    def error(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        parameters: Parameters,
        importance: Float[Tensor, "*R G S"] | None,
    ) -> Float[Tensor, "R G"]:
        """Return the error of each group under the given parameters."""
        error = number_format.fake_quantize(values, parameters).sub_(values)
        error = error.square_() if self.norm == 2 else error.abs_().pow_(self.norm)
        if self.weighted and importance is not None:
            error = error.mul_(importance)
        return error.sum(dim=-1)
