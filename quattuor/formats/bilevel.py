# SPDX-License-Identifier: Apache-2.0
"""Uniform integers with a real zero point, whose scales and zero points may be small integers themselves.

Small groups need many scales. Storing them with three bits, on a grid that a few rows share, costs less than half
a bit per weight for groups of 16, and codes are chosen on the rounded scales, so that nothing is rounded behind a
solver.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.integer import check_bits

__all__ = ["BilevelInteger"]


@dataclass(frozen=True, slots=True)
class BilevelInteger(Format):
    """Codes in [0, 2^b - 1] on a grid whose statistics have two levels.

    x = scale * (codes - zero_point)
    scale      = scale_codes * scale_step + scale_base
    zero_point = zero_codes * zero_step + zero_base      any real number, also outside the codes

    Reads, when `scale_bits` is a number, `scale_codes` (uint8 `[R, G]`, stored with `scale_bits` bits each) and
    `scale_step`, `scale_base` (float16 `[R / row_group, G]`, each shared by `row_group` consecutive rows); when it
    is None, `scale` (float16 `[R, G]`). Likewise `zero_codes`, `zero_step`, `zero_base`, or `zero_point`.

    Bits per weight in groups of S: b + (scale_bits + zero_bits) / S + 64 / (S * row_group).

    Args:
        bits: Width of a code, 2 to 8.
        scale_bits: Width of a scale, 1 to 8, or None for float16.
        zero_bits: Width of a zero point, 1 to 8, or None for float16.
        row_group: Consecutive rows that share a second level; the last run of a matrix with fewer rows is shorter.

    References:
        Dettmers et al., 2023, arXiv:2306.03078 (SpQR), section 4.2. The second level there is scale and zero
        point; step and base take the same 32 bits, and keep a group of nearly equal scales precise.
    """

    bits: int
    scale_bits: int | None = 3
    zero_bits: int | None = 3
    row_group: int = 16

    def __post_init__(self) -> None:
        """Reject widths and row groups that do not exist."""
        check_bits(self.bits, "BilevelInteger")
        for name, value, largest in (
            ("scale_bits", self.scale_bits, 8),
            ("zero_bits", self.zero_bits, 8),
            ("row_group", self.row_group, 2**16),
        ):
            is_absent = value is None and name != "row_group"
            is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest
            if not is_absent and not is_count:
                raise InputError(
                    compose(
                        subject=name,
                        value=value,
                        constraint=f"is not an integer from 1 to {largest}",
                        place="BilevelInteger",
                        remedy="use 3 bits for statistics that 16 rows share, or None bits for float16 statistics",
                    )
                )

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest legal code."""
        return 0, 2**self.bits - 1

    @property
    def packed_parameters(self) -> Mapping[str, int]:
        """Widths of the statistics that are small integers."""
        widths = {"scale_codes": self.scale_bits, "zero_codes": self.zero_bits}
        return {name: bits for name, bits in widths.items() if bits is not None}

    def statistics(self, parameters: Parameters) -> tuple[Float[Tensor, "*lead"], Float[Tensor, "*lead"]]:
        """Return scale and zero point of every group, float32 (float64 when they are stored so)."""
        return self._statistic(parameters, "scale", "scale"), self._statistic(parameters, "zero", "zero_point")

    def resolved(self, parameters: Parameters) -> Parameters:
        """Return scale and zero point of every row as real numbers."""
        scale, zero_point = self.statistics(parameters)
        return Parameters(scale=scale, zero_point=zero_point)

    def encode(self, values: Float[Tensor, "*lead S"], parameters: Parameters) -> UInt8[Tensor, "*lead S"]:
        """clamp(round(values / scale + zero_point), 0, 2^b - 1), computed in float32 or wider."""
        scale, zero_point = self.statistics(parameters)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        steps = values / scale.unsqueeze(-1) + zero_point.unsqueeze(-1)
        return steps.round_().clamp_(*self.code_range).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*lead S"], parameters: Parameters) -> Float[Tensor, "*lead S"]:
        """scale * (codes - zero_point)."""
        scale, zero_point = self.statistics(parameters)
        return (codes.to(scale.dtype) - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)

    def _statistic(self, parameters: Parameters, kind: str, plain: str) -> Tensor:
        """Return the scales or the zero points as real numbers, one per row and group."""
        if plain in parameters:
            stored = parameters[plain]
            return stored.to(torch.promote_types(stored.dtype, torch.float32))
        codes, step, base = (parameters[f"{kind}_{part}"] for part in ("codes", "step", "base"))
        if step.shape[0] != codes.shape[0]:
            step, base = (
                shared.repeat_interleave(self.row_group, dim=0)[: codes.shape[0]] for shared in (step, base)
            )
        return codes.float() * step.float() + base.float()
