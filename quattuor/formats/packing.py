# SPDX-License-Identifier: Apache-2.0
"""Codes <-> bytes. One documented layout per function pair.

`pack_rows` / `unpack_rows`: the layout of Quattuor's own checkpoints. Each row is a little-endian bit stream:
code j of width b occupies bits j*b to j*b + b - 1 of the row, least significant bit first; the row is padded with
zero bits to a whole number of bytes. Signed codes are stored in two's complement of width b. The layout knows no
device and no tile: kernels repack when a layer is built.
"""

import torch
from jaxtyping import Int8, Integer, UInt8
from torch import Tensor

from quattuor.errors import InputError, compose

__all__ = ["pack_rows", "packed_row_bytes", "unpack_rows"]

#: Codes that cross bytes are unpacked through 64-bit words; this many at once bound the memory that takes.
_CODES_AT_ONCE = 1 << 24


def check_width(bits: int, place: str) -> None:
    """Reject a width that does not fit a byte."""
    if not 1 <= bits <= 8:
        raise InputError(
            compose(
                subject="bits",
                value=bits,
                constraint="is not a width from 1 to 8",
                place=place,
                remedy="pass the width of the format, for example 4",
            )
        )


def packed_row_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one packed row: ceil(num_codes * bits / 8)."""
    return -(-num_codes * bits // 8)


def pack_rows(codes: Integer[Tensor, "N K"], bits: int) -> UInt8[Tensor, "N bytes"]:
    """Pack integer codes, signed or unsigned, into little-endian bit streams of one row each.

    Args:
        codes: Integers that all fit `bits` bits, either as two's complement or as unsigned numbers.
        bits: Width, 1 to 8.

    Raises:
        InputError: The width does not exist, or a code does not fit.
    """
    check_width(bits, "pack_rows")
    lowest, highest = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    half = 2 ** (bits - 1)
    # With negative codes present a code of 2^(b-1) or more would come back negative.
    if lowest < -half or highest > (half - 1 if lowest < 0 else 2 * half - 1):
        raise InputError(
            compose(
                subject="codes",
                value=f"{lowest}..{highest}",
                constraint=f"do not fit {bits} bits",
                place="pack_rows",
                remedy="clamp the codes to the range of their format first",
            )
        )
    num_rows, num_codes = codes.shape
    num_words = -(-num_codes // 8)  # eight codes of b bits fill b bytes exactly
    unsigned_NK = torch.zeros(num_rows, 8 * num_words, dtype=torch.int64, device=codes.device)
    unsigned_NK[:, :num_codes] = codes.to(torch.int64) & (2**bits - 1)
    shifts = torch.arange(8, device=codes.device) * bits
    words = (unsigned_NK.view(num_rows, num_words, 8) << shifts).sum(dim=-1)  # up to 64 bits; wraps, never carries
    byte_shifts = torch.arange(bits, device=codes.device) * 8
    packed = ((words.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8)
    return packed.reshape(num_rows, num_words * bits)[:, : packed_row_bytes(num_codes, bits)].contiguous()


def unpack_rows(
    packed: UInt8[Tensor, "N bytes"], bits: int, num_codes: int, *, signed: bool
) -> Int8[Tensor, "N K"] | UInt8[Tensor, "N K"]:
    """Undo `pack_rows`: int8 codes when `signed`, uint8 codes otherwise."""
    check_width(bits, "unpack_rows")
    expected = packed_row_bytes(num_codes, bits)
    if packed.shape[1] != expected:
        raise InputError(
            compose(
                subject="packed row length",
                value=packed.shape[1],
                constraint=f"is not the {expected} bytes of {num_codes} codes of {bits} bits",
                place="unpack_rows",
                remedy="pass the width and the number of codes that the rows were packed with",
            )
        )
    if 8 % bits == 0:
        codes = _codes_in_bytes(packed, bits)[:, :num_codes]
    else:
        rows = max(1, _CODES_AT_ONCE // max(num_codes, 1))
        codes = torch.cat([_codes_across_bytes(part, bits)[:, :num_codes] for part in packed.split(rows)])
    if not signed:
        return codes.contiguous()
    half = 2 ** (bits - 1)
    signed_NK: Tensor = ((codes ^ half) - half).view(torch.int8)  # wraps around as bytes do
    return signed_NK


def _codes_in_bytes(packed: Tensor, bits: int) -> Tensor:
    """Return the unsigned codes of rows whose codes do not cross bytes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(1)


def _codes_across_bytes(packed: Tensor, bits: int) -> Tensor:
    """Return the unsigned codes of rows, eight of them from each `bits` bytes."""
    num_rows, num_bytes = packed.shape
    num_words = -(-num_bytes // bits)
    padded = torch.zeros(num_rows, num_words * bits, dtype=torch.int64, device=packed.device)
    padded[:, :num_bytes] = packed
    byte_shifts = torch.arange(bits, device=packed.device) * 8
    words = (padded.view(num_rows, num_words, bits) << byte_shifts).sum(dim=-1)
    shifts = torch.arange(8, device=packed.device) * bits
    codes: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).view(num_rows, 8 * num_words)
