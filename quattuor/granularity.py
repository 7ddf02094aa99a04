# SPDX-License-Identifier: Apache-2.0
"""Which elements share quantization parameters.

A granularity turns a matrix `[N, K]` into a *grouped view* `[N', G, S]` whose last axis shares parameters, so
that formats and scale rules never branch on granularity: they see `values[..., S]` and parameters `[...]`.

| granularity | values | grouped view | parameters |
| --- | --- | --- | --- |
| `PerTensor()` | `[N, K]` | `[1, 1, N*K]` | `[1, 1]` |
| `PerChannel()`, `PerToken()` | `[N, K]` | `[N, 1, K]` | `[N, 1]` |
| `PerGroup(S)` | `[N, G*S]` | `[N, G, S]` | `[N, G]` |
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

from quattuor.errors import InputError, compose

__all__ = ["Granularity", "PerChannel", "PerGroup", "PerTensor", "PerToken"]


class Granularity(ABC):
    """Which elements of a matrix `[N, K]` share parameters."""

    @abstractmethod
    def num_groups(self, in_features: int) -> int:
        """Parameter columns G for K input features. Raises InputError when K cannot be divided."""

    @abstractmethod
    def split(self, matrix: Shaped[Tensor, "N K"]) -> Shaped[Tensor, "R G S"]:
        """View the matrix so that the last axis shares parameters; R is N, or 1 for a whole tensor."""

    def merge(self, grouped: Shaped[Tensor, "R G S"], shape: tuple[int, int]) -> Shaped[Tensor, "N K"]:
        """Undo `split`."""
        return grouped.reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerTensor(Granularity):
    """One set of parameters for the whole matrix: `[N, K] -> [1, 1]`."""

    def num_groups(self, in_features: int) -> int:
        """One."""
        return 1

    def split(self, matrix: Shaped[Tensor, "N K"]) -> Shaped[Tensor, "R G S"]:
        """`[N, K] -> [1, 1, N*K]`."""
        return matrix.reshape(1, 1, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerChannel(Granularity):
    """One set per output channel (row of a weight): `[N, K] -> [N, 1]`."""

    def num_groups(self, in_features: int) -> int:
        """One."""
        return 1

    def split(self, matrix: Shaped[Tensor, "N K"]) -> Shaped[Tensor, "R G S"]:
        """`[N, K] -> [N, 1, K]`."""
        return matrix.unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerToken(Granularity):
    """One set per token (row of an activation): `[M, K] -> [M, 1]`."""

    def num_groups(self, in_features: int) -> int:
        """One."""
        return 1

    def split(self, matrix: Shaped[Tensor, "N K"]) -> Shaped[Tensor, "R G S"]:
        """`[M, K] -> [M, 1, K]`."""
        return matrix.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class PerGroup(Granularity):
    """One set per run of `group_size` elements along the input dimension: `[N, G*S] -> [N, G]`."""

    group_size: int

    def __post_init__(self) -> None:
        """Reject a group size that is not a positive integer."""
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
            raise InputError(
                compose(
                    subject="group_size",
                    value=self.group_size,
                    constraint="is not a positive integer",
                    place="PerGroup",
                    remedy="use 32, 64 or 128, or PerChannel() for one scale per output channel",
                )
            )

    def num_groups(self, in_features: int) -> int:
        """K / group_size."""
        if in_features % self.group_size:
            fitting = [size for size in (256, 128, 64, 32, 16) if in_features % size == 0]
            remedy = "use " + " or ".join(map(str, fitting)) if fitting else "use PerChannel()"
            raise InputError(
                compose(
                    subject="group_size",
                    value=self.group_size,
                    constraint=f"does not divide in_features={in_features}",
                    place="PerGroup",
                    remedy=remedy,
                )
            )
        return in_features // self.group_size

    def split(self, matrix: Shaped[Tensor, "N K"]) -> Shaped[Tensor, "R G S"]:
        """`[N, G*S] -> [N, G, S]`."""
        return matrix.reshape(matrix.shape[0], self.num_groups(matrix.shape[1]), self.group_size)
