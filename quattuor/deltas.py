# SPDX-License-Identifier: Apache-2.0
"""What is added to the decoded codes of a weight: entries that stay in high precision.

A delta holds (wanted value) - (value that the code at the same place decodes to), so that adding it gives the
wanted value, and nothing has to know which codes it covers.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.kernels.sparse_product import sparse_product

__all__ = ["DELTAS", "ColumnDelta", "Delta", "ElementDelta"]


class Delta(ABC):
    """Sparse additions to a matrix [N, K], held in a few tensors."""

    @abstractmethod
    def dense(self, shape: tuple[int, int]) -> Float[Tensor, "N K"]:
        """Return the additions as a matrix, float32."""

    @abstractmethod
    def matmul(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M N"]:
        """Return x @ dense.T, computed in float32 from the sparse form."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, named as the fields."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnDelta(Delta):
    """Whole input columns: dense[:, indices[i]] = values[:, i].

    Args:
        indices: Distinct columns, int32 [k].
        values: Additions, floating point [N, k].
    """

    indices: Int32[Tensor, " k"]
    values: Float[Tensor, "N k"]

    def dense(self, shape: tuple[int, int]) -> Float[Tensor, "N K"]:
        """Return the additions as a matrix, float32."""
        result_NK = torch.zeros(shape, device=self.values.device)
        result_NK[:, self.indices.long()] = self.values.float()
        return result_NK

    def matmul(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M N"]:
        """Return x[:, indices] @ values.T."""
        product: Tensor = x[:, self.indices.long()].float() @ self.values.float().T
        return product

    def tensors(self) -> dict[str, Tensor]:
        """Return indices and values."""
        return {"indices": self.indices, "values": self.values}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ElementDelta(Delta):
    """Single entries in compressed rows: row n holds entries row_offsets[n] to row_offsets[n + 1].

    Args:
        row_offsets: int32 [N + 1], from 0 to nnz, never decreasing.
        columns: int16 or int32 [nnz], increasing within a row.
        values: Additions, floating point [nnz].
    """

    row_offsets: Int32[Tensor, " rows"]
    columns: Integer[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]

    @classmethod
    def from_dense(
        cls, additions: Float[Tensor, "N K"], mask: Tensor, *, dtype: torch.dtype = torch.float16
    ) -> "ElementDelta":
        """Keep the entries of `additions` where `mask` is True, rounded to `dtype`.

        Raises:
            InputError: An entry is beyond the range of `dtype`.
        """
        rows, columns = mask.nonzero(as_tuple=True)
        values = additions[mask].to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                compose(
                    subject="outlier",
                    value=float(additions[mask].abs().max()),
                    constraint=f"is beyond the range of {dtype}",
                    place="ElementDelta",
                    remedy="repair the weight it comes from, or keep this linear in high precision",
                )
            )
        counts_N = torch.bincount(rows, minlength=mask.shape[0])
        row_offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        row_offsets[1:] = counts_N.cumsum(0)
        index_dtype = torch.int16 if mask.shape[1] <= 2**15 else torch.int32
        return cls(row_offsets=row_offsets, columns=columns.to(index_dtype), values=values)

    @property
    def rows(self) -> Tensor:
        """Row of each entry, int64 [nnz]."""
        counts_N = self.row_offsets.diff().long()
        rows_N = torch.arange(counts_N.numel(), device=counts_N.device)
        # The number is stated so that no device is waited for.
        return rows_N.repeat_interleave(counts_N, output_size=self.values.numel())

    def dense(self, shape: tuple[int, int]) -> Float[Tensor, "N K"]:
        """Return the additions as a matrix, float32."""
        result_NK = torch.zeros(shape, device=self.values.device)
        result_NK[self.rows, self.columns.long()] = self.values.float()
        return result_NK

    def matmul(self, x: Float[Tensor, "M K"]) -> Float[Tensor, "M N"]:
        """Return x @ dense.T as a sparse product."""
        product: Tensor = sparse_product(x, self.row_offsets, self.columns, self.values)
        return product

    def tensors(self) -> dict[str, Tensor]:
        """Return offsets, columns and values."""
        return {"row_offsets": self.row_offsets, "columns": self.columns, "values": self.values}


DELTAS: dict[str, type[ColumnDelta] | type[ElementDelta]] = {
    "ColumnDelta": ColumnDelta,
    "ElementDelta": ElementDelta,
}
"""Every kind of delta that a checkpoint may name."""
