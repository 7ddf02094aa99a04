# SPDX-License-Identifier: Apache-2.0
"""The contract of a scale rule, and the grid that a format, a granularity and a rule make together."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.granularity import Granularity

__all__ = ["Grid", "ScaleDtype", "ScaleRule", "round_scale"]

ScaleDtype = Literal["float32", "float16"]
CACHED_ELEMENTS = 2**16
SMALLEST_SCALE = {"float32": 1e-30, "float16": 2.0**-24}


class ScaleRule(ABC):
    """Chooses the parameters of each group. Computes in the dtype of the values, stores what it returns."""

    @property
    def couples_groups(self) -> bool:
        """Whether the parameters of a group depend on the other groups of its row."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics of the layer's input that `given` reads (see `calibration/statistics.py`)."""
        return frozenset()

    def given(self, statistics: Mapping[str, Tensor], granularity: Granularity) -> "ScaleRule":
        """Return the rule that `fit` is called on, which may hold statistics; itself when it needs none."""
        return self

    @abstractmethod
    def check(self, number_format: Format) -> None:
        """Raise UnsupportedError when the rule has no parameters for this format."""

    @abstractmethod
    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return parameters `[R, G]` for grouped values.

        Args:
            values: The grouped view of a matrix.
            number_format: Which codes exist.
            importance: Non-negative weight of each squared error, broadcastable to `values`; for a weight the
                diagonal of its Hessian. None counts every element once.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The numbers that the elements of a matrix can take: a format, who shares parameters, how they are chosen."""

    number_format: Format
    granularity: Granularity
    scales: ScaleRule

    def __post_init__(self) -> None:
        """Refuse a rule that does not serve the format."""
        self.scales.check(self.number_format)

    def given(self, statistics: Mapping[str, Tensor]) -> "Grid":
        """Return the grid with what its scale rule needs."""
        return replace(self, scales=self.scales.given(statistics, self.granularity))

    def fit(self, weight: Float[Tensor, "N K"], importance: Float[Tensor, "*N K"] | None = None) -> Parameters:
        """Fit the parameters of a matrix; `importance` has one entry per column, or one per weight.

        Raises:
            InputError: A weight is NaN or infinite, so that no scale exists.
        """
        if not bool(torch.isfinite(weight).all()):
            raise InputError(
                compose(
                    subject="weights that are not finite",
                    value=int((~torch.isfinite(weight)).sum()),
                    constraint=f"leave a matrix {tuple(weight.shape)} without a scale",
                    place="Grid.fit",
                    remedy="repair the model, or keep this linear in high precision with a skip rule",
                )
            )
        values = self.granularity.split(weight)
        grouped = None
        if importance is not None:
            is_shared = importance.dim() == 1 and values.shape[0] == weight.shape[0]
            rows = 1 if is_shared else weight.shape[0]
            grouped = self.granularity.split(importance.to(weight.dtype).expand(rows, -1))
        # Rows are independent, and a search passes over its values many times: on a CPU a few rows at a time
        # stay in the cache.
        num_rows = len(values) if weight.is_cuda else max(1, CACHED_ELEMENTS * len(values) // weight.numel())
        num_rows = -(-num_rows // self.number_format.row_group) * self.number_format.row_group
        importances = [grouped] * -(-len(values) // num_rows)
        if grouped is not None and grouped.shape[0] == values.shape[0]:
            importances = list(grouped.split(num_rows))
        parts = [
            self.scales.fit(chunk, self.number_format, part)
            for chunk, part in zip(values.split(num_rows), importances, strict=True)
        ]
        return Parameters(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def round_scale(scale: Float[Tensor, "..."], scale_dtype: ScaleDtype) -> Float[Tensor, "..."]:
    """Round a scale to the dtype that is stored, keeping its sign and keeping it away from zero.

    A group of zeros has scale 1, so that it decodes to zero and divides safely.

    Raises:
        UnsupportedError: The stored dtype has no number that large.
    """
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    floor = SMALLEST_SCALE[scale_dtype]
    scale = torch.where(scale.abs() < floor, torch.full_like(scale, floor).copysign(scale), scale)
    stored = scale.to(getattr(torch, scale_dtype))
    if bool(stored.isinf().any()):
        raise UnsupportedError(
            compose(
                subject="scale",
                value=float(scale.abs().amax()),
                constraint=f"is beyond the range of {scale_dtype}",
                place="round_scale",
                remedy='use scale_dtype="float32", or repair the weight it comes from',
            )
        )
    return stored
