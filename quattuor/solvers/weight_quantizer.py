# SPDX-License-Identifier: Apache-2.0
"""How one weight is quantized: a grid and the solver that chooses codes on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.formats.base import Format
from quattuor.granularity import Granularity
from quattuor.scales.base import Grid, ScaleRule
from quattuor.solvers.base import Solution, Solver, hessian_error
from quattuor.solvers.nearest import Nearest

__all__ = ["WeightQuantizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQuantizer:
    """One choice per weight axis: which numbers, who shares parameters, how they are fitted, which codes."""

    number_format: Format
    granularity: Granularity
    scales: ScaleRule
    solver: Solver = field(default_factory=Nearest)

    def __post_init__(self) -> None:
        """Refuse a scale rule that does not serve the format."""
        self.scales.check(self.number_format)

    @property
    def grid(self) -> Grid:
        """The three choices that make the grid."""
        return Grid(number_format=self.number_format, granularity=self.granularity, scales=self.scales)

    def solve(self, weights: Sequence[Float[Tensor, "_ K"]], statistics: Mapping[str, Tensor]) -> list[Solution]:
        """Quantize weights that read the same input: stacked and solved once where rows do not interact.

        Returns:
            One solution per weight, with its own error.
        """
        stacked = torch.cat(list(weights))
        rows_interact = self.granularity.split(stacked).shape[0] != stacked.shape[0]
        if len(weights) == 1 or rows_interact:
            return [self.solver.solve(weight, self.grid, statistics) for weight in weights]
        whole = self.solver.solve(stacked, self.grid, statistics)
        hessian = statistics["hessian"] if "hessian" in self.solver.needs else None
        solutions, start = [], 0
        for weight in weights:
            tensor = whole.tensor.rows(start, start + weight.shape[0])
            error = hessian_error(weight, tensor.decode(), hessian)
            solutions.append(Solution(tensor=tensor, error=error, notes=whole.notes))
            start += weight.shape[0]
        return solutions
