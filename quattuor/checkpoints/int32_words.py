# SPDX-License-Identifier: Apache-2.0
"""Unsigned codes in 32-bit words, as GPTQ, AWQ and compressed-tensors store them.

A word holds 32 / bits codes, the first in the lowest bits; `order` names which code of a word lies in which place.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int32, Integer
from torch import Tensor

from quattuor.errors import InputError, compose

__all__ = ["codes_per_word", "pack_words", "unpack_words"]


def codes_per_word(bits: int) -> int:
    """Return 32 / bits. Raises InputError when that is no whole number."""
    if bits < 1 or 32 % bits:
        raise InputError(
            compose(
                subject="bits",
                value=bits,
                constraint="does not divide 32",
                place="int32 words",
                remedy="use 2, 4 or 8 bits",
            )
        )
    return 32 // bits


def pack_words(
    codes: Integer[Tensor, "rows columns"], bits: int, order: Sequence[int] | None = None
) -> Int32[Tensor, "rows words"]:
    """Pack codes in [0, 2^bits - 1] along the columns.

    Args:
        codes: A multiple of 32 / bits columns.
        bits: Width of a code; divides 32.
        order: Place p of a word holds its code `order[p]`; in their own order when None.

    Raises:
        InputError: A width, a code or a number of columns that does not fit.
    """
    per_word = codes_per_word(bits)
    lowest, highest = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if codes.shape[1] % per_word or lowest < 0 or highest >= 2**bits:
        raise InputError(
            compose(
                subject="codes",
                value=f"{tuple(codes.shape)} in {lowest}..{highest}",
                constraint=f"do not fill words of {per_word} unsigned codes of {bits} bits",
                place="pack_words",
                remedy="shift the codes to 0 and pad the columns first",
            )
        )
    wide = codes.to(torch.int64).view(codes.shape[0], -1, per_word)
    if order is not None:
        wide = wide[:, :, list(order)]
    words = (wide << (bits * torch.arange(per_word, device=codes.device))).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_words(
    words: Int32[Tensor, "rows words"], bits: int, order: Sequence[int] | None = None
) -> Integer[Tensor, "rows columns"]:
    """Undo `pack_words`; int16."""
    per_word = codes_per_word(bits)
    shifts = bits * torch.arange(per_word, device=words.device)
    codes: Tensor = (words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)
    if order is not None:
        place = torch.empty(per_word, dtype=torch.int64, device=words.device)
        place[list(order)] = torch.arange(per_word, device=words.device)
        codes = codes[:, :, place]
    return codes.reshape(words.shape[0], -1).to(torch.int16)
