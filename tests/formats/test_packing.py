# SPDX-License-Identifier: Apache-2.0
"""Packing: every byte, every width, every length, against a decoder that reads one bit at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quattuor.errors import InputError
from quattuor.formats import packing
from quattuor.formats.packing import pack_rows, packed_row_bytes, unpack_rows

WIDTHS = range(1, 9)


def read_bits(row: bytes, bits: int, num_codes: int, *, signed: bool) -> list[int]:
    """Decode a little-endian bit stream from its definition: code j is bits j*b to j*b + b - 1."""
    stream = [(byte >> bit) & 1 for byte in row for bit in range(8)]
    codes = []
    for j in range(num_codes):
        code = sum(stream[j * bits + i] << i for i in range(bits))
        codes.append(code - 2**bits if signed and code >= 2 ** (bits - 1) else code)
    assert not any(stream[num_codes * bits :]), "the padding of a row is zero"
    return codes


def code_bounds(bits: int, *, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def as_codes(rows: list[list[int]], *, signed: bool) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8 if signed else torch.uint8)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    """Draw codes of any width, sign and size."""
    bits, signed = draw(st.sampled_from(WIDTHS)), draw(st.booleans())
    num_rows, num_codes = draw(st.integers(1, 4)), draw(st.integers(1, 33))
    lowest, highest = code_bounds(bits, signed=signed)
    row = st.lists(st.integers(lowest, highest), min_size=num_codes, max_size=num_codes)
    return as_codes(draw(st.lists(row, min_size=num_rows, max_size=num_rows)), signed=signed), bits, signed


@given(matrices())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_round_trip_and_bit_stream(drawn: tuple[Tensor, int, bool]) -> None:
    codes, bits, signed = drawn
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0], packed_row_bytes(codes.shape[1], bits))
    for row, expected in zip(packed, codes, strict=True):
        assert read_bits(bytes(row.tolist()), bits, codes.shape[1], signed=signed) == expected.tolist()
    unpacked = unpack_rows(packed, bits, codes.shape[1], signed=signed)
    assert unpacked.dtype == codes.dtype
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_value_in_every_place(bits: int, signed: bool) -> None:
    # Rows of `bits` bytes hold eight codes and no padding, so any bytes are legal there.
    values = torch.arange(256, dtype=torch.uint8)
    for place in range(bits):
        packed = torch.full((256, bits), 0xA5, dtype=torch.uint8)
        packed[:, place] = values
        codes = unpack_rows(packed, bits, 8, signed=signed)
        for row, decoded in zip(packed, codes, strict=True):
            assert read_bits(bytes(row.tolist()), bits, 8, signed=signed) == decoded.tolist()
        assert torch.equal(pack_rows(codes, bits), packed)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("num_codes", [1, 7, 8, 9, 16, 31])
def test_row_bytes_is_the_ceiling(bits: int, num_codes: int) -> None:
    needed = num_codes * bits
    assert packed_row_bytes(num_codes, bits) * 8 >= needed > packed_row_bytes(num_codes, bits) * 8 - 8


def test_known_bytes() -> None:
    # Four bits: the first code is the low half of the first byte; three bits: 1, 2, 3 -> 0b011_010_001.
    assert pack_rows(torch.tensor([[1, 2, -1, -8]], dtype=torch.int8), 4).tolist() == [[0x21, 0x8F]]
    assert pack_rows(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [[0b11010001, 0]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    packed = pack_rows(torch.empty(shape, dtype=torch.int8), 3)
    assert packed.shape == (shape[0], packed_row_bytes(shape[1], 3))
    assert unpack_rows(packed, 3, shape[1], signed=True).shape == shape


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_unpacked_in_parts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.arange(7 * 11).remainder(2**bits).to(torch.uint8).view(7, 11)
    monkeypatch.setattr(packing, "_CODES_AT_ONCE", 25)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 11, signed=False), codes)


def test_transposed_input() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4)
    assert torch.equal(pack_rows(codes.T, 4), pack_rows(codes.T.contiguous(), 4))


@pytest.mark.parametrize(
    ("codes", "bits"),
    [([8, -1], 4), ([16, 0], 4), ([-9, 0], 4), ([2, 0], 1), ([4, -2], 3)],
    ids=["mixed signs", "above unsigned", "below signed", "one bit", "three bits mixed"],
)
def test_codes_that_do_not_fit(codes: list[int], bits: int) -> None:
    with pytest.raises(InputError, match=rf"pack_rows: codes=.* do not fit {bits} bits; clamp"):
        pack_rows(torch.tensor([codes], dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_width_that_does_not_exist(bits: int) -> None:
    with pytest.raises(InputError, match=f"pack_rows: bits={bits} is not a width from 1 to 8"):
        pack_rows(torch.zeros(1, 8, dtype=torch.int8), bits)
    with pytest.raises(InputError, match=f"unpack_rows: bits={bits} is not a width from 1 to 8"):
        unpack_rows(torch.zeros(1, 8, dtype=torch.uint8), bits, 8, signed=True)


@pytest.mark.parametrize("num_codes", [5, 9])
def test_rows_of_the_wrong_length(num_codes: int) -> None:
    with pytest.raises(InputError, match=r"packed row length=4 is not the"):
        unpack_rows(torch.zeros(2, 4, dtype=torch.uint8), 4, num_codes, signed=False)
