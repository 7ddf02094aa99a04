# SPDX-License-Identifier: Apache-2.0
"""Changes of scale in closed form."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.transforms.base import SiteProblem, SiteTransform, check_finite, check_sites, max_within_ties

__all__ = ["MigrateScale"]

SMALLEST_LIVE = float(torch.finfo(torch.float32).tiny)
"""A channel whose maximum is below the smallest normal float32 is dead: no division by it is safe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateScale(SiteTransform):
    """Move a share alpha of each channel's activation range into the weights.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

    with X_j over the calibration tokens and W_j over all consumers. A channel where either maximum is zero keeps
    s_j = 1. Tied channels take the largest of their s_j. No normalisation. Computes in float64, returns float32.

    Args:
        alpha: 0 moves nothing but the weights' own range, 1 makes every activation maximum 1.
        sites: Where it acts.

    References:
        Xiao et al., 2022, arXiv:2211.10438 (SmoothQuant), eq. (4).
    """

    alpha: float = 0.5
    sites: tuple[str, ...] = ("qkv", "gate_up")

    def __post_init__(self) -> None:
        """Reject shares outside [0, 1] and sites that do not exist."""
        if not 0 <= self.alpha <= 1:
            raise InputError(
                compose(
                    subject="alpha",
                    value=self.alpha,
                    constraint="is not between 0 and 1",
                    place="MigrateScale",
                    remedy="use 0.5, or up to 0.85 for models with strong outliers",
                )
            )
        check_sites(self.sites, "MigrateScale")

    def find(self, problem: SiteProblem) -> Float[Tensor, " K"]:
        """Return the divisor of each input channel.

        Raises:
            CalibrationError: An activation or weight is not finite.
        """
        check_finite(problem, "MigrateScale")
        input_max_K = problem.abs_max.double()
        weight_max_K = problem.weight.abs().amax(dim=0).double()
        scale_K = input_max_K**self.alpha / weight_max_K ** (1 - self.alpha)  # eq. (4)
        is_live_K = (input_max_K >= SMALLEST_LIVE) & (weight_max_K >= SMALLEST_LIVE)
        # Dead channels take part with 0, so that they never set the scale of live ones they are tied to.
        scale_K = max_within_ties(torch.where(is_live_K, scale_K, 0.0), problem.ties)
        return torch.where(scale_K > 0, scale_K, 1.0).float()
