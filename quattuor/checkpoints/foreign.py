# SPDX-License-Identifier: Apache-2.0
"""What a layout of another project must say: how one weight is stored, and what its config.json holds.

`conversion.py` does the rest, which is the same for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quattuor.activations import ActivationQuantizer
from quattuor.checkpoints.tensors import TensorStore
from quattuor.errors import CheckpointError, UnsupportedError, compose
from quattuor.formats import Integer as IntegerFormat
from quattuor.formats import TwoLevelInteger
from quattuor.granularity import PerGroup
from quattuor.quantized_tensor import QuantizedTensor

__all__ = [
    "ForeignLayout",
    "ForeignReader",
    "Grid",
    "Settings",
    "damaged",
    "refused",
    "require",
    "uniform",
]

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """A weight as scale * (codes - zero_point), with one scale for `group_size` columns.

    Args:
        codes: int16, signed when `zero_point` is None.
        scale: float64, exact.
        zero_point: One for each scale, or None.
        bits: Width of a code.
        group_size: None for one scale per row.
    """

    codes: Integer[Tensor, "N K"]
    scale: Float[Tensor, "N G"]
    zero_point: Integer[Tensor, "N G"] | None
    bits: int
    group_size: int | None


def uniform(tensor: QuantizedTensor) -> Grid | str:
    """Return a weight as one uniform grid, or why it is none."""
    if set(tensor.state()) - {"packed", *tensor.parameters}:
        return "has parts beside its codes and scales, which the layout cannot hold"
    form, granularity, parameters = tensor.number_format, tensor.granularity, tensor.parameters
    group_size = granularity.group_size if isinstance(granularity, PerGroup) else None
    zero_point = None
    if isinstance(form, IntegerFormat):
        scale = parameters["scale"].double()
        zero_point = None if form.symmetric else parameters["zero_point"].to(torch.int16)
    elif isinstance(form, TwoLevelInteger):
        group = parameters["group_scale"].double()
        if not torch.equal(group, group.round()):
            return "rounds code * group_scale to int8, which a grid of one scale per group cannot express"
        scale = group * parameters["channel_scale"].double()
    else:
        return f"is {form}, not a uniform grid"
    rows = tensor.shape[0]
    return Grid(
        codes=tensor.codes.to(torch.int16),
        scale=scale.expand(rows, -1).contiguous(),
        zero_point=None if zero_point is None else zero_point.expand(rows, -1).contiguous(),
        bits=form.bits,
        group_size=group_size,
    )


class ForeignReader(ABC):
    """How another project stores packed weights, as far as it takes to read them."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its `quant_method`."""

    @property
    @abstractmethod
    def leaves(self) -> tuple[str, ...]:
        """Last parts of the names of every tensor that belongs to a packed weight; the codes come first."""

    @abstractmethod
    def linears(self, store: TensorStore) -> list[str]:
        """Return the names of the packed linears of a checkpoint."""

    @abstractmethod
    def decode(
        self, name: str, store: TensorStore, settings: Settings
    ) -> tuple[QuantizedTensor, ActivationQuantizer | None]:
        """Read one weight.

        Raises:
            CheckpointError: A tensor is missing or of another shape or dtype.
            UnsupportedError: It cannot be kept without changing a number.
        """


class ForeignLayout(ForeignReader):
    """A layout that is written as well."""

    @abstractmethod
    def refuses(self, grid: Grid, activations: ActivationQuantizer | None) -> str | None:
        """Return why a weight does not fit, or None."""

    @abstractmethod
    def scale_dtype(self, dense: torch.dtype) -> torch.dtype:
        """Return the dtype that readers of this layout keep scales in, for a model of a dtype."""

    @abstractmethod
    def encode(self, grid: Grid, scale: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a weight by the last part of their names; `scale` is in its stored dtype."""

    @abstractmethod
    def settings(
        self, grids: Mapping[str, Grid], activations: Mapping[str, ActivationQuantizer | None], others: list[str]
    ) -> dict[str, Any]:
        """Return the `quantization_config` of a model; `others` are its linears in high precision."""


def require(
    store: TensorStore, full: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None
) -> Tensor:
    """Return a tensor of a checkpoint. Raises CheckpointError unless it is there with this dtype and shape."""
    if full not in store.names():
        raise damaged(full, "missing", "is not stored", "checkpoint")
    found = f"{store.dtype(full)} {store.shape(full)}"
    if store.dtype(full) not in dtypes or (shape is not None and store.shape(full) != shape):
        wanted = " or ".join(map(str, dtypes))
        raise damaged(full, found, f"is not the {wanted} {shape or ''} of the layout", "checkpoint")
    tensor = store.read(full)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise damaged(full, "NaN or infinity", "is no scale", "checkpoint")
    return tensor


def damaged(subject: str, value: object, constraint: str, place: str) -> CheckpointError:
    """Return the error for files that do not hold what they promise."""
    remedy = "download or export the checkpoint again"
    return CheckpointError(
        compose(subject=subject, value=value, constraint=constraint, place=place, remedy=remedy)
    )


def refused(layout: str, name: str, reason: str) -> UnsupportedError:
    """Return the error for a weight that a layout cannot hold, or that we cannot."""
    return UnsupportedError(
        compose(
            subject="linear",
            value=name,
            constraint=reason,
            place=f"{layout} layout",
            remedy="keep the native format, which holds every layout",
        )
    )
