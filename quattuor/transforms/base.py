# SPDX-License-Identifier: Apache-2.0
"""The contracts of function-preserving transforms.

Activations are rows, y = x @ W.T. A transform T acts as x @ T, so the weight becomes W @ inv(T).T.
Two kinds exist because they need different knowledge: a rotation needs nothing but a size, a site transform needs
the tensors that meet at a site. Neither sees a module; `apply.py` folds what they find.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from quattuor.activations.base import ActivationQuantizer
from quattuor.errors import CalibrationError, InputError, compose
from quattuor.granularity import Granularity
from quattuor.online_maps import OnlineMap

__all__ = [
    "SITES",
    "RotationTransform",
    "SiteProblem",
    "SiteTransform",
    "Transform",
    "TransformedWeight",
    "WeightTransform",
    "check_finite",
    "check_sites",
    "max_within_ties",
    "mean_within_ties",
]

SITES = ("qkv", "output", "gate_up", "down")
"""Names of the sites a site transform may act on, in the order the forward pass meets them."""


class Transform:
    """A change of a model's weights that leaves its function as it was."""


class RotationTransform(Transform, ABC):
    """An orthogonal change of basis, fixed before any data is seen."""

    @abstractmethod
    def matrix(self, size: int, seed: int) -> Float[Tensor, "K K"]:
        """Return T with T @ T.T = I, float64 on the CPU, the same for the same arguments."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteProblem:
    """A site as tensors: what a site transform may look at.

    Args:
        inputs: What the consumers read, [B, T, K], float32. May rest on another device than the weight.
        weight: The consumers' weights stacked along rows, [N, K], float32.
        evaluate: f(inputs, weight) -> the quantity whose error counts, e.g. the attention output, for any number
            of sequences; rows of `weight` are in the order of `weight` above. Takes tensors on its device.
        abs_max: max over tokens of |inputs|, per channel.
        ties: Channels that must share a factor have the same number here; None when each channel is free.
        granularity: Which weights share a scale, to imitate the weight quantizer.
        bits: Width of a weight code.
        activations: The activation quantizer that will see the transformed inputs; None when there is none.
    """

    inputs: Float[Tensor, "B T K"]
    weight: Float[Tensor, "N K"]
    evaluate: Callable[[Tensor, Tensor], Tensor]
    abs_max: Float[Tensor, " K"]
    ties: Int64[Tensor, " K"] | None
    granularity: Granularity
    bits: int
    activations: ActivationQuantizer | None


class SiteTransform(Transform, ABC):
    """A diagonal change of scale at a site: inputs are divided by it, the consumers' columns multiplied."""

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """Names of the sites it acts on."""

    @property
    def sees_errors(self) -> bool:
        """Whether a site is shown with earlier sites of its block rounded, measured by what the next one reads.

        Otherwise each site is shown in the original block, measured by the output of its module: the attention,
        the feed-forward, or for what reads no norm the linear itself.
        """
        return True

    @abstractmethod
    def find(self, problem: SiteProblem) -> Float[Tensor, " K"]:
        """Return the positive divisor of each input channel, equal within ties; ones where nothing helps."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransformedWeight:
    """A weight in another basis, its statistics there, and the maps that undo the change at run time.

    y = x @ W.T equals y = output_map(input_map(x) @ weight.T)

    Args:
        weight: The matrix to quantize, [N, K].
        hessian: Hessian of the mapped inputs, [K, K].
        input_map: Applied to inputs; None for the identity.
        output_map: Applied to outputs; None for the identity.
    """

    weight: Float[Tensor, "N K"]
    hessian: Float[Tensor, "K K"]
    input_map: OnlineMap | None
    output_map: OnlineMap | None


class WeightTransform(Transform, ABC):
    """A change of basis of one weight that stays at run time, chosen for that weight alone."""

    @abstractmethod
    def transform(
        self, weight: Float[Tensor, "N K"], hessian: Float[Tensor, "K K"], seed: int
    ) -> TransformedWeight:
        """Return the weight in its new basis; the same for the same arguments."""


def check_sites(sites: tuple[str, ...], place: str) -> None:
    """Reject an empty tuple, unknown names and names given twice."""
    unknown = [name for name in sites if name not in SITES]
    if unknown or not sites or len(set(sites)) < len(sites):
        raise InputError(
            compose(
                subject="sites",
                value=sites,
                constraint=f"is not a choice of distinct names from {SITES}",
                place=place,
                remedy=f"name at least one of {', '.join(SITES)}, each once",
            )
        )


def check_finite(problem: SiteProblem, place: str) -> None:
    """Reject a site whose activation maxima or weights are not finite."""
    for subject, tensor in (("abs_max", problem.abs_max), ("weight", problem.weight)):
        if not bool(torch.isfinite(tensor).all()):
            raise CalibrationError(
                compose(
                    subject=subject,
                    value=f"{int((~torch.isfinite(tensor)).sum())} entries",
                    constraint="are NaN or infinite",
                    place=place,
                    remedy="look for NaN in the model's weights, and run the calibration in float32",
                )
            )


def max_within_ties(values: Float[Tensor, " K"], ties: Int64[Tensor, " K"] | None) -> Float[Tensor, " K"]:
    """Give each channel the largest value among the channels tied to it."""
    if ties is None:
        return values
    _, tie_index_K = torch.unique(ties, return_inverse=True)
    largest = values.new_zeros(int(tie_index_K.max()) + 1)
    largest.scatter_reduce_(0, tie_index_K, values, reduce="amax", include_self=False)
    return largest[tie_index_K]


def mean_within_ties(values: Float[Tensor, " K"], ties: Int64[Tensor, " K"] | None) -> Float[Tensor, " K"]:
    """Give each channel the mean over the channels tied to it."""
    if ties is None:
        return values
    _, tie_index_K = torch.unique(ties, return_inverse=True)
    total = values.new_zeros(int(tie_index_K.max()) + 1)
    total.scatter_reduce_(0, tie_index_K, values, reduce="mean", include_self=False)
    return total[tie_index_K]
