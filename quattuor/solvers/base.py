# SPDX-License-Identifier: Apache-2.0
"""The contract of a solver: which codes a weight gets."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, compose
from quattuor.outliers.base import OutlierRule
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales.base import Grid

__all__ = ["Solution", "Solver", "hessian_error", "require_statistic"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """A solved weight and what the solver has to report about it.

    Args:
        tensor: The packed weight.
        error: tr((W - Q) H (W - Q)^T) / tr(W H W^T), or the same with H = I when the solver saw no Hessian.
        notes: Anything that departs from the plain run (dead columns, raised damping).
    """

    tensor: QuantizedTensor
    error: float
    notes: tuple[str, ...] = ()


class Solver(ABC):
    """Chooses codes. Sees tensors, never modules; computes in float32."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Names of the statistics of the layer's input that `solve` reads (see `calibration/statistics.py`)."""

    @property
    def rows_interact(self) -> bool:
        """Whether the codes of a row depend on other rows, so that weights cannot be stacked."""
        return False

    def reason_against(self, outliers: OutlierRule) -> str | None:
        """Return why this solver cannot keep what a rule selects, or None when it can."""
        return f"{type(self).__name__} rounds every entry"

    @abstractmethod
    def solve(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        statistics: Mapping[str, Tensor],
        outliers: OutlierRule | None = None,
    ) -> Solution:
        """Return the packed weight.

        Args:
            weight: The matrix to approximate.
            grid: The numbers its elements can take.
            statistics: One tensor per name in `needs`, and in the rule's.
            outliers: What is kept in high precision; only a rule that `reason_against` accepts.

        Raises:
            CalibrationError: The statistics cannot support the method.
        """


def require_statistic(
    weight: Float[Tensor, "N K"], statistics: Mapping[str, Tensor], name: str, place: str
) -> Float[Tensor, "K K"]:
    """Return a `[K, K]` statistic of the weight's input, in the dtype of the weight.

    Raises:
        InputError: It is missing, or belongs to an input of another size.
        CalibrationError: It is not finite.
    """
    in_features = weight.shape[1]
    matrix = statistics.get(name)
    if matrix is None or tuple(matrix.shape) != (in_features, in_features):
        raise InputError(
            compose(
                subject=name,
                value="missing" if matrix is None else tuple(matrix.shape),
                constraint=f"is not the [{in_features}, {in_features}] of a weight {tuple(weight.shape)}",
                place=place,
                remedy="pass the statistics of this layer's own input",
            )
        )
    if not bool(torch.isfinite(matrix).all()):
        raise CalibrationError(
            compose(
                subject=name,
                value=f"{int((~torch.isfinite(matrix)).sum())} entries",
                constraint="are NaN or infinite",
                place=place,
                remedy="look for the first layer whose activations are not finite, and run the model in float32",
            )
        )
    return matrix.to(weight.dtype)


def hessian_error(
    weight: Float[Tensor, "N K"], approximation: Float[Tensor, "N K"], hessian: Float[Tensor, "K K"] | None
) -> float:
    """Relative output error tr(D H D^T) / tr(W H W^T) with D = W - Q; H = I when `hessian` is None.

    Computes in float32, or float64 when the weight is. A weight without output energy has error 0.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))

    def energy(matrix: Float[Tensor, "N K"]) -> Tensor:
        return (matrix.square() if hessian is None else (matrix @ hessian.to(matrix.dtype)) * matrix).sum()

    total = energy(weight)
    return float(energy(weight - approximation.to(weight.dtype)) / total) if total > 0 else 0.0
