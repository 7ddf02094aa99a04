# SPDX-License-Identifier: Apache-2.0
"""Input columns whose rounding error matters most for the output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.outliers.base import OutlierRule, Selection
from quattuor.scales.base import Grid

__all__ = ["WeakColumns"]

BITS_PER_ENTRY, BITS_PER_INDEX = 16, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class WeakColumns(OutlierRule):
    """Keep the k columns of largest sensitivity.

    sensitivity_j = H_jj |W_:j - Q(W)_:j|^2, with Q rounding to nearest on a grid fitted to the whole weight

    k is `num_columns`, or follows from a budget of bits. Within a model all linears get about as many parameters
    k_l * N_l, which makes

    sum_l k_l (16 N_l + 32) = (target_bits - b) sum_l N_l K_l

    A weight on its own gets the bits of its own budget.

    Args:
        target_bits: Bits per weight of codes, kept columns and their indices together; scales and zero points come
            on top. None when `num_columns` is given.
        num_columns: k of every weight, at most all its columns. None when `target_bits` is given.
        weighted_by_error: Off gives sensitivity_j = H_jj, as an option of the authors' code.
        num_parameters: k_l * N_l of every linear, filled in for a model by `planned`.

    References:
        Lee et al., 2023, arXiv:2306.02272 (OWQ). The budget there counts 16 - b bits for an entry, although codes
        of kept columns are stored as well.
    """

    target_bits: float | None = None
    num_columns: int | None = None
    weighted_by_error: bool = True
    num_parameters: float | None = None

    def __post_init__(self) -> None:
        """Reject two budgets, none, or a negative one."""
        is_count = self.num_columns is not None and self.num_columns >= 0
        is_target = self.target_bits is not None and 0 < self.target_bits < 16
        if is_count == is_target or (self.target_bits is not None and not is_target):
            raise InputError(
                compose(
                    subject="target_bits, num_columns",
                    value=(self.target_bits, self.num_columns),
                    constraint="are not one budget",
                    place="WeakColumns",
                    remedy="give target_bits, for example 3.1, or num_columns, for example 6",
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian."""
        return frozenset({"hessian"})

    def planned(self, shapes: Sequence[tuple[int, int]], bits: int) -> "WeakColumns":
        """Return the rule with the budget of a whole model shared out.

        Args:
            shapes: (N, K) of every linear that it applies to.
            bits: Width of their codes.
        """
        if self.target_bits is None or not shapes:
            return self
        num_weights = sum(num_rows * num_columns for num_rows, num_columns in shapes)
        cost = sum(BITS_PER_ENTRY + BITS_PER_INDEX / num_rows for num_rows, _ in shapes)
        return replace(self, num_parameters=self._spare_bits(bits) * num_weights / cost)

    def count(self, shape: tuple[int, int], bits: int) -> int:
        """Return k for a weight (N, K) with codes of so many bits."""
        num_rows, num_columns = shape
        if self.num_columns is not None:
            return min(self.num_columns, num_columns)
        parameters = self.num_parameters
        if parameters is None:
            cost = BITS_PER_ENTRY + BITS_PER_INDEX / num_rows
            parameters = self._spare_bits(bits) * num_rows * num_columns / cost
        return min(round(parameters / num_rows), num_columns)

    def select(self, weight: Float[Tensor, "N K"], grid: Grid, statistics: Mapping[str, Tensor]) -> Selection:
        """Return the columns, ascending."""
        k = self.count((weight.shape[0], weight.shape[1]), grid.number_format.bits)
        if k == 0:
            return Selection()
        sensitivity_K = statistics["hessian"].diagonal().to(weight.dtype)
        if self.weighted_by_error:
            parameters = grid.fit(weight, sensitivity_K.clamp(min=torch.finfo(weight.dtype).tiny))
            rounded = grid.number_format.fake_quantize(grid.granularity.split(weight), parameters)
            rounded_NK = grid.granularity.merge(rounded, (weight.shape[0], weight.shape[1]))
            sensitivity_K = sensitivity_K * (weight - rounded_NK).square().sum(dim=0)
        order_K = torch.argsort(sensitivity_K, descending=True, stable=True)
        return Selection(columns=order_K[:k].sort().values)

    def _spare_bits(self, bits: int) -> float:
        """Return what the budget leaves beside the codes."""
        assert self.target_bits is not None, "checked by the caller"
        if self.target_bits < bits:
            raise InputError(
                compose(
                    subject="target_bits",
                    value=self.target_bits,
                    constraint=f"is less than the {bits} bits of a code",
                    place="WeakColumns",
                    remedy=f"use a target above {bits}, for example {bits}.01, or fewer bits",
                )
            )
        return self.target_bits - bits
