# SPDX-License-Identifier: Apache-2.0
"""Scales of `TwoLevelInteger`: group scales that count int8 steps of one grid per output channel."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.integer import Integer
from quattuor.formats.two_level import INT8_STEPS, TwoLevelInteger
from quattuor.scales.base import ScaleRule, round_scale
from quattuor.scales.search import ClipSearch

__all__ = ["TwoLevel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevel(ScaleRule):
    """Fit group steps first, then put them on an int8 grid that the whole row shares.

    step_g        the scale that `inner` fits to group g
    channel_scale = max_g |step_g| / L,   L = 127 / 2^(b-1) levels of int8 per code, rounded down when `integer`
    group_scale_g = step_g / channel_scale, rounded to float16, or to an integer in +-[1, L] when `integer`

    `|code * group_scale| <= 127` then holds for every code, so nothing wraps. With integer group scales every
    product is an integer, so the second rounding vanishes.

    After that the group scales are fitted once more on the final grid (`refine`): every integer candidate, or the
    fractions of the clip search, is tried with the channel scale held fixed.

    Args:
        inner: Fits the step of each group.
        integer: Round group scales to integers, which lets a kernel stay in integer arithmetic.
        refine: Fit the group scales again on the final grid.

    References:
        Zhang et al., 2024, arXiv:2406.09904 (QQQ); Lin et al., 2024, arXiv:2405.04532 (integer group scales).
    """

    inner: ClipSearch = field(default_factory=ClipSearch)
    integer: bool = True
    refine: bool = True

    def __post_init__(self) -> None:
        """Reject a rounded inner scale: the rounding happens here, once."""
        if self.inner.scale_dtype != "float32":
            raise InputError(
                compose(
                    subject="inner.scale_dtype",
                    value=self.inner.scale_dtype,
                    constraint="would round the group scale twice",
                    place="TwoLevel",
                    remedy='use scale_dtype="float32" in the inner rule',
                )
            )

    @property
    def couples_groups(self) -> bool:
        """The groups of a row share the channel scale."""
        return True

    def check(self, number_format: Format) -> None:
        """Refuse formats of one level, and integer group scales where a code already takes a whole int8 step."""
        if not isinstance(number_format, TwoLevelInteger):
            raise UnsupportedError(
                compose(
                    subject="format",
                    value=number_format,
                    constraint="has no second level",
                    place="TwoLevel",
                    remedy="use TwoLevelInteger(bits)",
                )
            )
        if self.integer and 2 ** (number_format.bits - 1) > INT8_STEPS:
            raise UnsupportedError(
                compose(
                    subject="bits",
                    value=number_format.bits,
                    constraint="leaves less than one int8 step per code, so no integer group scale exists",
                    place="TwoLevel",
                    remedy="use integer=False (integer_group_scales=False of a system), or at most 7 bits",
                )
            )

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `group_scale` (float16, or int8 when `integer`, [R, G]) and `channel_scale` (float32, [R, 1])."""
        self.check(number_format)
        assert isinstance(number_format, TwoLevelInteger), "checked above"
        step_RG = self.inner.fit(values, Integer(number_format.bits), importance)["scale"].to(values.dtype)
        levels_per_code = INT8_STEPS / 2 ** (number_format.bits - 1)
        largest = int(levels_per_code) if self.integer else levels_per_code
        empty_RG = (values == 0).all(dim=-1)
        usable_RG = torch.where(empty_RG, torch.zeros_like(step_RG), step_RG)
        channel_R1 = round_scale(usable_RG.abs().amax(dim=1, keepdim=True) / largest, "float32")
        ratio_RG = usable_RG / channel_R1
        group_RG = self._round(ratio_RG, float(largest))
        if self.refine:
            group_RG = self._refine(values, number_format, importance, group_RG, channel_R1, float(largest))
        return Parameters(group_scale=group_RG, channel_scale=channel_R1)

    def _round(self, ratio: Float[Tensor, "R G"], largest: float) -> Shaped[Tensor, "R G"]:
        """Round to the stored grid, at most `largest` in magnitude and never zero."""
        if not self.integer:
            # Rounding up to the next float16 could exceed `largest` and wrap a code in the kernel.
            stored = round_scale(ratio.clamp(-largest, largest), "float16")
            return torch.where(stored.float().abs() > largest, torch.full_like(stored, largest), stored)
        magnitude = ratio.abs().round().clamp(1, largest)
        return torch.where(ratio < 0, -magnitude, magnitude).to(torch.int8)

    def _refine(
        self,
        values: Float[Tensor, "R G S"],
        number_format: TwoLevelInteger,
        importance: Float[Tensor, "*R G S"] | None,
        start: Shaped[Tensor, "R G"],
        channel_scale: Float[Tensor, "R 1"],
        largest: float,
    ) -> Shaped[Tensor, "R G"]:
        """Keep, per group, the candidate group scale with the smallest error on the final grid."""
        best, best_error = start, self._error(values, number_format, importance, start, channel_scale)
        for candidate in self._candidates(start, largest):
            error = self._error(values, number_format, importance, candidate, channel_scale)
            better = error < best_error
            best, best_error = torch.where(better, candidate, best), torch.where(better, error, best_error)
        return best

    def _candidates(self, start: Shaped[Tensor, "R G"], largest: float) -> list[Shaped[Tensor, "R G"]]:
        """List the group scales that `_refine` tries."""
        signs = (1, -1) if self.inner.choose_sign else (1,)
        if self.integer:
            sizes = range(1, int(largest) + 1)
            return [torch.full_like(start, sign * size) for size in sizes for sign in signs]
        factors = [1 + step / 100 for step in range(-12, 13) if step]
        return [self._round(sign * start.float() * factor, largest) for factor in factors for sign in signs]

    def _error(
        self,
        values: Float[Tensor, "R G S"],
        number_format: TwoLevelInteger,
        importance: Float[Tensor, "*R G S"] | None,
        group_scale: Shaped[Tensor, "R G"],
        channel_scale: Float[Tensor, "R 1"],
    ) -> Float[Tensor, "R G"]:
        """Return the error of each group on the final grid."""
        if self.integer:  # whole int8 steps make it a uniform grid, which is faster to compute
            uniform = Parameters(scale=group_scale.to(values.dtype) * channel_scale)
            return self.inner.error(values, Integer(number_format.bits), uniform, importance)
        parameters = Parameters(group_scale=group_scale, channel_scale=channel_scale)
        return self.inner.error(values, number_format, parameters, importance)
