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


def packed_row_bytes(num_codes: int, bits: int) -> int:
    """Bytes of one packed row: ceil(num_codes * bits / 8)."""
    return -(-num_codes * bits // 8)


def pack_rows(codes: Integer[Tensor, "N K"], bits: int) -> UInt8[Tensor, "N bytes"]:
    """Pack integer codes, signed or unsigned, into little-endian bit streams of one row each.

    Args:
        codes: Integers that fit `bits` bits in two's complement or unsigned.
        bits: Width, 1 to 8.

    Raises:
        InputError: A code does not fit.
    """
    lowest, highest = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if lowest < -(2 ** (bits - 1)) or highest > 2**bits - 1:
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
    period = 8 * -(-num_codes // 8)  # eight codes of b bits fill b bytes exactly
    unsigned_NK = torch.zeros(num_rows, period, dtype=torch.int64, device=codes.device)
    unsigned_NK[:, :num_codes] = codes.to(torch.int64) & (2**bits - 1)
    shifts = torch.arange(8, device=codes.device) * bits
    words = (unsigned_NK.view(num_rows, -1, 8) << shifts).sum(dim=-1)  # up to 64 bits; wraps, never carries
    byte_shifts = torch.arange(bits, device=codes.device) * 8
    packed = ((words.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8)
    return packed.reshape(num_rows, -1)[:, : packed_row_bytes(num_codes, bits)].contiguous()


def unpack_rows(
    packed: UInt8[Tensor, "N bytes"], bits: int, num_codes: int, *, signed: bool
) -> Int8[Tensor, "N K"] | UInt8[Tensor, "N K"]:
    """Undo `pack_rows`: int8 codes when `signed`, uint8 codes otherwise."""
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
    num_rows = packed.shape[0]
    period_bytes = bits * -(-num_codes // 8)
    padded = torch.zeros(num_rows, period_bytes, dtype=torch.int64, device=packed.device)
    padded[:, :expected] = packed
    byte_shifts = torch.arange(bits, device=packed.device) * 8
    words = (padded.view(num_rows, -1, bits) << byte_shifts).sum(dim=-1)
    shifts = torch.arange(8, device=packed.device) * bits
    unsigned_NK = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).reshape(num_rows, -1)[:, :num_codes]
    if not signed:
        return unsigned_NK.to(torch.uint8)
    half = 2 ** (bits - 1)
    return ((unsigned_NK ^ half) - half).to(torch.int8)
