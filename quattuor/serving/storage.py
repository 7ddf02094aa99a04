# SPDX-License-Identifier: Apache-2.0
"""The tensors of a packed linear in each checkpoint layout that can be served, and the weight they hold."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import torch
from torch import Tensor

from quattuor.activations import ActivationQuantizer, DynamicQuantizer
from quattuor.checkpoints import qqq_layout
from quattuor.errors import UnsupportedError, compose
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.nn import LinearLayout
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.serving.sharding import Axis, StoredTensor

__all__ = ["NativeStorage", "QQQStorage", "Storage"]

_PARAMETERS = ("scale", "zero_point", "group_scale", "channel_scale")


class Storage(ABC):
    """One layout of a packed linear on disk."""

    @property
    @abstractmethod
    def activations(self) -> ActivationQuantizer | None:
        """Quantizer of the inputs; None for floating point."""

    @abstractmethod
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Return the stored tensors."""

    @abstractmethod
    def weight(self, state: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> QuantizedTensor:
        """Return the packed weight [N, K] of the stored tensors.

        Raises:
            CheckpointError: They hold no such weight.
        """


@dataclass(frozen=True, slots=True)
class NativeStorage(Storage):
    """A linear of a native checkpoint.

    Raises:
        UnsupportedError: The layout has parts that only the modules of `quattuor.nn` compute.
    """

    layout: LinearLayout
    name: str

    def __post_init__(self) -> None:
        """Refuse layouts that cannot be merged and cut."""
        layout = self.layout
        is_uniform = isinstance(layout.number_format, Integer | TwoLevelInteger)
        is_per_row = isinstance(layout.granularity, PerChannel | PerGroup)
        unknown = sorted(set(self._shapes()) - {"packed", *_PARAMETERS})
        if is_uniform and is_per_row and not unknown:
            return
        value = ", ".join(unknown) or f"{layout.number_format} {layout.granularity}"
        raise UnsupportedError(
            compose(
                subject="layout",
                value=value,
                constraint="is not Integer or TwoLevelInteger with one scale per channel or group",
                place=self.name,
                remedy="run this checkpoint with transformers, or quantize it with qqq, rtn, gptq or awq",
            )
        )

    @property
    def activations(self) -> ActivationQuantizer | None:
        """Quantizer of the inputs; None for floating point."""
        return self.layout.activations

    @property
    def group_size(self) -> int | None:
        """Input features that share a scale; None for all of them."""
        granularity = self.layout.granularity
        return granularity.group_size if isinstance(granularity, PerGroup) else None

    def tensors(self) -> tuple[StoredTensor, ...]:
        """Return codes as bytes along K, and each parameter."""
        bits, group_size = self.layout.number_format.bits, self.group_size
        block = lcm(8 // gcd(bits, 8), group_size or 1)
        stored = [
            StoredTensor(
                name="packed",
                dtype=torch.uint8,
                outputs=Axis(dim=0),
                inputs=Axis(dim=1, per_feature=Fraction(bits, 8), block=block),
                legal=(0, 255),
            )
        ]
        for item in self.layout.parameters:
            grouped = Axis(dim=1, per_feature=Fraction(1, group_size), block=group_size) if group_size else None
            dtype = getattr(torch, item.dtype)
            stored.append(
                StoredTensor(
                    name=item.name,
                    dtype=dtype,
                    outputs=Axis(dim=0),
                    inputs=grouped if item.per_group else None,
                    legal=None if dtype.is_floating_point else (1, 2 ** min(bits, 8 - bits)),
                )
            )
        return tuple(stored)

    def weight(self, state: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> QuantizedTensor:
        """Return the packed weight of the stored tensors."""
        layout = self.layout
        return QuantizedTensor.from_state(state, layout.number_format, layout.granularity, shape, name=name)

    def _shapes(self) -> dict[str, Tensor]:
        return self.layout.empty_state(8, 8 * (self.group_size or 1), "meta")


@dataclass(frozen=True, slots=True)
class QQQStorage(Storage):
    """A linear in the layout of the original QQQ code; `group_size` is -1 or 128."""

    group_size: int

    @property
    def activations(self) -> ActivationQuantizer | None:
        """Int8 per token, which the layout implies."""
        return DynamicQuantizer()

    def tensors(self) -> tuple[StoredTensor, ...]:
        """Return the words of eight codes, and the scales in their permuted order."""
        words = StoredTensor(
            name="B",
            dtype=torch.int32,
            outputs=Axis(dim=1, per_feature=Fraction(2), block=64),
            inputs=Axis(dim=0, per_feature=Fraction(1, 16), block=64),
            legal=(-(2**31), 2**31 - 1),
        )
        channel = StoredTensor(name="s_channel", dtype=torch.float32, outputs=Axis(dim=1, block=32), inputs=None)
        if self.group_size == -1:
            return words, channel
        size = self.group_size
        group = StoredTensor(
            name="s_group",
            dtype=torch.float16,
            outputs=Axis(dim=1, block=64),
            inputs=Axis(dim=0, per_feature=Fraction(1, size), block=size),
        )
        return words, channel, group

    def weight(self, state: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> QuantizedTensor:
        """Return the packed weight of the stored tensors."""
        return (qqq_layout.unpack_channel if self.group_size == -1 else qqq_layout.unpack_group)(state, name)
