# SPDX-License-Identifier: Apache-2.0
"""Scale and zero point found together: every smaller window, at every position around zero.

With the squared error the search is exact and cheap. Once a group is sorted, the entries that a window rounds to
one code are neighbours, and their error s^2 j^2 S0 - 2 s j S1 + S2 needs only sums of importance, importance * x
and importance * x^2 over them, which running sums give. A candidate then costs one binary search per code, not one
pass over the group.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.scales.base import ScaleDtype, ScaleRule, round_scale
from quattuor.scales.minmax import group_range, require_zero_point

__all__ = ["WindowSearch"]

BATCH_ELEMENTS = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSearch(ScaleRule):
    """Try num_steps scales times every zero point, and keep the pair with the smallest error of each group.

    scale_i = (i / num_steps) (high - low) / (2^b - 1),   i = num_steps, ..., 1
    zero_point = 0, ..., 2^b - 1
    error = sum_j importance_j |Q(x_j) - x_j|^norm

    The window always contains zero. The first minimiser wins, larger scales and smaller zero points first. Entries
    whose importance is 0 do not count, neither in the range nor in the error.

    Args:
        num_steps: Steps that the whole range is divided into.
        norm: Exponent of the error. 2 is exact in a fraction of the time of others, which look at every entry for
            every candidate.
        weighted: Use the importance that the solver offers as a weight; off counts every entry alike that counts.
        scale_dtype: How the scale is stored, and therefore rounded.

    References:
        Lee et al., 2023, arXiv:2306.02272 (OWQ; code: norm 2.4, unweighted, 100 steps).
    """

    num_steps: int = 100
    norm: float = 2.0
    weighted: bool = True
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Reject an empty search."""
        if self.num_steps < 1 or self.norm <= 0:
            raise InputError(
                compose(
                    subject="num_steps, norm",
                    value=(self.num_steps, self.norm),
                    constraint="do not describe a search",
                    place="WindowSearch",
                    remedy="use num_steps >= 1 and norm > 0",
                )
            )

    def check(self, number_format: Format) -> None:
        """Refuse formats without a zero point."""
        require_zero_point(number_format, "WindowSearch")

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `scale` and `zero_point`."""
        highest = require_zero_point(number_format, "WindowSearch").code_range[1]
        low_RG, high_RG = group_range(values, importance, include_zero=True)
        weights = torch.ones_like(values) if importance is None else importance.expand_as(values)
        weights = weights.to(values.dtype) if self.weighted else (weights > 0).to(values.dtype)
        errors_of = _SquaredErrors(values, weights) if self.norm == 2 else _PlainErrors(values, weights, self.norm)
        best_scale = torch.empty_like(low_RG)
        best_zero = torch.zeros(low_RG.shape, dtype=torch.int64, device=values.device)
        best_error = torch.full(low_RG.shape, torch.inf, dtype=torch.float64, device=values.device)
        fractions = torch.arange(self.num_steps, 0, -1, device=values.device, dtype=values.dtype) / self.num_steps
        for some in fractions.split(max(1, BATCH_ELEMENTS // (low_RG.numel() * 2 * highest))):
            scale_RGC = (high_RG - low_RG).unsqueeze(-1) * some / highest
            scale_RGC = round_scale(scale_RGC, self.scale_dtype).to(values.dtype)
            error, index = errors_of(scale_RGC, highest).flatten(-2).min(dim=-1)
            is_better = error < best_error
            scale = scale_RGC.gather(-1, (index // (highest + 1)).unsqueeze(-1)).squeeze(-1)
            best_error = torch.where(is_better, error, best_error)
            best_scale = torch.where(is_better, scale, best_scale)
            best_zero = torch.where(is_better, index % (highest + 1), best_zero)
        stored = best_scale.to(getattr(torch, self.scale_dtype))
        return Parameters(scale=stored, zero_point=best_zero.to(torch.uint8))


class _PlainErrors:
    """Error of every zero point, by rounding every entry."""

    def __init__(self, values: Float[Tensor, "R G S"], weights: Float[Tensor, "R G S"], norm: float) -> None:
        """Keep the entries."""
        self.values, self.weights, self.norm = values, weights, norm

    def __call__(self, scales: Float[Tensor, "R G C"], highest: int) -> Float[Tensor, "R G C Z"]:
        """Return one error per scale and zero point, float64."""
        errors = [self._of(scale.unsqueeze(-1), highest) for scale in scales.unbind(-1)]
        return torch.stack(errors, dim=-2)

    def _of(self, scale: Float[Tensor, "R G 1"], highest: int) -> Float[Tensor, "R G Z"]:
        steps = torch.round(self.values / scale)
        errors = []
        for zero in range(highest + 1):
            difference = steps.clamp(-zero, highest - zero).mul_(scale).sub_(self.values)
            errors.append((difference.abs_().pow_(self.norm) * self.weights).sum(dim=-1, dtype=torch.float64))
        return torch.stack(errors, dim=-1)


class _SquaredErrors:
    """Squared error of every zero point up to a constant of the group, from running sums over sorted entries."""

    def __init__(self, values: Float[Tensor, "R G S"], weights: Float[Tensor, "R G S"]) -> None:
        """Sort, and add up moments; in float64, because differences of long sums are taken."""
        self.sorted, order = values.sort(dim=-1)
        h = weights.gather(-1, order).double()
        start = torch.zeros_like(h[..., :1])
        self.moments = [torch.cat([start, term.cumsum(-1)], dim=-1) for term in (h, h * self.sorted.double())]

    def __call__(self, scales: Float[Tensor, "R G C"], highest: int) -> Float[Tensor, "R G C Z"]:
        """Return one error per scale and zero point, float64."""
        # Levels -Q..Q; limit j lies between level j - Q and the next.
        steps = torch.arange(-highest, highest, device=scales.device, dtype=scales.dtype) + 0.5
        limits = scales.unsqueeze(-1) * steps
        index = torch.searchsorted(self.sorted, limits.flatten(-2))
        below = [moment.gather(-1, index).view(limits.shape) for moment in self.moments]
        total = [moment[..., -1:].unsqueeze(-1) for moment in self.moments]
        level = torch.arange(-highest, highest + 1, device=scales.device, dtype=torch.float64)
        level = scales.double().unsqueeze(-1) * level
        inner = _cost(below[0].diff(dim=-1), below[1].diff(dim=-1), level[..., 1:-1])
        running = torch.cat([torch.zeros_like(inner[..., :1]), inner.cumsum(-1)], dim=-1)
        # A window with zero point z has the levels -z..Q-z, so its lowest limit is number Q - z, its highest
        # number 2 Q - 1 - z: for falling z these are runs.
        first, last = slice(0, highest + 1), slice(highest - 1, 2 * highest)
        lower = _cost(below[0][..., first], below[1][..., first], level[..., first])
        upper = _cost(
            total[0] - below[0][..., last], total[1] - below[1][..., last], level[..., highest : 2 * highest + 1]
        )
        return (lower + (running[..., last] - running[..., first]) + upper).flip(-1)


def _cost(count: Tensor, first: Tensor, level: Tensor) -> Tensor:
    """Return sum h (x - level)^2 without its constant sum h x^2, given sum h and sum h x."""
    return level * (level * count - 2 * first)
