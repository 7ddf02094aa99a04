# SPDX-License-Identifier: Apache-2.0
"""The contracts of function-preserving transforms.

Activations are rows, y = x @ W.T. A transform T acts as x @ T, so the weight becomes W @ inv(T).T.
Two kinds exist because they need different knowledge: a rotation needs nothing but a size, a site transform needs
the tensors that meet at a site. Neither sees a module; `apply.py` folds what they find.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from quattuor.activations.base import ActivationQuantizer
from quattuor.granularity import Granularity

__all__ = ["RotationTransform", "SiteProblem", "SiteTransform", "Transform"]


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
        inputs: What the consumers read, [B, T, K], float32.
        weight: The consumers' weights stacked along rows, [N, K], float32.
        evaluate: f(inputs, weight) -> the quantity whose error counts, e.g. the attention output; rows of
            `weight` are in the order of `weight` above.
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

    @abstractmethod
    def find(self, problem: SiteProblem) -> Float[Tensor, " K"]:
        """Return the positive divisor of each input channel, equal within ties; ones where nothing helps."""
