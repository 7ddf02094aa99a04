# SPDX-License-Identifier: Apache-2.0
"""Codebooks of the smallest weighted error: k-means in one dimension, per group."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.codebook import Codebook
from quattuor.scales.base import ScaleDtype, ScaleRule
from quattuor.scales.clustering import (
    SortedRows,
    coarse_bounds,
    companded_bounds,
    exact_bounds,
    improve_bounds,
    lloyd_bounds,
    total_gain,
)

__all__ = ["WeightedKMeans"]

# A dynamic program over few runs costs about runs^1.5 * entries; above this many entries it is not worth it.
MAX_COARSE_ENTRIES = 32
COARSE_RUNS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedKMeans(ScaleRule):
    """Choose the codebook c that minimises sum_j importance_j (x_j - nearest entry)^2 in every group.

    method="search"  the best of three: dynamic programming over runs of points instead of points, and Lloyd's
                     iteration from the symmetric and from the min-max uniform grid; then improved by dynamic
                     programming over windows around its bounds. The error is never above that of a uniform grid,
                     and on weights of real size within a permille of the smallest one.
    method="exact"   dynamic programming over all points: the smallest error there is, ten times slower.

    Entries are rounded to `scale_dtype` at the end. Elements of zero importance influence nothing; a group without
    importance counts every element once. Computes in float64.

    Args:
        method: See above.
        num_rounds: Most iterations of Lloyd per start.
        scale_dtype: How the entries are stored.

    References:
        Kim et al., 2023, arXiv:2306.07629 (SqueezeLLM), equation (3); the authors' code starts from k-means++.
    """

    method: Literal["search", "exact"] = "search"
    num_rounds: int = 50
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Reject a method that does not exist and an empty iteration."""
        if self.method not in ("search", "exact") or self.num_rounds < 1:
            raise InputError(
                compose(
                    subject="method, num_rounds",
                    value=(self.method, self.num_rounds),
                    constraint="do not describe a clustering",
                    place="WeightedKMeans",
                    remedy='use method "search" or "exact" and num_rounds >= 1',
                )
            )

    def check(self, number_format: Format) -> None:
        """Refuse what is not a codebook."""
        if not isinstance(number_format, Codebook):
            raise UnsupportedError(
                compose(
                    subject="format",
                    value=number_format,
                    constraint="has no codebook",
                    place="WeightedKMeans",
                    remedy="use Codebook(bits), or AbsMax() as the scale rule of Integer(bits)",
                )
            )

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `codebook` `[R, G, 2^bits]`. Raises InputError when an importance is negative or not finite."""
        self.check(number_format)
        num_entries = 2**number_format.bits
        weight = torch.ones_like(values) if importance is None else importance.expand(values.shape)
        if not bool((weight >= 0).all()) or not bool(torch.isfinite(weight).all()):
            raise InputError(
                compose(
                    subject="importance",
                    value=float(weight.min()),
                    constraint="is negative or not finite",
                    place="WeightedKMeans",
                    remedy="pass squared gradients or the diagonal of a Hessian",
                )
            )
        rows = SortedRows.of(values.flatten(0, 1), weight.flatten(0, 1))
        bounds = exact_bounds(rows, num_entries) if self.method == "exact" else self._search(rows, num_entries)
        entries = self._store(rows.centroids(bounds))
        return Parameters(codebook=entries.view(*values.shape[:2], num_entries))

    def _search(self, rows: SortedRows, num_entries: int) -> Int64[Tensor, "R bounds"]:
        """Return the best bounds that a local search finds."""
        if num_entries <= MAX_COARSE_ENTRIES:
            best = coarse_bounds(rows, num_entries, max(COARSE_RUNS, 4 * num_entries))
        else:
            start = rows.centroids(companded_bounds(rows, num_entries))
            best = lloyd_bounds(rows, start, self.num_rounds)
        for grid in _uniform_grids(rows, num_entries):
            bounds = lloyd_bounds(rows, grid, self.num_rounds)
            better = total_gain(rows, bounds) > total_gain(rows, best)
            best = torch.where(better[:, None], bounds, best)
        return improve_bounds(rows, best)

    def _store(self, entries: Float[Tensor, "P C"]) -> Float[Tensor, "P C"]:
        """Round to the stored dtype. Raises UnsupportedError when an entry is beyond its range."""
        stored = entries.to(getattr(torch, self.scale_dtype))
        if bool(stored.isinf().any()):
            raise UnsupportedError(
                compose(
                    subject="codebook entry",
                    value=float(entries.abs().max()),
                    constraint=f"is beyond the range of {self.scale_dtype}",
                    place="WeightedKMeans",
                    remedy='use scale_dtype="float32", or repair the weight it comes from',
                )
            )
        return stored


def _uniform_grids(rows: SortedRows, num_entries: int) -> list[Float[Tensor, "P C"]]:
    """Return the symmetric and the min-max grid that round to nearest would use, ascending."""
    steps_C = torch.arange(num_entries, device=rows.points.device, dtype=rows.points.dtype)
    low_P1, high_P1 = _range(rows)
    half = num_entries // 2
    largest_P1 = torch.maximum(low_P1.abs(), high_P1.abs())
    low_P1, high_P1 = low_P1.clamp(max=0), high_P1.clamp(min=0)
    return [
        largest_P1 / max(1, half - 1) * (steps_C - half),
        low_P1 + (high_P1 - low_P1) * steps_C / (num_entries - 1),
    ]


def _range(rows: SortedRows) -> tuple[Float[Tensor, "P 1"], Float[Tensor, "P 1"]]:
    """Return the smallest and the largest point that has weight."""
    has_weight = rows.weights.diff(dim=1) > 0
    first = has_weight.to(torch.uint8).argmax(dim=1, keepdim=True)
    last = has_weight.shape[1] - 1 - has_weight.flip(1).to(torch.uint8).argmax(dim=1, keepdim=True)
    return rows.points.gather(1, first), rows.points.gather(1, last)
