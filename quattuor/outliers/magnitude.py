# SPDX-License-Identifier: Apache-2.0
"""Entries that are sensitive or far from the others, counted per matrix."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, compose
from quattuor.outliers.base import OutlierRule, Selection
from quattuor.scales.base import Grid

__all__ = ["SensitiveAndLarge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitiveAndLarge(OutlierRule):
    """Keep the entries of largest Fisher information, and of the others those of largest magnitude.

    sensitive: the floor(sensitive_share * numel) entries of largest F; among equal ones the first
    large:     |w| >= T,   T = max(|q25 - rho * IQR|, |q75 + rho * IQR|),   IQR = q75 - q25

    The quartiles are those of the whole matrix. Without `rho` the smallest threshold is taken that leaves
    `large_share` of the entries, to within one: rho follows from the share, matrix by matrix. (The authors tune
    one rho by hand until the share of the whole model is right.)

    Args:
        sensitive_share: Share of entries kept for their F; 0 needs no gradients.
        large_share: Share of entries kept for their magnitude; ignored with `rho`.
        rho: Distance of the threshold from the quartiles; None for the share.

    References:
        Kim et al., 2023, arXiv:2306.07629 (SqueezeLLM), section 4.2.
    """

    sensitive_share: float = 0.0005
    large_share: float = 0.004
    rho: float | None = None

    def __post_init__(self) -> None:
        """Reject shares that are none, and a threshold inside the quartiles."""
        shares = (self.sensitive_share, self.large_share)
        if not all(0 <= share < 0.5 for share in shares) or (self.rho is not None and not self.rho >= 0):
            raise InputError(
                compose(
                    subject="sensitive_share, large_share, rho",
                    value=(*shares, self.rho),
                    constraint="do not select a small part of a matrix",
                    place="SensitiveAndLarge",
                    remedy="use shares from 0 to below 0.5, for example 0.0005 and 0.004, and rho >= 0 or None",
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """Squared gradients, for sensitive entries."""
        return frozenset({"fisher"}) if self.sensitive_share else frozenset()

    def select(self, weight: Float[Tensor, "N K"], grid: Grid, statistics: Mapping[str, Tensor]) -> Selection:
        """Return the entries. Raises CalibrationError when the Fisher information does not fit the weight."""
        sensitive_NK = self._sensitive(weight, statistics)
        magnitude_NK = weight.abs().masked_fill(sensitive_NK, -1)
        if self.rho is not None:
            large_NK = magnitude_NK >= threshold(weight, self.rho)
        else:
            large_NK = _top(magnitude_NK, round(self.large_share * weight.numel()))
        return Selection(elements=sensitive_NK | large_NK)

    def _sensitive(self, weight: Float[Tensor, "N K"], statistics: Mapping[str, Tensor]) -> Bool[Tensor, "N K"]:
        count = math.floor(self.sensitive_share * weight.numel())
        if count == 0:
            return torch.zeros_like(weight, dtype=torch.bool)
        fisher = statistics.get("fisher")
        if fisher is None or fisher.shape != weight.shape:
            raise CalibrationError(
                compose(
                    subject="fisher",
                    value="missing" if fisher is None else tuple(fisher.shape),
                    constraint=f"does not fit a weight {tuple(weight.shape)}",
                    place="SensitiveAndLarge",
                    remedy="collect squared gradients of this weight, or use sensitive_share=0",
                )
            )
        return _top(fisher, count)


def threshold(weight: Float[Tensor, "N K"], rho: float) -> Float[Tensor, ""]:
    """Return T = max(|q25 - rho * IQR|, |q75 + rho * IQR|) over the whole matrix."""
    # torch.quantile refuses more than 2^24 elements
    values = weight.flatten().sort().values
    low, high = (torch.lerp(values[int(at)], values[math.ceil(at)], at % 1) for at in _quartiles(len(values)))
    spread = rho * (high - low)
    return torch.maximum((low - spread).abs(), (high + spread).abs())


def _quartiles(count: int) -> tuple[float, float]:
    """Return the positions of the quartiles among so many sorted values."""
    return (count - 1) * 0.25, (count - 1) * 0.75


def _top(scores: Float[Tensor, "N K"], count: int) -> Bool[Tensor, "N K"]:
    """Mark the entries of largest score, exactly so many; among equal ones the first."""
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)
