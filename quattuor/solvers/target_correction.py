# SPDX-License-Identifier: Apache-2.0
"""Aim a solver at the original model's outputs although its inputs are already those of the quantized one.

Let x be the original input of a layer and v the input it will see. The weight that reproduces W x from v best is

    W* = argmin E |W x - W* v|^2 = W E[x v^T] E[v v^T]^-1,

so that solving for W* instead of W takes back errors of earlier layers as far as they can be seen in v.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, compose
from quattuor.outliers.base import OutlierRule
from quattuor.scales.base import Grid
from quattuor.solvers.base import Solution, Solver, hessian_error, require_statistic
from quattuor.solvers.column_feedback import GPTQ

__all__ = ["TargetCorrection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCorrection(Solver):
    """Solve for W* = W + strength * W (C - H) (H + damping * mean(diag H) I)^-1 instead of W.

    H = E[v v^T] is the Hessian of the inputs that the layer will see, C = E[x v^T] their correlation with the
    original inputs. The reported error is that against W, as for every solver.

    Args:
        inner: Chooses codes for W*.
        strength: 1 for the least-squares target, 0 for W itself.
        damping: Ridge that keeps directions without data where they are.

    References:
        Li et al., 2025, arXiv:2504.02692 (asymmetric calibration; there inside the column loop).
    """

    inner: Solver = field(default_factory=GPTQ)
    strength: float = 1.0
    damping: float = 0.01

    def __post_init__(self) -> None:
        """Reject strengths and dampings without meaning."""
        if not 0 <= self.strength <= 1 or self.damping <= 0:
            raise InputError(
                compose(
                    subject="strength, damping",
                    value=(self.strength, self.damping),
                    constraint="are out of range",
                    place="TargetCorrection",
                    remedy="use 0 <= strength <= 1 and damping > 0",
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian, the correlation with the original inputs, and what the inner solver needs."""
        return self.inner.needs | {"hessian", "cross"}

    @property
    def rows_interact(self) -> bool:
        """As for the inner solver."""
        return self.inner.rows_interact

    def reason_against(self, outliers: OutlierRule) -> str | None:
        """Accept what the inner solver accepts."""
        return self.inner.reason_against(outliers)

    def solve(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        statistics: Mapping[str, Tensor],
        outliers: OutlierRule | None = None,
    ) -> Solution:
        """Return the packed weight for the corrected target."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        hessian_KK = require_statistic(weight, statistics, "hessian", "TargetCorrection")
        cross_KK = require_statistic(weight, statistics, "cross", "TargetCorrection")
        damped_KK = hessian_KK.clone()
        damped_KK.diagonal().add_(self.damping * hessian_KK.diagonal().mean())
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
        if int(info) != 0:
            raise CalibrationError(
                compose(
                    subject="hessian",
                    value=tuple(hessian_KK.shape),
                    constraint=f"is not positive definite with damping={self.damping}",
                    place="TargetCorrection",
                    remedy="raise damping to 0.1, or calibrate with more tokens than input features",
                )
            )
        drift_NK = weight @ (cross_KK - hessian_KK)
        correction_NK = torch.cholesky_solve(drift_NK.T, lower_KK).T
        solution = self.inner.solve(weight + self.strength * correction_NK, grid, statistics, outliers)
        return replace(solution, error=hessian_error(weight, solution.tensor.decode(), hessian_KK))
