# SPDX-License-Identifier: Apache-2.0
"""Entries whose rounding costs too much, found while the columns of a weight are rounded."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.formats.base import Format
from quattuor.outliers.base import OutlierRule, Selection
from quattuor.scales.base import Grid
from quattuor.scales.minmax import group_range

__all__ = ["ErrorThreshold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorThreshold(OutlierRule):
    """Keep an entry when rounding it would cost e^2 = (w - q)^2 / U_jj^2 > limit.

    limit = relative * mean_j(var_n(W_nj) / U_jj^2), from the weight before any rounding; H^-1 = U^T U. The test
    uses the weight as it stands when its column is rounded, so the rule works inside the column feedback only.

    Before a group is fitted, entries are left out of its range whose absence gains more than the limit
    (`leave_one_out`):

    gain_j = error of the group on its min-max grid - error of the others on theirs,   error = sum e^2

    Args:
        relative: A larger value keeps fewer entries; infinity keeps none.
        leave_one_out: Look for entries that spoil the range of their group. Off fits ranges to all entries.

    References:
        Dettmers et al., 2023, arXiv:2306.03078 (SpQR), algorithm 1.
    """

    relative: float = 0.2
    leave_one_out: bool = True

    def __post_init__(self) -> None:
        """Reject a negative threshold."""
        if not self.relative >= 0:
            raise InputError(
                compose(
                    subject="relative",
                    value=self.relative,
                    constraint="is not a threshold",
                    place="ErrorThreshold",
                    remedy="use 0.2, a larger number to keep fewer entries, or infinity to keep none",
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian, through the factor that the solver has."""
        return frozenset({"hessian"})

    def select(self, weight: Float[Tensor, "N K"], grid: Grid, statistics: Mapping[str, Tensor]) -> Selection:
        """Select nothing before rounding."""
        return Selection()

    def limit(self, weight: Float[Tensor, "N K"], sensitivity: Float[Tensor, " K"]) -> Float[Tensor, ""]:
        """Return the error above which an entry is kept.

        Args:
            weight: Before any rounding.
            sensitivity: U_jj of each column.
        """
        # One row has no variance; its mean square serves.
        spread_K = weight.var(dim=0) if len(weight) > 1 else weight.square().squeeze(0)
        return self.relative * (spread_K / sensitivity.square()).mean()

    def candidates(
        self,
        values: Float[Tensor, "R G S"],
        inv_sensitivity: Float[Tensor, "R G S"],
        limit: Float[Tensor, ""],
        number_format: Format,
    ) -> Bool[Tensor, "R G S"]:
        """Return which entries spoil the range of their group.

        Leaving out an entry changes a min-max grid only when it is the single smallest or largest one. All others
        gain their own error.

        Args:
            values: The group as it stands.
            inv_sensitivity: 1 / U_jj of each entry.
            limit: From `limit`.
            number_format: Gives the number of codes.
        """
        if not self.leave_one_out or bool(limit.isinf()):
            return torch.zeros_like(values, dtype=torch.bool)
        lowest, highest = number_format.code_range
        num_steps = highest - lowest
        error = _errors(values, inv_sensitivity, None, num_steps)
        gain, total = error.clone(), error.sum(dim=-1)
        for index in (values.argmin(dim=-1, keepdim=True), values.argmax(dim=-1, keepdim=True)):
            others = torch.ones_like(values).scatter(-1, index, 0.0)
            without = _errors(values, inv_sensitivity, others, num_steps).sum(dim=-1)
            gain.scatter_(-1, index, (total - without).unsqueeze(-1))
        return gain > limit


def _errors(
    values: Float[Tensor, "R G S"],
    inv_sensitivity: Float[Tensor, "R G S"],
    counts: Float[Tensor, "R G S"] | None,
    num_steps: int,
) -> Float[Tensor, "R G S"]:
    """Return e^2 of every entry that counts, on the min-max grid of those with a real zero point."""
    low, high = group_range(values, counts, include_zero=False)
    scale = (high - low) / num_steps
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).unsqueeze(-1)
    steps = ((values - low.unsqueeze(-1)) / scale).round_().clamp_(0, num_steps)
    error = ((steps * scale + low.unsqueeze(-1) - values) * inv_sensitivity).square_()
    return error if counts is None else error * counts
