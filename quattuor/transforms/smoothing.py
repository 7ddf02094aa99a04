# SPDX-License-Identifier: Apache-2.0
"""Changes of scale found by search on the error they leave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, compose
from quattuor.formats import Integer
from quattuor.granularity import Granularity
from quattuor.scales import AbsMax
from quattuor.transforms.base import SITES, SiteProblem, SiteTransform, check_finite, check_sites, max_within_ties

__all__ = [
    "AdaptiveSmoothing",
    "candidate_thresholds",
    "check_count",
    "round_weight",
    "scale_losses",
    "smoothing_scale",
    "threshold_losses",
]

SMALLEST_THRESHOLD = 0.1
THRESHOLD_STEP = 0.5
MIN_STEPS = 100

STACKED_WEIGHT_BYTES = 2**29
TOKENS_AT_ONCE = 8192
"""Rounded candidate weights that are held at a time; more candidates take another pass over the inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveSmoothing(SiteTransform):
    """Scale down only the channels that exceed a threshold, chosen by search on the error of the site's output.

    a_j      = max_t |x_tj|                            the largest of the tied channels
    s_j(tau) = max(1, a_j / tau)
    L(tau)   = mean_t sum_n (f(Qa(X / s), Qw(W s)) - f(X, W))_tn^2
    tau*     = the first, hence largest, minimiser of L over a descending grid from max_j a_j to 0.1

    Qa is the activation quantizer of the layer; Qw rounds to the nearest of 2^bits - 1 symmetric levels between
    the maxima of each row or group. The grid begins with s = 1, so the result is never worse than no smoothing by
    its own measure. A site whose activations stay below 0.1 keeps s = 1. Computes in float32, sums in float64.

    Args:
        sites: Where it acts.
        num_candidates: Thresholds tried, evenly spaced; None is the authors' rule, one more than
            max(100, floor(max x / 0.5)) with the signed maximum of the inputs.
        max_sequences: Calibration sequences, from the first, that the error is measured on; None uses all.
            The maxima a_j always come from all of them.

    References:
        Zhang et al., 2024, arXiv:2406.09904 (QQQ), section 3.2 (adaptive smoothing).
    """

    sites: tuple[str, ...] = SITES
    num_candidates: int | None = None
    max_sequences: int | None = None

    def __post_init__(self) -> None:
        """Reject searches that cannot choose and sites that do not exist."""
        place = "AdaptiveSmoothing"
        check_count(self.num_candidates, 2, "num_candidates", place, "the authors' rule")
        check_count(self.max_sequences, 1, "max_sequences", place, "all sequences")
        check_sites(self.sites, "AdaptiveSmoothing")

    def find(self, problem: SiteProblem) -> Float[Tensor, " K"]:
        """Return the divisor of each input channel.

        Raises:
            CalibrationError: An activation or weight is not finite, or there is no calibration sequence.
        """
        check_finite(problem, "AdaptiveSmoothing")
        input_max_K = max_within_ties(problem.abs_max, problem.ties)
        thresholds = candidate_thresholds(input_max_K, problem.inputs, self.num_candidates)
        if not thresholds:
            return torch.ones_like(input_max_K)
        losses = threshold_losses(problem, input_max_K, thresholds, self.max_sequences).tolist()
        best_index = min(range(len(thresholds)), key=losses.__getitem__)  # the first of equal ones
        return smoothing_scale(input_max_K, thresholds[best_index])


def check_count(count: int | None, smallest: int, subject: str, place: str, default: str) -> None:
    """Reject what is neither None nor an integer of at least `smallest`; `default` says what None stands for."""
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < smallest:
        raise InputError(
            compose(
                subject=subject,
                value=count,
                constraint=f"is not an integer of at least {smallest}",
                place=place,
                remedy=f"use None for {default}, or a larger number",
            )
        )


def smoothing_scale(input_max: Float[Tensor, " K"], threshold: float) -> Float[Tensor, " K"]:
    """Return s_j = max(1, a_j / threshold), float32."""
    return (input_max.double() / threshold).clamp(min=1).float()


def candidate_thresholds(
    input_max: Float[Tensor, " K"], inputs: Float[Tensor, "B T K"], num_candidates: int | None
) -> list[float]:
    """Return descending thresholds from the largest activation to 0.1; none when it is below 0.1.

    Args:
        input_max: a_j.
        inputs: The activations, whose signed maximum sets how many thresholds the authors' rule makes.
        num_candidates: How many, or None for the authors' rule.
    """
    largest = float(input_max.max())
    if largest < SMALLEST_THRESHOLD:
        return []
    if num_candidates is None:
        num_candidates = 1 + max(MIN_STEPS, floor(max(float(inputs.max()), 0.0) / THRESHOLD_STEP))
    step = (largest - SMALLEST_THRESHOLD) / (num_candidates - 1)
    return [largest - index * step for index in range(num_candidates - 1)] + [SMALLEST_THRESHOLD]


def threshold_losses(
    problem: SiteProblem,
    input_max: Float[Tensor, " K"],
    thresholds: list[float],
    max_sequences: int | None = None,
) -> Float64[Tensor, " C"]:
    """Return L of each threshold.

    Raises:
        CalibrationError: There is no sequence, or an error is not finite.
    """

    def rounded(weight: Tensor) -> Tensor:
        return round_weight(weight, problem.granularity, problem.bits)

    scales = [smoothing_scale(input_max, threshold) for threshold in thresholds]
    return scale_losses(problem, scales, rounded, max_sequences, place="AdaptiveSmoothing")


@torch.no_grad()
def scale_losses(
    problem: SiteProblem,
    scales: Sequence[Float[Tensor, " K"]],
    rounded: Callable[[Tensor], Tensor],
    max_sequences: int | None,
    *,
    place: str,
) -> Float64[Tensor, " C"]:
    """Return mean_t sum_n (f(Qa(X / s), rounded(W s)) - f(X, W))_tn^2 of each candidate s.

    Batches of sequences are the outer loop: each is loaded once, and its exact output computed once, for all
    candidates whose rounded weights fit into the memory budget.

    Args:
        problem: The site.
        scales: The candidates.
        rounded: Imitates the weight quantizer.
        max_sequences: Sequences, from the first, that count; None for all.
        place: Who asks, for messages.

    Raises:
        CalibrationError: There is no sequence, or an error is not finite.
    """
    inputs_BTK = problem.inputs[:max_sequences]
    num_tokens = inputs_BTK.shape[0] * inputs_BTK.shape[1]
    weight_NK = problem.weight
    losses_C = torch.zeros(len(scales), dtype=torch.float64, device=weight_NK.device)
    num_at_once = max(1, STACKED_WEIGHT_BYTES // (weight_NK.numel() * weight_NK.element_size()))
    for start in range(0, len(scales), num_at_once):
        some = scales[start : start + num_at_once]
        weights = [rounded(weight_NK * scale_K) for scale_K in some]
        for batch_BTK in inputs_BTK.split(max(1, TOKENS_AT_ONCE // inputs_BTK.shape[1])):
            x_BTK = batch_BTK.to(weight_NK.device)
            target = problem.evaluate(x_BTK, weight_NK)
            for index, (scale_K, rounded_NK) in enumerate(zip(some, weights, strict=True), start):
                smooth_BTK = x_BTK / scale_K
                if problem.activations is not None:
                    smooth_BTK = problem.activations.fake_quantize(smooth_BTK)
                error = problem.evaluate(smooth_BTK, rounded_NK) - target
                losses_C[index] += error.square().sum(dtype=torch.float64)
    losses_C /= num_tokens
    if not num_tokens or not bool(torch.isfinite(losses_C).all()):
        raise CalibrationError(
            compose(
                subject="loss",
                value=f"{losses_C.tolist()[:3]} ...",
                constraint=f"is not finite over {num_tokens} calibration tokens",
                place=place,
                remedy="give at least one calibration sequence, and compute in float32",
            )
        )
    return losses_C


def round_weight(weight: Float[Tensor, "N K"], granularity: Granularity, bits: int) -> Float[Tensor, "N K"]:
    """Round to the nearest of the symmetric levels between the maxima of each row or group."""
    number_format = Integer(bits, narrow=True)
    values = granularity.split(weight)
    rounded = number_format.fake_quantize(values, AbsMax().fit(values, number_format))
    return granularity.merge(rounded, (weight.shape[0], weight.shape[1]))
