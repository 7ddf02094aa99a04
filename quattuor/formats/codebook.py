# SPDX-License-Identifier: Apache-2.0
"""Codebooks: a code is an index into a short sorted table that a group of weights shares."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.formats.base import Format, Parameters

__all__ = ["Codebook", "check_table_bits", "look_up", "nearest_entry"]


def check_table_bits(bits: object, place: str) -> None:
    """Reject a width outside 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InputError(
            compose(
                subject="bits",
                value=bits,
                constraint="is not an integer from 1 to 8",
                place=place,
                remedy="choose a width from 1 to 8, for example 4",
            )
        )


def nearest_entry(
    values: Float[Tensor, "*lead S"], entries: Float[Tensor, "*table C"]
) -> Int64[Tensor, "*lead S"]:
    """Return the index of the entry nearest to each value; a tie takes the even index.

    Args:
        values: In float32 or float64.
        entries: Ascending along the last axis; leading axes broadcast against those of `values`.
    """
    entries = entries.to(values.dtype)
    limits = (entries[..., 1:] + entries[..., :-1]) / 2
    # A value equal to limit c lies between c and c + 1; moving every odd limit down by one unit in the last place
    # sends that tie upwards, and no other value.
    is_odd = torch.arange(limits.shape[-1], device=limits.device) % 2 == 1
    limits = torch.where(is_odd, torch.nextafter(limits, torch.full_like(limits, -torch.inf)), limits)
    limits = limits.expand(*values.shape[:-1], -1).contiguous()
    return torch.searchsorted(limits, values.contiguous())


def look_up(codes: UInt8[Tensor, "*lead S"], entries: Float[Tensor, "*table C"]) -> Float[Tensor, "*lead S"]:
    """Return entries[..., codes]; leading axes of `entries` broadcast against those of `codes`."""
    lead, num_entries = entries.shape[:-1], entries.shape[-1]
    # int32 positions in the flattened tables: a gather would need an int64 index of eight bytes per code.
    start = torch.arange(lead.numel(), dtype=torch.int32, device=codes.device) * num_entries
    positions = codes.to(torch.int32) + start.view(*lead, 1)
    return entries.reshape(-1).index_select(0, positions.view(-1)).view(positions.shape)


@dataclass(frozen=True, slots=True)
class Codebook(Format):
    """Any 2^bits numbers per group: x is approximated by `codebook[codes]`.

    Reads `codebook` `[R, G, 2^bits]`, ascending along its last axis, in float16, float32 or float64. Codes are in
    [0, 2^bits - 1]. Entries may repeat (a group with fewer distinct numbers); encode then returns one of them.

    Args:
        bits: Width of a code, 1 to 8.

    References:
        Kim et al., 2023, arXiv:2306.07629 (SqueezeLLM), section 4.1.
    """

    bits: int

    def __post_init__(self) -> None:
        """Reject widths that do not exist."""
        check_table_bits(self.bits, "Codebook")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest legal code."""
        return 0, 2**self.bits - 1

    def encode(self, values: Float[Tensor, "*lead S"], parameters: Parameters) -> UInt8[Tensor, "*lead S"]:
        """Return the index of the nearest entry; computes in float32, or float64 when either side is."""
        entries = self._entries(parameters)
        return nearest_entry(values.to(torch.promote_types(values.dtype, entries.dtype)), entries).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*lead S"], parameters: Parameters) -> Float[Tensor, "*lead S"]:
        """codebook[codes]."""
        return look_up(codes, self._entries(parameters))

    def _entries(self, parameters: Parameters) -> Float[Tensor, "*table C"]:
        """Return the table in float32, or float64 when it is stored so."""
        entries = parameters["codebook"]
        if entries.shape[-1] != 2**self.bits:
            raise InputError(
                compose(
                    subject="codebook entries",
                    value=entries.shape[-1],
                    constraint=f"are not the {2**self.bits} of {self.bits} bits",
                    place="Codebook",
                    remedy="fit the parameters with WeightedKMeans for this width",
                )
            )
        return entries if entries.dtype == torch.float64 else entries.float()
