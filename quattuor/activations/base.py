# SPDX-License-Identifier: Apache-2.0
"""The contract of an activation quantizer: how the inputs of a linear become integers at run time."""

from abc import ABC, abstractmethod

from jaxtyping import Float, Integer
from torch import Tensor

__all__ = ["ActivationQuantizer"]


class ActivationQuantizer(ABC):
    """Quantizes the input of a linear. Tokens are rows."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "M K"]) -> tuple[Integer[Tensor, "M K"], Float[Tensor, " M"]]:
        """Return codes and the float32 scale of each token: x is approximated by `scale[:, None] * codes`."""

    @abstractmethod
    def fake_quantize(self, x: Float[Tensor, "*lead K"]) -> Float[Tensor, "*lead K"]:
        """Return what the integers stand for, in the dtype of x."""
