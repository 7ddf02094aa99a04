# SPDX-License-Identifier: Apache-2.0
"""The contract of a number format, and the parameters that turn its codes into real numbers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from jaxtyping import Float, Int8, Int64, UInt8
from torch import Tensor

from quattuor.errors import InputError, compose

__all__ = ["Format", "Parameters"]


class Parameters(Mapping[str, Tensor]):
    """Named tensors that share their leading axes with a grouped view.

    For a weight viewed as `[R, G, S]` every tensor here begins with `[R, G]`, or `[R, 1]` when all groups of a
    row share it. Each format documents the names it reads. Immutable: the tensors may be shared, never written.
    """

    __slots__ = ("_tensors",)

    def __init__(self, **tensors: Tensor) -> None:
        """Keep the named tensors."""
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor."""
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(
                compose(
                    subject="parameter",
                    value=name,
                    constraint=f"is not among {sorted(self._tensors)}",
                    place="Parameters",
                    remedy="fit the parameters with a scale rule that serves this format",
                )
            ) from None

    def __contains__(self, name: object) -> bool:
        """Tell whether a tensor has this name; the mixin would catch a KeyError, which is not raised here."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order they were given."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._tensors)

    def group(self, index: int) -> "Parameters":
        """Return the parameters `[R, 1, ...]` of one group; tensors shared by all groups stay as they are."""
        return Parameters(
            **{
                name: tensor if tensor.shape[1] == 1 else tensor[:, index : index + 1]
                for name, tensor in self._tensors.items()
            }
        )

    def columns(self, groups: Int64[Tensor, " K"]) -> "Parameters":
        """Return the parameters `[R, K, ...]` of columns that belong to the given groups; shared ones stay."""
        return Parameters(
            **{
                name: tensor if tensor.shape[1] == 1 else tensor[:, groups]
                for name, tensor in self._tensors.items()
            }
        )

    def slice(self, start: int, stop: int) -> "Parameters":
        """Return the parameters of groups `start` to `stop`; shared ones stay."""
        return Parameters(
            **{
                name: tensor if tensor.shape[1] == 1 else tensor[:, start:stop]
                for name, tensor in self._tensors.items()
            }
        )

    def rows(self, start: int, stop: int) -> "Parameters":
        """Return the parameters of rows `start` to `stop`; tensors shared by all rows stay as they are."""
        return Parameters(
            **{
                name: tensor if tensor.shape[0] == 1 else tensor[start:stop]
                for name, tensor in self._tensors.items()
            }
        )

    def __repr__(self) -> str:
        """Show names and shapes."""
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"Parameters({shapes})"


class Format(ABC):
    """Which numbers exist. Formats see grouped values `[..., S]` and parameters `[...]`, never models.

    Invariants, tested for every format: `encode(decode(codes)) == codes` for every legal code with positive
    parameters; `decode(encode(x))` is a nearest representable number; ties round half to even.
    """

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits that one packed code takes."""

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest legal code."""

    @abstractmethod
    def encode(
        self, values: Float[Tensor, "*lead S"], parameters: Parameters
    ) -> Int8[Tensor, "*lead S"] | UInt8[Tensor, "*lead S"]:
        """Return the code of the nearest representable number; values out of range saturate."""

    @abstractmethod
    def decode(
        self, codes: Int8[Tensor, "*lead S"] | UInt8[Tensor, "*lead S"], parameters: Parameters
    ) -> Float[Tensor, "*lead S"]:
        """Return the real numbers of the codes, in float32 (float64 when the scale is float64)."""

    @property
    def row_group(self) -> int:
        """Consecutive rows that share a parameter; their number of rows must divide a weight's."""
        return 1

    @property
    def packed_parameters(self) -> Mapping[str, int]:
        """Parameters that are small integers themselves, and the bits that each takes when stored."""
        return {}

    def resolved(self, parameters: Parameters) -> Parameters:
        """Return parameters of the same numbers that take least work to read; for loops that read them often."""
        return parameters

    def fake_quantize(self, values: Float[Tensor, "*lead S"], parameters: Parameters) -> Float[Tensor, "*lead S"]:
        """decode(encode(values)), in the dtype of `values`."""
        return self.decode(self.encode(values, parameters), parameters).to(values.dtype)
