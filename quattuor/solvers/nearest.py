# SPDX-License-Identifier: Apache-2.0
"""Round every weight to the nearest number of its grid."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.outliers.base import OutlierRule
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales.base import Grid
from quattuor.solvers.base import Solution, Solver, hessian_error, require_statistic

__all__ = ["Nearest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest(Solver):
    """codes = encode(W): no statistics, no feedback.

    Args:
        weighted: Weight the scale search by the diagonal of the Hessian, which then is a needed statistic.
    """

    weighted: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Nothing, or the Hessian for a weighted scale search."""
        return frozenset({"hessian"}) if self.weighted else frozenset()

    def solve(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        statistics: Mapping[str, Tensor],
        outliers: OutlierRule | None = None,
    ) -> Solution:
        """Return the rounded weight."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        hessian = require_statistic(weight, statistics, "hessian", "Nearest") if self.weighted else None
        parameters = grid.fit(weight, None if hessian is None else hessian.diagonal())
        grouped = grid.number_format.encode(grid.granularity.split(weight), parameters)
        codes = grid.granularity.merge(grouped, (weight.shape[0], weight.shape[1]))
        tensor = QuantizedTensor.from_codes(codes, parameters, grid.number_format, grid.granularity)
        return Solution(tensor=tensor, error=hessian_error(weight, tensor.decode(), hessian))
