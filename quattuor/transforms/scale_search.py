# SPDX-License-Identifier: Apache-2.0
"""Changes of scale that follow the size of the activations, with an exponent found by search."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, compose
from quattuor.formats import Integer
from quattuor.scales import AbsMax
from quattuor.transforms.base import SITES, SiteProblem, SiteTransform, check_finite, check_sites, mean_within_ties
from quattuor.transforms.smoothing import check_count, scale_losses

__all__ = ["ActivationAwareScale"]

SMALLEST_SHARE = 1e-4
"""Activations below this share of the median count as that share, or their channels would set the range of s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationAwareScale(SiteTransform):
    """Scale each channel by a power of its mean activation, so that salient weights are rounded more finely.

    a_j      = mean_t |x_tj|, at least 1e-4 of the median
    s(alpha) = a^alpha / sqrt(max a^alpha * min a^alpha)
    L(alpha) = mean_t sum_n (f(X / s, Qw(W s)) - f(X, W))_tn^2,   alpha = 0, 1/n, ..., (n - 1)/n
    alpha*   = the first minimiser of L

    f is the output of the module that the site belongs to. Qw rounds to the nearest of the 2^bits levels between
    the extremes of each row or group. alpha = 0 gives s = 1, so the result is never worse than no scaling by its
    own measure, and multiplying all activations by one factor changes nothing. Every site is searched in the
    original block. A channel that is always zero keeps s = 1. Computes in float32, sums in float64.

    Args:
        sites: Where it acts.
        num_steps: n.
        include_one: Also try alpha = 1.
        symmetric: Whether Qw has its levels around zero, rather than between the extremes.
        share_values: Scale the values also where several query heads read one value head, by the mean a_j over
            them; off leaves the site "output" alone there, as the authors do.
        max_sequences: Calibration sequences, from the first, that L is measured on; None uses all. The means a_j
            always come from all of them.

    References:
        Lin et al., 2023, arXiv:2306.00978 (AWQ), section 3.2, eq. (4) and (5).
    """

    sites: tuple[str, ...] = SITES
    num_steps: int = 20
    include_one: bool = False
    symmetric: bool = False
    share_values: bool = False
    max_sequences: int | None = None

    def __post_init__(self) -> None:
        """Reject searches that cannot choose and sites that do not exist."""
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise InputError(
                compose(
                    subject="num_steps",
                    value=self.num_steps,
                    constraint="is not an integer of at least 1",
                    place="ActivationAwareScale",
                    remedy="use 20 for the authors' search",
                )
            )
        check_count(self.max_sequences, 1, "max_sequences", "ActivationAwareScale", "all sequences")
        check_sites(self.sites, "ActivationAwareScale")

    @property
    def sees_errors(self) -> bool:
        """No: every site is searched in the original block."""
        return False

    def find(self, problem: SiteProblem) -> Float[Tensor, " K"]:
        """Return the divisor of each input channel.

        Raises:
            CalibrationError: An activation or weight is not finite, or there is no calibration sequence.
        """
        check_finite(problem, "ActivationAwareScale")
        shares = problem.ties is not None and problem.ties.unique().numel() < problem.ties.numel()
        if shares and not self.share_values:
            return torch.ones_like(problem.abs_max)
        candidates = self.candidates(problem)
        losses = self.losses(problem, candidates).tolist()
        best_index = min(range(len(candidates)), key=losses.__getitem__)  # the first of equal ones
        return candidates[best_index]

    def exponents(self) -> list[float]:
        """Return the exponents that are tried, from 0 upwards."""
        return [step / self.num_steps for step in range(self.num_steps + int(self.include_one))]

    def candidates(self, problem: SiteProblem) -> list[Float[Tensor, " K"]]:
        """Return s of each exponent.

        Raises:
            CalibrationError: There is no calibration token.
        """
        if problem.inputs.numel() == 0:
            raise CalibrationError(
                compose(
                    subject="inputs",
                    value=tuple(problem.inputs.shape),
                    constraint="hold no token, so that no channel has a mean",
                    place="ActivationAwareScale",
                    remedy="give at least one calibration sequence",
                )
            )
        input_mean_K = _abs_mean(problem).double().to(problem.weight.device)
        is_live_K = input_mean_K > 0
        live_K = input_mean_K[is_live_K]
        if live_K.numel() == 0:
            return [torch.ones_like(problem.abs_max)]
        live_K = live_K.clamp(min=SMALLEST_SHARE * float(live_K.median()))
        scales = []
        for exponent in self.exponents():
            power_K = live_K**exponent  # eq. (5)
            scale_K = torch.ones_like(input_mean_K)
            scale_K[is_live_K] = power_K / (power_K.max() * power_K.min()).sqrt()
            scales.append(scale_K.float())
        return scales

    def losses(self, problem: SiteProblem, candidates: list[Float[Tensor, " K"]]) -> Float[Tensor, " C"]:
        """Return L of each candidate."""
        number_format = Integer(problem.bits, symmetric=self.symmetric, narrow=self.symmetric)

        def rounded(weight: Tensor) -> Tensor:
            values = problem.granularity.split(weight)
            nearest = number_format.fake_quantize(values, AbsMax().fit(values, number_format))
            return problem.granularity.merge(nearest, (weight.shape[0], weight.shape[1]))

        return scale_losses(problem, candidates, rounded, self.max_sequences, place="ActivationAwareScale")


def _abs_mean(problem: SiteProblem) -> Float[Tensor, " K"]:
    """Return the mean over tokens and tied channels of |inputs|, sequence by sequence."""
    total_K = torch.zeros(problem.inputs.shape[-1], dtype=torch.float64, device=problem.inputs.device)
    for sequence_TK in problem.inputs:
        total_K += sequence_TK.abs().sum(dim=0, dtype=torch.float64)
    mean_K = (total_K / (problem.inputs.shape[0] * problem.inputs.shape[1])).float()
    ties = None if problem.ties is None else problem.ties.to(mean_K.device)
    return mean_within_ties(mean_K, ties)
