# SPDX-License-Identifier: Apache-2.0
"""Ranges found by clipping each group and measuring the output error on a sample of real inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.granularity import Granularity
from quattuor.scales.base import ScaleRule
from quattuor.scales.minmax import MinMax

__all__ = ["OutputClip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputClip(ScaleRule):
    """Clip each group at a fraction of its largest entry, and keep the smallest error of what the group puts out.

    error(p) = mean_t (sum_{j in group} x_tj (Q_p(w_j) - w_j))^2,   p = 1, 1 - 1/n, ... > 1 - max_shrink

    Q_p rounds to the grid that `inner` fits to the group clamped at +-p max|w|; what is beyond saturates. Groups
    are searched one by one, with x a sample of the tokens that the layer reads. The first minimiser wins, so that
    p = 1 is kept unless a smaller range is strictly better.

    Args:
        inner: Fits the grid of a clamped group.
        num_steps: n.
        max_shrink: Largest part of the range that is cut off, exclusive.

    References:
        Lin et al., 2023, arXiv:2306.00978 (AWQ; code: 20 steps, max_shrink 0.5, 512 tokens).
    """

    inner: ScaleRule = field(default_factory=MinMax)
    num_steps: int = 20
    max_shrink: float = 0.5

    def __post_init__(self) -> None:
        """Reject an empty search, and an inner rule whose groups cannot be searched one by one."""
        if self.num_steps < 1 or not 0 < self.max_shrink <= 1:
            raise InputError(
                compose(
                    subject="num_steps, max_shrink",
                    value=(self.num_steps, self.max_shrink),
                    constraint="do not describe a search",
                    place="OutputClip",
                    remedy="use num_steps >= 1 and 0 < max_shrink <= 1",
                )
            )
        if self.inner.couples_groups:
            raise UnsupportedError(
                compose(
                    subject="inner",
                    value=self.inner,
                    constraint="ties the groups of a row together, which are clipped one by one",
                    place="OutputClip",
                    remedy="use MinMax() or AbsMax()",
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """A sample of the layer's inputs."""
        return frozenset({"inputs"})

    @property
    def couples_groups(self) -> bool:
        """Each group has its own inputs, so all of a row are fitted together."""
        return True

    def fractions(self) -> list[float]:
        """Return the fractions of the range that are tried, from 1 downwards."""
        num_tried = max(1, round(self.max_shrink * self.num_steps))
        return [1 - step / self.num_steps for step in range(num_tried)]

    def check(self, number_format: Format) -> None:
        """Refuse what the inner rule refuses."""
        self.inner.check(number_format)

    def given(self, statistics: Mapping[str, Tensor], granularity: Granularity) -> ScaleRule:
        """Return the rule with the sample it measures errors on.

        Raises:
            CalibrationError: The sample is empty or not finite.
        """
        inputs_TK = statistics["inputs"].float()
        if inputs_TK.shape[0] == 0 or not bool(torch.isfinite(inputs_TK).all()):
            raise CalibrationError(
                compose(
                    subject="inputs",
                    value=tuple(inputs_TK.shape),
                    constraint="hold no finite sample of tokens",
                    place="OutputClip",
                    remedy="give at least one calibration sequence, and compute in float32",
                )
            )
        num_groups = granularity.num_groups(inputs_TK.shape[1])
        inputs_GTS = inputs_TK.unflatten(1, (num_groups, -1)).transpose(0, 1) / inputs_TK.shape[0] ** 0.5
        return _SampledClip(rule=self, factor=torch.linalg.qr(inputs_GTS, mode="r")[1])

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Refuse: without inputs there is no error to measure."""
        raise InputError(
            compose(
                subject="inputs",
                value=None,
                constraint="were not given, and the error of an output depends on them",
                place="OutputClip.fit",
                remedy="quantize with calibration tokens, or fit what OutputClip.given returns",
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _SampledClip(ScaleRule):
    """The search with its data: |factor_g d|^2 is the error of group g for a change d of its weights."""

    rule: OutputClip
    factor: Float[Tensor, "G rank S"]

    @property
    def couples_groups(self) -> bool:
        """As the rule says."""
        return True

    def check(self, number_format: Format) -> None:
        """Refuse what the rule refuses."""
        self.rule.check(number_format)

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return the parameters of the inner rule at the best fraction of each group."""
        num_groups, _, size = self.factor.shape
        if values.shape[1:] != (num_groups, size):
            raise UnsupportedError(
                compose(
                    subject="groups",
                    value=tuple(values.shape),
                    constraint=f"are not the {num_groups} groups of {size} inputs of a row",
                    place="OutputClip",
                    remedy="use PerGroup(size) or PerChannel()",
                )
            )
        largest = values.abs().amax(dim=-1, keepdim=True)
        best: Parameters | None = None
        best_error = torch.full(values.shape[:2], torch.inf, device=values.device)
        for fraction in self.rule.fractions():
            clipped = values.clamp(-fraction * largest, fraction * largest)
            candidate = self.rule.inner.fit(clipped, number_format, importance)
            error = self.error(number_format.fake_quantize(values, candidate) - values)
            if best is None:
                best, best_error = candidate, error
                continue
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = Parameters(**{name: _where(better, candidate[name], best[name]) for name in best})
        assert best is not None, "fractions begin with 1"
        return best

    def error(self, change: Float[Tensor, "R G S"]) -> Float[Tensor, "R G"]:
        """Return the mean over the sample of each group's squared output for a change of its weights."""
        factor_GSr = self.factor.transpose(1, 2).to(change.dtype)
        return (change.transpose(0, 1) @ factor_GSr).square().sum(dim=-1).T


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Choose per group, whatever axes a parameter has beyond those of the groups."""
    return torch.where(condition.reshape(condition.shape + (1,) * (one.dim() - 2)), one, other)
