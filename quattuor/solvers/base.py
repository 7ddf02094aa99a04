# SPDX-License-Identifier: Apache-2.0
"""The contract of a solver: which codes a weight gets."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales.base import Grid

__all__ = ["Solution", "Solver", "hessian_error"]


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

    @abstractmethod
    def solve(self, weight: Float[Tensor, "N K"], grid: Grid, statistics: Mapping[str, Tensor]) -> Solution:
        """Return the packed weight.

        Args:
            weight: The matrix to approximate.
            grid: The numbers its elements can take.
            statistics: One tensor per name in `needs`.

        Raises:
            CalibrationError: The statistics cannot support the method.
        """


def hessian_error(
    weight: Float[Tensor, "N K"], approximation: Float[Tensor, "N K"], hessian: Float[Tensor, "K K"] | None
) -> float:
    """Relative output error tr(D H D^T) / tr(W H W^T) with D = W - Q; H = I when `hessian` is None."""

    def energy(matrix: Float[Tensor, "N K"]) -> Tensor:
        return (matrix.square() if hessian is None else (matrix @ hessian) * matrix).sum()

    total = energy(weight)
    return float(energy(weight - approximation) / total) if total > 0 else 0.0
