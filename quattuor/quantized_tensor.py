# SPDX-License-Identifier: Apache-2.0
"""A weight in its packed form: the bytes, and everything needed to read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from quattuor.deltas import DELTAS, Delta
from quattuor.errors import CheckpointError, InputError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.packing import pack_rows, packed_row_bytes, unpack_rows
from quattuor.granularity import Granularity
from quattuor.online_maps import ONLINE_MAPS, OnlineMap

__all__ = ["EXTRAS", "QuantizedTensor"]

EXTRAS = ("delta", "input_map", "output_map")
"""What a packed weight may have beside its codes; the tensors of each are stored as `<role>_<name>`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A matrix `[N, K]` as packed codes and parameters.

    Invariants:
        packed has shape `[N, ceil(K * bits / 8)]` (layout: `formats/packing.py`, rows)
        every code lies in `number_format.code_range`
        parameters begin with `[R, G]` or `[R, 1]`, where `granularity.split` gives `[R, G, S]`
        decode_codes() = number_format.decode(codes, parameters), merged back to `[N, K]`
        y = x @ decode().T equals y = output_map(input_map(x) @ (decode_codes() + delta).T)

    Args:
        packed: The codes of each row.
        parameters: What the format needs to decode, in the dtypes that are stored.
        number_format: Which numbers the codes stand for.
        granularity: Which elements share parameters.
        shape: `(N, K)`.
        delta: Entries in high precision, as additions to the decoded codes.
        input_map: Applied to inputs before the codes.
        output_map: Applied to outputs after them.
    """

    packed: UInt8[Tensor, "N bytes"]
    parameters: Parameters
    number_format: Format
    granularity: Granularity
    shape: tuple[int, int]
    delta: Delta | None = None
    input_map: OnlineMap | None = None
    output_map: OnlineMap | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Integer[Tensor, "N K"],
        parameters: Parameters,
        number_format: Format,
        granularity: Granularity,
    ) -> "QuantizedTensor":
        """Pack the codes. Raises InputError when one lies outside the format's range."""
        lowest, highest = number_format.code_range
        if codes.numel() and (int(codes.min()) < lowest or int(codes.max()) > highest):
            raise InputError(
                compose(
                    subject="codes",
                    value=f"{int(codes.min())}..{int(codes.max())}",
                    constraint=f"leave the range {lowest}..{highest}",
                    place=str(number_format),
                    remedy="make them with the format's encode",
                )
            )
        return cls(
            packed=pack_rows(codes, number_format.bits),
            parameters=parameters,
            number_format=number_format,
            granularity=granularity,
            shape=(codes.shape[0], codes.shape[1]),
        )

    @property
    def codes(self) -> Integer[Tensor, "N K"]:
        """One integer per element: int8 when the format has negative codes, uint8 otherwise."""
        signed = self.number_format.code_range[0] < 0
        return unpack_rows(self.packed, self.number_format.bits, self.shape[1], signed=signed)

    def decode_codes(self) -> Float[Tensor, "N K"]:
        """Return the real numbers of the codes alone, in float32."""
        grouped = self.number_format.decode(self.granularity.split(self.codes), self.parameters)
        return self.granularity.merge(grouped, self.shape)

    def decode(self) -> Float[Tensor, "N K"]:
        """Return the weight that the layer multiplies by: codes, delta and maps together, in float32."""
        weight_NK = self.decode_codes()
        if self.delta is not None:
            weight_NK = weight_NK + self.delta.dense(self.shape).to(weight_NK.dtype)
        if self.output_map is not None:
            weight_NK = self.output_map.apply(weight_NK.T).T
        if self.input_map is not None:
            identity_KK = torch.eye(self.shape[1], dtype=weight_NK.dtype, device=weight_NK.device)
            weight_NK = weight_NK @ self.input_map.apply(identity_KK).T
        return weight_NK

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and all parameters, as stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    @property
    def bits_per_weight(self) -> float:
        """Measured: stored bits divided by the number of weights."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Return rows `start` to `stop` as a tensor of their own, in memory of their own.

        A delta or an output map belongs to the whole weight: such weights are solved one by one.
        """
        assert self.delta is None, "a weight with a delta is not cut"
        assert self.input_map is None, "a weight with maps is not cut"
        assert self.output_map is None, "a weight with maps is not cut"
        parameters = self.parameters.rows(start, stop)
        return QuantizedTensor(
            packed=self.packed[start:stop].clone(),
            parameters=Parameters(**{name: tensor.clone() for name, tensor in parameters.items()}),
            number_format=self.number_format,
            granularity=self.granularity,
            shape=(stop - start, self.shape[1]),
        )

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store: `packed`, the parameters under their own names, and those of the extras."""
        state = {"packed": self.packed}
        bits = self.number_format.packed_parameters
        for name, value in self.parameters.items():
            state[name] = pack_rows(value, bits[name]) if name in bits else value
        for role in EXTRAS:
            extra: Delta | OnlineMap | None = getattr(self, role)
            if extra is not None:
                state |= {f"{role}_{name}": value for name, value in extra.tensors().items()}
        return state

    @property
    def extra_kinds(self) -> dict[str, str]:
        """Class name of each extra that is there."""
        return {role: type(extra).__name__ for role in EXTRAS if (extra := getattr(self, role)) is not None}

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        number_format: Format,
        granularity: Granularity,
        shape: tuple[int, int],
        *,
        extra_kinds: Mapping[str, str] | None = None,
        name: str = "tensor",
    ) -> "QuantizedTensor":
        """Undo `state`; `extra_kinds` says which extras the state holds.

        Raises:
            CheckpointError: `packed` is missing or has the wrong shape or dtype.
        """
        packed = state.get("packed")
        expected = (shape[0], packed_row_bytes(shape[1], number_format.bits))
        if packed is None or tuple(packed.shape) != expected or packed.dtype != torch.uint8:
            found = "missing" if packed is None else f"{packed.dtype} {tuple(packed.shape)}"
            raise CheckpointError(
                compose(
                    subject="packed",
                    value=found,
                    constraint=f"is not the uint8 {expected} of {number_format}",
                    place=name,
                    remedy="write the checkpoint again",
                )
            )
        kinds, bits = extra_kinds or {}, number_format.packed_parameters
        extras = {role: _extra(role, kind, state) for role, kind in kinds.items()}
        parameters = {
            key: unpack_rows(value, bits[key], granularity.num_groups(shape[1]), signed=False)
            if key in bits
            else value
            for key, value in state.items()
            if key != "packed" and not any(key.startswith(f"{role}_") for role in kinds)
        }
        return cls(
            packed=packed,
            parameters=Parameters(**parameters),
            number_format=number_format,
            granularity=granularity,
            shape=shape,
            **extras,
        )


def _extra(role: str, kind: str, state: Mapping[str, Tensor]) -> Any:
    """Build one extra from the tensors that carry its name."""
    tensors = {key.removeprefix(f"{role}_"): value for key, value in state.items() if key.startswith(f"{role}_")}
    table: Mapping[str, Any] = DELTAS if role == "delta" else ONLINE_MAPS
    return table[kind](**tensors)
