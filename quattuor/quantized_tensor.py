# SPDX-License-Identifier: Apache-2.0
"""A weight in its packed form: the bytes, and everything needed to read them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from quattuor.errors import CheckpointError, InputError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.packing import pack_rows, packed_row_bytes, unpack_rows
from quattuor.granularity import Granularity

__all__ = ["QuantizedTensor"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A matrix `[N, K]` as packed codes and parameters.

    Invariants:
        packed has shape `[N, ceil(K * bits / 8)]` (layout: `formats/packing.py`, rows)
        every code lies in `number_format.code_range`
        parameters begin with `[R, G]` or `[R, 1]`, where `granularity.split` gives `[R, G, S]`
        decode() = number_format.decode(codes, parameters), merged back to `[N, K]`

    Args:
        packed: The codes of each row.
        parameters: What the format needs to decode, in the dtypes that are stored.
        number_format: Which numbers the codes stand for.
        granularity: Which elements share parameters.
        shape: `(N, K)`.
    """

    packed: UInt8[Tensor, "N bytes"]
    parameters: Parameters
    number_format: Format
    granularity: Granularity
    shape: tuple[int, int]

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

    def decode(self) -> Float[Tensor, "N K"]:
        """Return the real numbers, in float32."""
        grouped = self.number_format.decode(self.granularity.split(self.codes), self.parameters)
        return self.granularity.merge(grouped, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and all parameters, as stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    @property
    def bits_per_weight(self) -> float:
        """Measured: stored bits divided by the number of weights."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Return rows `start` to `stop` as a tensor of their own, in memory of their own."""
        parameters = self.parameters.rows(start, stop)
        return QuantizedTensor(
            packed=self.packed[start:stop].clone(),
            parameters=Parameters(**{name: tensor.clone() for name, tensor in parameters.items()}),
            number_format=self.number_format,
            granularity=self.granularity,
            shape=(stop - start, self.shape[1]),
        )

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store: `packed`, and the parameters under their own names."""
        return {"packed": self.packed, **self.parameters}

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        number_format: Format,
        granularity: Granularity,
        shape: tuple[int, int],
        *,
        name: str = "tensor",
    ) -> "QuantizedTensor":
        """Undo `state`.

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
        return cls(
            packed=packed,
            parameters=Parameters(**{key: value for key, value in state.items() if key != "packed"}),
            number_format=number_format,
            granularity=granularity,
            shape=shape,
        )
