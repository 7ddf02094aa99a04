# SPDX-License-Identifier: Apache-2.0
"""OBQ: round one weight of a row at a time, the cheapest first, and move the free ones to their optimum.

The exact greedy ancestor of the column feedback, where every row has an order and an inverse Hessian of its own.
It costs N K^3 operations and N K^2 numbers of memory, and serves as an oracle for small matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, UnsupportedError, compose
from quattuor.formats.base import Parameters
from quattuor.outliers.base import OutlierRule
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales.base import Grid
from quattuor.solvers.base import Solution, Solver, hessian_error, require_statistic

__all__ = ["OBQ"]

MOST_COLUMNS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class OBQ(Solver):
    """Greedy rounding, row by row.

    With P the inverse of the damped Hessian over the weights of a row that are still free:

    1. round the weight p of smallest (q_p - w_p)^2 / P_pp; but if rounding some weight costs more than half a step
       (it has left the grid), the one of largest error first
    2. w -= P[:, p] (w_p - q_p) / P_pp
    3. P -= P[:, p] P[p, :] / P_pp

    Parameters are fitted to W beforehand, with importance diag(H). All rows advance together. Computes in float64.

    Args:
        damping: Fraction of the mean diagonal added to the diagonal.

    References:
        Frantar et al., 2022, arXiv:2208.11580, Algorithm 3.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        """Reject a damping that cannot be run."""
        if not 0 < self.damping < 1e3:
            raise InputError(
                compose(
                    subject="damping",
                    value=self.damping,
                    constraint="is out of range",
                    place="OBQ",
                    remedy="use damping > 0, for example 0.01",
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian."""
        return frozenset({"hessian"})

    def solve(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        statistics: Mapping[str, Tensor],
        outliers: OutlierRule | None = None,
    ) -> Solution:
        """Return the packed weight.

        Raises:
            UnsupportedError: The weight has too many columns.
            CalibrationError: The damped Hessian is not positive definite.
        """
        assert outliers is None, "checked at construction"
        num_columns = weight.shape[1]
        if num_columns > MOST_COLUMNS:
            raise UnsupportedError(
                compose(
                    subject="in_features",
                    value=num_columns,
                    constraint=f"is above {MOST_COLUMNS}, and every row needs an inverse Hessian of its own",
                    place="OBQ",
                    remedy="use GPTQ()",
                )
            )
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        hessian = require_statistic(weight, statistics, "hessian", "OBQ")
        dead_K = hessian.diagonal() == 0
        weight_NK = torch.where(dead_K, torch.zeros_like(weight), weight)
        importance_K = torch.where(dead_K, torch.ones_like(hessian.diagonal()), hessian.diagonal())
        parameters = grid.fit(weight_NK, importance_K)
        live_NK = self._advance(weight_NK.double(), grid, parameters, self._inverse(hessian, dead_K))
        grouped = grid.number_format.encode(grid.granularity.split(live_NK), parameters)
        codes = grid.granularity.merge(grouped, (weight.shape[0], num_columns))
        tensor = QuantizedTensor.from_codes(codes, parameters, grid.number_format, grid.granularity)
        num_dead = int(dead_K.sum())
        return Solution(
            tensor=tensor,
            error=hessian_error(weight, tensor.decode(), hessian),
            notes=(f"{num_dead} dead input columns set to zero",) if num_dead else (),
        )

    def _inverse(self, hessian: Float[Tensor, "K K"], dead: Bool[Tensor, " K"]) -> Float[Tensor, "K K"]:
        """Return the inverse of the damped Hessian, float64."""
        damped_KK = hessian.double()
        mean = damped_KK.diagonal().sum() / (~dead).sum().clamp(min=1)
        damped_KK.diagonal().masked_fill_(dead, mean).add_(self.damping * mean)
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
        if int(info) != 0 or not bool(mean > 0):
            raise CalibrationError(
                compose(
                    subject="hessian",
                    value=f"{tuple(hessian.shape)}, mean diagonal {float(hessian.diagonal().mean()):.3g}",
                    constraint=f"is not positive definite with damping={self.damping}",
                    place="OBQ",
                    remedy="raise damping to 0.1, or calibrate with more tokens than input features",
                )
            )
        return torch.cholesky_inverse(lower_KK)

    def _advance(
        self,
        live: Float[Tensor, "N K"],
        grid: Grid,
        parameters: Parameters,
        inverse: Float[Tensor, "K K"],
    ) -> Float[Tensor, "N K"]:
        """Round one weight of every row in each of K steps; return numbers of the grid."""
        num_rows, num_columns = live.shape
        rows = torch.arange(num_rows, device=live.device)
        inverse_NKK = inverse.repeat(num_rows, 1, 1)
        is_free_NK = torch.ones_like(live, dtype=torch.bool)
        half_NK = _half_steps(grid, parameters, (num_rows, num_columns))
        for _ in range(num_columns):
            grouped = grid.number_format.fake_quantize(grid.granularity.split(live), parameters)
            nearest_NK = grid.granularity.merge(grouped, (num_rows, num_columns)).double()
            error_NK = (nearest_NK - live).abs()
            diagonal_NK = inverse_NKK.diagonal(dim1=1, dim2=2)
            cost_NK = torch.where(is_free_NK, error_NK.square() / diagonal_NK, torch.inf)
            has_left_NK = is_free_NK & (error_NK > half_NK * (1 + 1e-6))
            worst_N = torch.where(has_left_NK, error_NK, -1.0).argmax(dim=1)
            picked_N = torch.where(has_left_NK.any(dim=1), worst_N, cost_NK.argmin(dim=1))
            row_NK, pivot_N = inverse_NKK[rows, picked_N], diagonal_NK[rows, picked_N]
            final_N = nearest_NK[rows, picked_N]
            shift_N = (live[rows, picked_N] - final_N) / pivot_N
            live = torch.where(is_free_NK, live - shift_N[:, None] * row_NK, live)
            live[rows, picked_N] = final_N
            is_free_NK[rows, picked_N] = False
            inverse_NKK = inverse_NKK - row_NK[:, :, None] * row_NK[:, None, :] / pivot_N[:, None, None]
            # The eliminated row and column only hold rounding noise; a unit pivot keeps divisions defined.
            inverse_NKK[rows, picked_N, picked_N] = 1.0
        return live


def _half_steps(grid: Grid, parameters: Parameters, shape: tuple[int, int]) -> Float[Tensor, "N K"]:
    """Return half the largest distance between neighbouring numbers of each entry's grid."""
    lowest, highest = grid.number_format.code_range
    lead = grid.granularity.split(torch.empty(shape, device="meta")).shape
    dtype = torch.int8 if lowest < 0 else torch.uint8
    device = next(iter(parameters.values())).device
    codes = torch.arange(lowest, highest + 1, device=device).to(dtype).expand(lead[0], lead[1], -1)
    levels = grid.number_format.decode(codes, parameters).double().sort(dim=-1).values
    half = levels.diff(dim=-1).amax(dim=-1, keepdim=True) / 2
    return grid.granularity.merge(half.expand(lead), shape)
