# SPDX-License-Identifier: Apache-2.0
"""Codebooks: nearest entries, ties, tables that groups do not share, widths."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.formats import Codebook, Parameters
from quattuor.formats.codebook import look_up, nearest_entry


def test_nearest_entry_agrees_with_an_exhaustive_search(generator: torch.Generator) -> None:
    entries = torch.randn(3, 2, 16, generator=generator).sort(dim=-1).values
    values = torch.randn(3, 2, 200, generator=generator) * 2
    distance = (values[..., None] - entries[..., None, :]).abs()
    found = nearest_entry(values, entries)
    assert torch.equal(distance.gather(-1, found[..., None]).squeeze(-1), distance.amin(dim=-1))


def test_ties_take_the_even_code() -> None:
    entries = torch.tensor([[-3.0, -1.0, 1.0, 3.0, 5.0, 7.0, 9.0, 11.0]])
    ties = torch.arange(-2.0, 11.0, 2.0)[None]
    assert nearest_entry(ties, entries).tolist() == [[0, 2, 2, 4, 4, 6, 6]]
    up, down = (torch.nextafter(ties, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    assert nearest_entry(up, entries).tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert nearest_entry(down, entries).tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_repeated_entries_decode_to_the_same_number() -> None:
    book = Parameters(codebook=torch.tensor([[[-1.0, 0.5, 0.5, 2.0]]]))
    values = torch.tensor([[[-2.0, 0.4, 0.6, 3.0]]])
    assert Codebook(2).fake_quantize(values, book).tolist() == [[[-1.0, 0.5, 0.5, 2.0]]]


def test_a_table_shared_by_groups_and_one_per_group(generator: torch.Generator) -> None:
    shared = torch.randn(4, 1, 8, generator=generator).sort(dim=-1).values
    values = torch.randn(4, 3, 20, generator=generator)
    spread = Parameters(codebook=shared.expand(4, 3, 8).contiguous())
    codes = Codebook(3).encode(values, Parameters(codebook=shared))
    assert torch.equal(codes, Codebook(3).encode(values, spread))
    decoded = Codebook(3).decode(codes, Parameters(codebook=shared))
    assert torch.equal(decoded, Codebook(3).decode(codes, spread))
    assert torch.equal(decoded, shared.expand(4, 3, 8).gather(-1, codes.long()))


def test_look_up_needs_no_wide_index(generator: torch.Generator) -> None:
    table = torch.randn(2, 5, 4, generator=generator)
    codes = torch.randint(0, 4, (2, 5, 7), generator=generator, dtype=torch.uint8)
    assert torch.equal(look_up(codes, table), table.gather(-1, codes.long()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_of_computation(dtype: torch.dtype) -> None:
    book = Parameters(codebook=torch.tensor([[[-1.0, 0.0, 1.0, 2.0]]], dtype=dtype))
    wide = torch.promote_types(dtype, torch.float32)
    assert Codebook(2).decode(torch.zeros(1, 1, 3, dtype=torch.uint8), book).dtype == wide


@pytest.mark.parametrize("bits", [0, 9, True])
def test_widths_that_do_not_exist(bits: int) -> None:
    with pytest.raises(InputError, match=r"Codebook: bits=.* is not an integer from 1 to 8; "):
        Codebook(bits)


def test_a_table_of_another_width_is_refused() -> None:
    with pytest.raises(InputError, match="codebook entries=8 are not the 16 of 4 bits"):
        Codebook(4).encode(torch.zeros(1, 1, 2), Parameters(codebook=torch.zeros(1, 1, 8)))
