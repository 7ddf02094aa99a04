# SPDX-License-Identifier: Apache-2.0
"""Everything about a packed linear but its sizes and its numbers: what a checkpoint's config stores."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quattuor.activations.base import ActivationQuantizer
from quattuor.formats.base import Format
from quattuor.formats.packing import packed_row_bytes
from quattuor.granularity import Granularity
from quattuor.quantized_tensor import EXTRAS, QuantizedTensor

__all__ = ["ExtraLayout", "LinearLayout", "ParameterLayout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterLayout:
    """One stored parameter.

    Args:
        name: As the format reads it.
        dtype: Of its elements, for example "float32".
        per_group: Whether each group has its own.
        trailing: Further axes, for example the entries of a codebook.
        row_group: Consecutive rows that share it.
        bits: Width when its elements are packed into bytes along the groups; None when they are not.
    """

    name: str
    dtype: str
    per_group: bool
    trailing: tuple[int, ...] = ()
    row_group: int = 1
    bits: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraLayout:
    """One tensor of a delta or of an online map.

    Args:
        role: "delta", "input_map" or "output_map".
        kind: Class that reads it, see `DELTAS` and `ONLINE_MAPS`.
        name: Field of that class.
        dtype: Of its elements.
        shape: Whole shape; it does not follow from the sizes of the linear.
    """

    role: str
    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayout:
    """Everything about a packed linear but its sizes and its numbers; what a checkpoint's config stores."""

    number_format: Format
    granularity: Granularity
    activations: ActivationQuantizer | None
    parameters: tuple[ParameterLayout, ...]
    extras: tuple[ExtraLayout, ...] = ()

    @classmethod
    def of(cls, tensor: QuantizedTensor, activations: ActivationQuantizer | None) -> "LinearLayout":
        """Describe a packed weight."""
        num_groups, bits = tensor.granularity.num_groups(tensor.shape[1]), tensor.number_format.packed_parameters
        num_rows = tensor.granularity.split(torch.empty(tensor.shape, device="meta")).shape[0]
        return cls(
            number_format=tensor.number_format,
            granularity=tensor.granularity,
            activations=activations,
            parameters=tuple(
                ParameterLayout(
                    name=name,
                    dtype=_name_of(value.dtype),
                    per_group=num_groups > 1 and value.shape[1] == num_groups,
                    trailing=tuple(value.shape[2:]),
                    row_group=num_rows // value.shape[0],
                    bits=bits.get(name),
                )
                for name, value in tensor.parameters.items()
            ),
            extras=tuple(_extras(tensor)),
        )

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the stored tensors, as `QuantizedTensor.state` has them."""
        return (
            "packed",
            *(item.name for item in self.parameters),
            *(f"{item.role}_{item.name}" for item in self.extras),
        )

    def empty_state(self, out_features: int, in_features: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return uninitialised tensors of the right shapes and dtypes, as `QuantizedTensor.state` names them."""
        num_groups = self.granularity.num_groups(in_features)
        rows = self.granularity.split(torch.empty(out_features, in_features, device="meta")).shape[0]
        row_bytes = packed_row_bytes(in_features, self.number_format.bits)
        state = {"packed": torch.empty(out_features, row_bytes, dtype=torch.uint8, device=device)}
        for item in self.parameters:
            columns = num_groups if item.per_group else 1
            columns = columns if item.bits is None else packed_row_bytes(columns, item.bits)
            shape = (rows // item.row_group, columns, *item.trailing)
            state[item.name] = torch.empty(shape, dtype=getattr(torch, item.dtype), device=device)
        for extra in self.extras:
            state[f"{extra.role}_{extra.name}"] = torch.empty(
                extra.shape, dtype=getattr(torch, extra.dtype), device=device
            )
        return state

    def read(
        self, state: Mapping[str, Tensor], out_features: int, in_features: int, *, name: str
    ) -> QuantizedTensor:
        """Return the packed weight of a state.

        Raises:
            CheckpointError: `packed` is missing or has the wrong shape or dtype.
        """
        return QuantizedTensor.from_state(
            {key: state[key] for key in self.tensor_names if key in state},
            self.number_format,
            self.granularity,
            (out_features, in_features),
            extra_kinds={item.role: item.kind for item in self.extras},
            name=name,
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _extras(tensor: QuantizedTensor) -> Iterator[ExtraLayout]:
    for role, kind in tensor.extra_kinds.items():
        assert role in EXTRAS, role
        for name, value in getattr(tensor, role).tensors().items():
            yield ExtraLayout(
                role=role, kind=kind, name=name, dtype=_name_of(value.dtype), shape=tuple(value.shape)
            )
