# SPDX-License-Identifier: Apache-2.0
"""Words of codes, against Python integers."""

import pytest
import torch

from quattuor.checkpoints.awq import ORDER
from quattuor.checkpoints.int32_words import pack_words, unpack_words
from quattuor.errors import InputError


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("reverses", [False, True])
def test_every_place_of_a_word(bits: int, reverses: bool, generator: torch.Generator) -> None:
    per_word = 32 // bits
    order = list(reversed(range(per_word))) if reverses else None
    codes = torch.randint(0, 2**bits, (3, 2 * per_word), generator=generator).to(torch.int32)
    words = pack_words(codes, bits, order)
    assert words.dtype == torch.int32
    for row in range(3):
        for word in range(2):
            unsigned = int(words[row, word]) % 2**32
            for place in range(per_word):
                code = int(codes[row, word * per_word + (order[place] if order else place)])
                assert (unsigned >> (bits * place)) & (2**bits - 1) == code
    assert torch.equal(unpack_words(words, bits, order).to(torch.int32) & (2**bits - 1), codes)


def test_the_order_of_awq_is_undone(generator: torch.Generator) -> None:
    codes = torch.randint(0, 16, (2, 16), generator=generator).to(torch.int16)
    words = pack_words(codes, 4, ORDER)
    assert int(words[0, 0]) % 2**32 & 0xF == int(codes[0, 0])
    assert (int(words[0, 0]) % 2**32 >> 4) & 0xF == int(codes[0, 2])
    assert torch.equal(unpack_words(words, 4, ORDER), codes)


@pytest.mark.parametrize(
    ("codes", "bits"), [(torch.full((1, 8), 16), 4), (torch.full((1, 8), -1), 4), (torch.zeros(1, 7), 4)]
)
def test_codes_that_do_not_fit(codes: torch.Tensor, bits: int) -> None:
    with pytest.raises(InputError, match="do not fill words of 8 unsigned codes of 4 bits"):
        pack_words(codes.to(torch.int16), bits)


def test_a_width_that_does_not_divide_a_word() -> None:
    with pytest.raises(InputError, match="bits=3 does not divide 32"):
        pack_words(torch.zeros(1, 8, dtype=torch.int16), 3)
