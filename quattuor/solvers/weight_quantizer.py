# SPDX-License-Identifier: Apache-2.0
"""How one weight is quantized: a grid and the solver that chooses codes on it."""

from dataclasses import dataclass, field

from quattuor.formats.base import Format
from quattuor.granularity import Granularity
from quattuor.scales.base import Grid, ScaleRule
from quattuor.solvers.base import Solver
from quattuor.solvers.nearest import Nearest

__all__ = ["WeightQuantizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQuantizer:
    """One choice per weight axis: which numbers, who shares parameters, how they are fitted, which codes."""

    number_format: Format
    granularity: Granularity
    scales: ScaleRule
    solver: Solver = field(default_factory=Nearest)

    @property
    def grid(self) -> Grid:
        """The three choices that make the grid."""
        return Grid(number_format=self.number_format, granularity=self.granularity, scales=self.scales)
