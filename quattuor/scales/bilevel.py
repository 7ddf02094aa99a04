# SPDX-License-Identifier: Apache-2.0
"""Statistics of `BilevelInteger`: the range of each group, rounded to a few bits on a grid that rows share."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.bilevel import BilevelInteger
from quattuor.scales.base import ScaleRule, round_scale
from quattuor.scales.minmax import group_range
from quattuor.scales.search import ClipSearch

__all__ = ["Bilevel"]

LARGEST_ZERO_POINT = 2.0**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Bilevel(ScaleRule):
    """The range of each group, zero not forced inside, with statistics rounded as they are stored.

    scale = (high - low) / (2^b - 1),   zero_point = -low / scale

    Each is then rounded to its bits between the smallest and the largest of the `row_group` rows that share a
    second level.

    Groups of equal values have no range: they take the smallest scale of their second level, or 1.

    Args:
        search: Tries smaller ranges around the same middle before anything is rounded; None keeps the extremes.

    References:
        Dettmers et al., 2023, arXiv:2306.03078 (SpQR), section 4.2.
    """

    search: ClipSearch | None = None

    def check(self, number_format: Format) -> None:
        """Refuse other formats."""
        if not isinstance(number_format, BilevelInteger):
            raise UnsupportedError(
                compose(
                    subject="format",
                    value=number_format,
                    constraint="has no statistics of two levels",
                    place="Bilevel",
                    remedy="use BilevelInteger(bits)",
                )
            )

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return the parameters of `BilevelInteger`; entries whose importance is 0 do not count."""
        self.check(number_format)
        assert isinstance(number_format, BilevelInteger), "checked above"
        _check_rows(values, number_format)
        low, high = group_range(values, importance, include_zero=False)
        low, high = self._shrink(values, number_format, importance, low, high)
        highest = number_format.code_range[1]
        plain_RG = _without_gaps((high - low) / highest, number_format.row_group)
        scale = _round(plain_RG, "scale", "scale", number_format.scale_bits, number_format.row_group)
        zero_RG = (-low / plain_RG).clamp(-LARGEST_ZERO_POINT, LARGEST_ZERO_POINT)
        zero = _round(zero_RG, "zero", "zero_point", number_format.zero_bits, number_format.row_group)
        return Parameters(**scale, **zero)

    def _shrink(
        self,
        values: Float[Tensor, "R G S"],
        number_format: BilevelInteger,
        importance: Float[Tensor, "*R G S"] | None,
        low: Float[Tensor, "R G"],
        high: Float[Tensor, "R G"],
    ) -> tuple[Float[Tensor, "R G"], Float[Tensor, "R G"]]:
        """Return the range with the smallest error among fractions of the given one."""
        if self.search is None:
            return low, high
        plain, highest = BilevelInteger(number_format.bits, None, None), number_format.code_range[1]
        middle, half = (low + high) / 2, (high - low) / 2
        best, best_error = torch.ones_like(half), torch.full_like(half, torch.inf)
        for fraction in self.search.fractions():
            scale = _without_gaps(2 * fraction * half / highest, 1)
            candidate = Parameters(scale=scale, zero_point=highest / 2 - middle / scale)
            error = self.search.error(values, plain, candidate, importance)
            is_better = error < best_error
            best_error = torch.where(is_better, error, best_error)
            best = torch.where(is_better, torch.full_like(best, fraction), best)
        return middle - best * half, middle + best * half


def _check_rows(values: Float[Tensor, "R G S"], number_format: BilevelInteger) -> None:
    num_rows, row_group = values.shape[0], number_format.row_group
    if num_rows <= row_group or num_rows % row_group == 0:
        return
    raise InputError(
        compose(
            subject="row_group",
            value=row_group,
            constraint=f"does not divide the {num_rows} rows of the weight",
            place="Bilevel",
            remedy="use a row_group that divides out_features, or statistics of None bits",
        )
    )


def _without_gaps(scale: Float[Tensor, "R G"], row_group: int) -> Float[Tensor, "R G"]:
    """Replace zeros by the smallest positive number of their second level, or by 1 where there is none."""
    tiny = 2.0**-24
    padded = _by_row_group(torch.where(scale < tiny, torch.inf, scale), row_group, torch.inf)
    smallest = padded.amin(dim=1, keepdim=True).expand_as(padded).reshape(-1, scale.shape[1])[: len(scale)]
    filled = torch.where(torch.isinf(smallest), torch.ones_like(scale), smallest)
    return torch.where(scale < tiny, filled, scale)


def _by_row_group(statistic: Float[Tensor, "R G"], row_group: int, fill: float) -> Float[Tensor, "X Y G"]:
    """View rows in runs of `row_group`, the last one filled up."""
    size = min(row_group, len(statistic))
    missing = -len(statistic) % size
    padded = torch.nn.functional.pad(statistic, (0, 0, 0, missing), value=fill)
    return padded.view(-1, size, statistic.shape[1])


def _round(
    statistic: Float[Tensor, "R G"], kind: str, plain: str, bits: int | None, row_group: int
) -> dict[str, Tensor]:
    """Return the stored form of a statistic: float16, or codes with step and base of their row group."""
    if bits is None:
        return {plain: statistic.to(torch.float16)}
    low = _by_row_group(statistic, row_group, torch.inf).amin(dim=1)
    high = _by_row_group(statistic, row_group, -torch.inf).amax(dim=1)
    step, base = round_scale((high - low) / (2**bits - 1), "float16"), low.to(torch.float16)
    runs = _by_row_group(statistic, row_group, 0.0)
    codes = torch.round((runs - base[:, None].to(runs.dtype)) / step[:, None].to(runs.dtype))
    codes = codes.clamp(0, 2**bits - 1).to(torch.uint8).view(-1, statistic.shape[1])[: len(statistic)]
    return {f"{kind}_codes": codes, f"{kind}_step": step, f"{kind}_base": base}
