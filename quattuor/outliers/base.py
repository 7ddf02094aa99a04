# SPDX-License-Identifier: Apache-2.0
"""The contract of an outlier rule: which entries of a weight stay in high precision."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from quattuor.scales.base import Grid

__all__ = ["OutlierRule", "Selection"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What is kept out of rounding: whole columns, single entries, or both.

    Args:
        columns: Distinct input columns, int64 [k], or None.
        elements: True where an entry is kept, [N, K], or None.
    """

    columns: Int64[Tensor, " k"] | None = None
    elements: Bool[Tensor, "N K"] | None = None


class OutlierRule(ABC):
    """Selects entries before anything is rounded. Sees tensors, never modules."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Names of the statistics that `select` reads, as for a solver."""

    def planned(self, shapes: Sequence[tuple[int, int]], bits: int) -> "OutlierRule":
        """Return the rule for a whole model; the rule itself when weights do not share a budget.

        Args:
            shapes: (N, K) of every linear that it applies to.
            bits: Width of their codes.
        """
        return self

    @abstractmethod
    def select(self, weight: Float[Tensor, "N K"], grid: Grid, statistics: Mapping[str, Tensor]) -> Selection:
        """Return what stays in high precision."""
