# SPDX-License-Identifier: Apache-2.0
"""Linear maps that stay at run time, before or after a packed weight.

Vectors are rows: a map T turns x into x @ T. A map holds its tensors, never a seed: an orthogonal matrix drawn
anew on another machine may differ in its last bits.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quattuor.errors import InputError, compose

__all__ = ["ONLINE_MAPS", "Kronecker", "OnlineMap", "Permutation"]


class OnlineMap(ABC):
    """A linear map of row vectors."""

    @abstractmethod
    def apply(self, x: Float[Tensor, "*lead K"]) -> Float[Tensor, "*lead K"]:
        """Return x @ T, in the dtype of x; computes in float32, or in float64 when x is."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, named as the fields."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Permutation(OnlineMap):
    """(x @ T)[j] = x[indices[j]]."""

    indices: Integer[Tensor, " K"]

    def apply(self, x: Float[Tensor, "*lead K"]) -> Float[Tensor, "*lead K"]:
        """Gather."""
        return x[..., self.indices.long()]

    def tensors(self) -> dict[str, Tensor]:
        """Return the indices."""
        return {"indices": self.indices}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kronecker(OnlineMap):
    """Scale, permute, multiply by a Kronecker product of two matrices, permute, scale.

    v = (x * before)[gather];  Y = left.T @ (v as [P, Q]) @ right;  x @ T = (Y as [K])[scatter] * after

    so that without permutations and diagonals T is the Kronecker product of `left` and `right`.

    Args:
        left: [P, P].
        right: [Q, Q], with P * Q = K.
        gather: Permutation before the product, int16 or int32, or None.
        scatter: Permutation after it, int16 or int32, or None.
        before: Diagonal before everything, or None.
        after: Diagonal after everything, or None.
    """

    left: Float[Tensor, "P P"]
    right: Float[Tensor, "Q Q"]
    gather: Integer[Tensor, " K"] | None = None
    scatter: Integer[Tensor, " K"] | None = None
    before: Float[Tensor, " K"] | None = None
    after: Float[Tensor, " K"] | None = None

    def __post_init__(self) -> None:
        """Reject vectors of another size than the product's."""
        size = self.left.shape[0] * self.right.shape[0]
        for name in ("gather", "scatter", "before", "after"):
            value = getattr(self, name)
            if value is not None and value.numel() != size:
                raise InputError(
                    compose(
                        subject=name,
                        value=value.numel(),
                        constraint=f"is not {self.left.shape[0]} * {self.right.shape[0]}",
                        place="Kronecker",
                        remedy="give every vector one entry per channel",
                    )
                )

    def apply(self, x: Float[Tensor, "*lead K"]) -> Float[Tensor, "*lead K"]:
        """Return x @ T."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = x.to(dtype)
        if self.before is not None:
            y = y * self.before.to(dtype)
        if self.gather is not None:
            y = y[..., self.gather.long()]
        matrix = y.reshape(*y.shape[:-1], self.left.shape[0], self.right.shape[0])
        matrix = self.left.to(dtype).T @ matrix @ self.right.to(dtype)
        y = matrix.reshape(x.shape)
        if self.scatter is not None:
            y = y[..., self.scatter.long()]
        if self.after is not None:
            y = y * self.after.to(dtype)
        return y.to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there."""
        names = ("left", "right", "gather", "scatter", "before", "after")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


ONLINE_MAPS: dict[str, type[Permutation] | type[Kronecker]] = {"Permutation": Permutation, "Kronecker": Kronecker}
"""Every kind of map that a checkpoint may name."""
