# SPDX-License-Identifier: Apache-2.0
"""How one weight is quantized: a grid, the solver that chooses codes on it, and what is kept out of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import UnsupportedError, compose
from quattuor.formats.base import Format
from quattuor.granularity import Granularity
from quattuor.outliers.base import OutlierRule
from quattuor.scales.base import Grid, ScaleRule
from quattuor.seeds import derive_seed
from quattuor.solvers.base import Solution, Solver, hessian_error, require_statistic
from quattuor.solvers.nearest import Nearest
from quattuor.transforms.base import WeightTransform

__all__ = ["WeightQuantizer", "WeightToQuantize"]

IN_ANY_BASIS = frozenset({"hessian", "inputs"})
"""Statistics that a change of basis can follow."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightToQuantize:
    """One of the weights that read the same input.

    Args:
        name: Full name of its linear; with the run's seed it seeds every random choice.
        weight: The matrix.
        statistics: Those that belong to this weight alone, for example "fisher" [N, K].
    """

    name: str
    weight: Float[Tensor, "N K"]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightQuantizer:
    """One choice per weight axis.

    Args:
        number_format: Which numbers exist.
        granularity: Who shares parameters.
        scales: How parameters are fitted.
        solver: Which codes are chosen.
        outliers: What stays in high precision; None rounds everything.
        transform: A basis of each weight's own, undone at run time; None leaves the weight as it is.
    """

    number_format: Format
    granularity: Granularity
    scales: ScaleRule
    solver: Solver = field(default_factory=Nearest)
    outliers: OutlierRule | None = None
    transform: WeightTransform | None = None

    def __post_init__(self) -> None:
        """Refuse a scale rule that does not serve the format, and outliers that the solver would round."""
        self.scales.check(self.number_format)
        reason = None if self.outliers is None else self.solver.reason_against(self.outliers)
        if reason is not None:
            raise UnsupportedError(
                compose(
                    subject="outliers",
                    value=self.outliers,
                    constraint=f"cannot be kept by {type(self.solver).__name__}: {reason}",
                    place="WeightQuantizer",
                    remedy="choose another solver, or outliers=None",
                )
            )

        lost = frozenset[str]() if self.transform is None else self.needs - IN_ANY_BASIS
        if lost:
            raise UnsupportedError(
                compose(
                    subject="transform",
                    value=self.transform,
                    constraint=f"has no counterpart of {', '.join(sorted(lost))} in its basis",
                    place="WeightQuantizer",
                    remedy=f"choose parts that need only {' and '.join(sorted(IN_ANY_BASIS))}, or transform=None",
                )
            )

    @property
    def grid(self) -> Grid:
        """The three choices that make the grid."""
        return Grid(number_format=self.number_format, granularity=self.granularity, scales=self.scales)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that any part of it reads."""
        extra = frozenset[str]() if self.outliers is None else self.outliers.needs
        basis = frozenset[str]() if self.transform is None else frozenset({"hessian"})
        return self.solver.needs | self.scales.needs | extra | basis

    def solve(
        self, weights: Sequence[WeightToQuantize], statistics: Mapping[str, Tensor], *, seed: int = 0
    ) -> list[Solution]:
        """Quantize weights that read the same input: stacked and solved once where rows do not interact.

        Returns:
            One solution per weight, with its own error.
        """
        if len(weights) == 1 or self._rows_interact(weights[0].weight):
            return [self._solve_alone(item, statistics, seed) for item in weights]
        stacked = torch.cat([item.weight for item in weights])
        own = {name: torch.cat([item.statistics[name] for item in weights]) for name in weights[0].statistics}
        whole = self.solver.solve(stacked, self.grid.given(statistics), {**statistics, **own})
        hessian = statistics["hessian"] if "hessian" in self.solver.needs else None
        solutions, start = [], 0
        for item in weights:
            tensor = whole.tensor.rows(start, start + item.weight.shape[0])
            error = hessian_error(item.weight, tensor.decode(), hessian)
            solutions.append(Solution(tensor=tensor, error=error, notes=whole.notes))
            start += item.weight.shape[0]
        return solutions

    def _rows_interact(self, weight: Float[Tensor, "N K"]) -> bool:
        if self.outliers is not None or self.transform is not None or self.number_format.row_group > 1:
            return True
        return self.solver.rows_interact or self.granularity.split(weight).shape[0] != weight.shape[0]

    def _solve_alone(self, item: WeightToQuantize, statistics: Mapping[str, Tensor], seed: int) -> Solution:
        known = {**statistics, **item.statistics}
        if self.transform is None:
            return self.solver.solve(item.weight, self.grid.given(known), known, self.outliers)
        hessian = require_statistic(item.weight, known, "hessian", type(self.transform).__name__)
        changed = self.transform.transform(item.weight, hessian, derive_seed(seed, item.name))
        known = {"hessian": changed.hessian}
        if "inputs" in statistics:
            inputs = statistics["inputs"]
            known["inputs"] = inputs if changed.input_map is None else changed.input_map.apply(inputs)
        solution = self.solver.solve(changed.weight, self.grid.given(known), known, self.outliers)
        if solution.tensor.input_map is not None:
            raise UnsupportedError(
                compose(
                    subject="solver",
                    value=self.solver,
                    constraint=f"orders inputs of its own, inside the basis of {type(self.transform).__name__}",
                    place=item.name,
                    remedy='use GPTQ with order="natural" or groups="static"',
                )
            )
        tensor = replace(solution.tensor, input_map=changed.input_map, output_map=changed.output_map)
        return replace(solution, tensor=tensor, error=hessian_error(item.weight, tensor.decode(), hessian))
