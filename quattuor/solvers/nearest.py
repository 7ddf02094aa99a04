# SPDX-License-Identifier: Apache-2.0
"""Round every weight to the nearest number of its grid."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quattuor.deltas import ColumnDelta, Delta, ElementDelta
from quattuor.errors import CalibrationError, compose
from quattuor.outliers.base import OutlierRule, Selection
from quattuor.outliers.error_threshold import ErrorThreshold
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales.base import Grid
from quattuor.solvers.base import Solution, Solver, hessian_error, require_statistic

__all__ = ["Nearest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest(Solver):
    """codes = encode(W): no feedback between columns.

    Single entries that a rule selects do not count in the fit of the grid. They are encoded like the others, and
    what their codes lack is stored as float16 additions: the smaller the rest, the smaller its rounding error.

    Args:
        weighted: Weight the scale search by a statistic, which then is needed.
        sensitivity: The statistic: the diagonal of the Hessian, one number per column, or the Fisher information,
            one per weight.
    """

    weighted: bool = False
    sensitivity: Literal["hessian", "fisher"] = "hessian"

    @property
    def needs(self) -> frozenset[str]:
        """Nothing, or the statistic for a weighted scale search."""
        return frozenset({self.sensitivity}) if self.weighted else frozenset()

    def reason_against(self, outliers: OutlierRule) -> str | None:
        """Refuse a rule that looks at columns while they are rounded; accept all others."""
        if isinstance(outliers, ErrorThreshold):
            return "it finds entries inside the column feedback (use GPTQ)"
        return None

    def solve(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        statistics: Mapping[str, Tensor],
        outliers: OutlierRule | None = None,
    ) -> Solution:
        """Return the rounded weight."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        is_hessian = self.weighted and self.sensitivity == "hessian"
        hessian = require_statistic(weight, statistics, "hessian", "Nearest") if is_hessian else None
        importance = None if hessian is None else hessian.diagonal()
        if self.weighted and self.sensitivity == "fisher":
            importance = _fisher(weight, statistics)
        selection = Selection() if outliers is None else outliers.select(weight, grid, statistics)
        kept_NK = _kept(weight, selection)
        if kept_NK is not None:
            importance = _without(kept_NK, importance, weight)
        parameters = grid.fit(weight, importance)
        grouped = grid.number_format.encode(grid.granularity.split(weight), parameters)
        codes = grid.granularity.merge(grouped, (weight.shape[0], weight.shape[1]))
        tensor = QuantizedTensor.from_codes(codes, parameters, grid.number_format, grid.granularity)
        if kept_NK is not None:
            additions_NK = weight - tensor.decode_codes().to(weight.dtype)
            tensor = replace(tensor, delta=_delta(additions_NK, kept_NK, selection))
        return Solution(tensor=tensor, error=hessian_error(weight, tensor.decode(), hessian))


def _fisher(weight: Float[Tensor, "N K"], statistics: Mapping[str, Tensor]) -> Float[Tensor, "N K"]:
    """Return the Fisher information of the weight; a row without any counts every weight once."""
    fisher = statistics.get("fisher")
    if fisher is None or fisher.shape != weight.shape or not bool((fisher >= 0).all()):
        found = "missing" if fisher is None else f"{tuple(fisher.shape)}, smallest {float(fisher.min()):.3g}"
        raise CalibrationError(
            compose(
                subject="fisher",
                value=found,
                constraint=f"is not the squared gradient of a weight {tuple(weight.shape)}",
                place="Nearest",
                remedy="collect it with calibration.fisher, for this weight",
            )
        )
    has_any_N1 = fisher.sum(dim=1, keepdim=True) > 0
    return torch.where(has_any_N1, fisher, torch.ones_like(fisher)).to(weight.dtype)


def _kept(weight: Float[Tensor, "N K"], selection: Selection) -> Bool[Tensor, "N K"] | None:
    """Return which entries stay in high precision, or None when none do."""
    if selection.columns is None:
        return selection.elements
    kept_NK = torch.zeros_like(weight, dtype=torch.bool)
    kept_NK[:, selection.columns] = True
    return kept_NK if selection.elements is None else kept_NK | selection.elements


def _delta(additions: Float[Tensor, "N K"], kept: Bool[Tensor, "N K"], selection: Selection) -> Delta:
    """Return what is added to the codes, as whole columns where only those are kept."""
    elements = ElementDelta.from_dense(additions, kept)  # refuses what float16 cannot hold
    if selection.columns is None or selection.elements is not None:
        return elements
    values_Nk = additions[:, selection.columns].to(torch.float16)
    return ColumnDelta(indices=selection.columns.to(torch.int32), values=values_Nk)


def _without(
    kept: Bool[Tensor, "N K"], importance: Float[Tensor, "*N K"] | None, weight: Float[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """Return the importance with nothing for the entries that are kept."""
    own = torch.ones_like(weight) if importance is None else importance.expand(weight.shape)
    return own.masked_fill(kept, 0)
