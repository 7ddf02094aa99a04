# SPDX-License-Identifier: Apache-2.0
"""What the operation must compute, as far as it is known when the layer is built."""

from dataclasses import dataclass
from typing import Literal

import torch

from quattuor.kernels.dispatch import OUTPUT_DTYPES, check

__all__ = ["PACKED_BITS", "TABLE_DTYPES", "LutProblem"]

TABLE_DTYPES = (torch.float16, torch.float32)
#: Memory of a code where it is packed to its width.
PACKED_BITS = {bits: bits for bits in range(1, 9)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LutProblem:
    """A linear layer with coded weights and floating-point activations.

    Attributes:
        out_features: N, at least 1.
        in_features: K, at least 1.
        weight_bits: Bits per code, 1 to 8; codes lie in [0, 2^b - 1].
        kind: "codebook" for 2^b entries per group, "planes" for b signed scales per group.
        group_size: Weights along K that share a table; None for one table per output channel.
        offset: Whether a group of planes has a constant term.
        sparse: Whether there are single entries beside the codes.
        table_dtype: Of entries, scales and offsets: float16 or float32.
        output_dtype: float16, bfloat16 or float32.
        device_type: "cpu", "cuda", ...
        compute_capability: (major, minor) of a CUDA device, else None.
    """

    out_features: int
    in_features: int
    weight_bits: int
    kind: Literal["codebook", "planes"]
    group_size: int | None = None
    offset: bool = False
    sparse: bool = False
    table_dtype: torch.dtype = torch.float16
    output_dtype: torch.dtype = torch.float16
    device_type: str = "cpu"
    compute_capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        place = "LutProblem"
        for name in ("out_features", "in_features"):
            value = getattr(self, name)
            check(value >= 1, name, value, "is not a positive size", place, "pass the weight's shape")
        bits, size = self.weight_bits, self.group_size
        check(1 <= bits <= 8, "weight_bits", bits, "is outside 1 .. 8", place, "use 1 to 8 bits")
        check(
            self.kind in ("codebook", "planes"),
            "kind",
            self.kind,
            "is no kind of table",
            place,
            'use "codebook" or "planes"',
        )
        check(
            size is None or size >= 1,
            "group_size",
            size,
            "is not a positive size",
            place,
            "use None for one table per channel, or 32, 64 or 128",
        )
        check(
            not self.offset or self.kind == "planes",
            "offset",
            self.offset,
            "is not defined for a codebook",
            place,
            "add it to the entries",
        )
        check(
            self.table_dtype in TABLE_DTYPES,
            "table_dtype",
            self.table_dtype,
            "is not a supported floating-point type",
            place,
            "use float16 or float32",
        )
        check(
            self.output_dtype in OUTPUT_DTYPES,
            "output_dtype",
            self.output_dtype,
            "is not a supported floating-point type",
            place,
            "use float16, bfloat16 or float32",
        )

    @property
    def num_groups(self) -> int:
        """G: tables per output channel."""
        return 1 if self.group_size is None else -(-self.in_features // self.group_size)

    @property
    def table_size(self) -> int:
        """Numbers in the table of a group."""
        return 2**self.weight_bits if self.kind == "codebook" else self.weight_bits
