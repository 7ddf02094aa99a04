# SPDX-License-Identifier: Apache-2.0
"""Running statistics of a layer's input, accumulated over calibration tokens."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, compose

__all__ = ["STATISTICS", "AbsMax", "Cross", "Hessian", "InputSample", "Statistic", "make_statistics"]

SAMPLE_TOKENS = 512
HALF_DTYPES = (torch.float16, torch.bfloat16)
HAS_MIXED_PRODUCT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""Whether torch.mm can return float32 for half-precision matrices (on CUDA)."""


class Statistic(ABC):
    """Accumulates over tokens; every token counts the same, whatever the batches were."""

    @abstractmethod
    def update(self, x: Float[Tensor, "M K"], original: Float[Tensor, "M K"] | None = None) -> None:
        """Add M tokens: what the layer will see, and for statistics that compare, what it saw originally."""

    @abstractmethod
    def result(self) -> Tensor:
        """Return the statistic. Raises CalibrationError when no token was seen."""


class Hessian(Statistic):
    """Mean of x x^T over tokens, `[K, K]`, float32; no factor 2 (solvers do not depend on it)."""

    def __init__(self) -> None:
        """Start empty."""
        self._sum: Tensor | None = None
        self._num_tokens = 0

    def update(self, x: Float[Tensor, "M K"], original: Float[Tensor, "M K"] | None = None) -> None:
        """Add M tokens."""
        if self._sum is None:
            self._sum = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        if x.is_cuda and x.dtype in HALF_DTYPES and HAS_MIXED_PRODUCT:
            # Products of two half-precision numbers are exact in float32, in which tensor cores add them up.
            self._sum += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            x = x.float()
            self._sum.addmm_(x.T, x)
        self._num_tokens += x.shape[0]

    def result(self) -> Float[Tensor, "K K"]:
        """Return the mean."""
        if self._sum is None or self._num_tokens == 0:
            raise _empty("Hessian")
        return self._sum / self._num_tokens


class Cross(Statistic):
    """Mean of x v^T over tokens, `[K, K]`, float32: x original inputs, v those that the layer will see."""

    def __init__(self) -> None:
        """Start empty."""
        self._sum: Tensor | None = None
        self._num_tokens = 0

    def update(self, x: Float[Tensor, "M K"], original: Float[Tensor, "M K"] | None = None) -> None:
        """Add M pairs of tokens."""
        assert original is not None, "the pipeline gives the original inputs to whoever needs `cross`"
        x = x.float()
        if self._sum is None:
            self._sum = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self._sum.addmm_(original.float().T, x)
        self._num_tokens += x.shape[0]

    def result(self) -> Float[Tensor, "K K"]:
        """Return the mean."""
        if self._sum is None or self._num_tokens == 0:
            raise _empty("Cross")
        return self._sum / self._num_tokens


class AbsMax(Statistic):
    """max over tokens of |x|, per input channel, `[K]`, float32."""

    def __init__(self) -> None:
        """Start empty."""
        self._largest: Tensor | None = None

    def update(self, x: Float[Tensor, "M K"], original: Float[Tensor, "M K"] | None = None) -> None:
        """Add M tokens."""
        if x.shape[0] == 0:
            return
        largest = x.float().abs().amax(dim=0)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def result(self) -> Float[Tensor, " K"]:
        """Return the maxima."""
        if self._largest is None:
            raise _empty("AbsMax")
        return self._largest


class InputSample(Statistic):
    """Up to 512 tokens at even distances, `[M, K]`, float32; all of them when there are fewer."""

    def __init__(self) -> None:
        """Start empty."""
        self._kept: list[Tensor] = []
        self._num_tokens = 0
        self._stride = 1

    def update(self, x: Float[Tensor, "M K"], original: Float[Tensor, "M K"] | None = None) -> None:
        """Add M tokens, of which every stride-th is kept; the stride doubles when too many are."""
        self._kept.append(x[-self._num_tokens % self._stride :: self._stride].float().clone())
        self._num_tokens += x.shape[0]
        while sum(map(len, self._kept)) >= 2 * SAMPLE_TOKENS:
            self._kept = [torch.cat(self._kept)[::2].clone()]
            self._stride *= 2

    def result(self) -> Float[Tensor, "M K"]:
        """Return the sample."""
        if self._num_tokens == 0:
            raise _empty("InputSample")
        sample = torch.cat(self._kept)
        size = min(len(sample), SAMPLE_TOKENS)
        return sample[torch.arange(size, device=sample.device) * len(sample) // size]


STATISTICS: dict[str, type[Statistic]] = {
    "hessian": Hessian,
    "abs_max": AbsMax,
    "cross": Cross,
    "inputs": InputSample,
}
"""Every statistic a part may name in `needs`."""


def make_statistics(names: frozenset[str]) -> dict[str, Statistic]:
    """Return an empty accumulator for each name."""
    unknown = sorted(names - STATISTICS.keys())
    if unknown:
        raise InputError(
            compose(
                subject="statistic",
                value=unknown[0],
                constraint="does not exist",
                place="make_statistics",
                remedy=f"use one of {', '.join(STATISTICS)}, or add it to calibration/statistics.py",
            )
        )
    return {name: STATISTICS[name]() for name in sorted(names)}


def _empty(name: str) -> CalibrationError:
    return CalibrationError(
        compose(
            subject="tokens",
            value=0,
            constraint="reached this layer",
            place=name,
            remedy="calibrate with data that passes through every layer",
        )
    )
