# SPDX-License-Identifier: Apache-2.0
"""Deltas: sparse additions equal the dense matrix they stand for, and survive storage."""

import pytest
import torch

from quattuor.deltas import DELTAS, ColumnDelta, ElementDelta
from quattuor.errors import InputError

SHAPE = (6, 40)


def elements(generator, dtype=torch.float16):
    additions = torch.randn(SHAPE, generator=generator)
    mask = torch.rand(SHAPE, generator=generator) < 0.1
    mask[2] = False
    return additions, mask, ElementDelta.from_dense(additions, mask, dtype=dtype)


def columns(generator):
    indices = torch.tensor([7, 0, 39], dtype=torch.int32)
    return ColumnDelta(indices=indices, values=torch.randn(6, 3, generator=generator).half())


def test_elements_are_where_the_mask_is(generator):
    additions, mask, delta = elements(generator)
    expected = torch.where(mask, additions.half().float(), 0.0)
    assert torch.equal(delta.dense(SHAPE), expected)
    assert delta.columns.dtype == torch.int16
    assert delta.row_offsets[3] == delta.row_offsets[2]


def test_columns_are_where_the_indices_are(generator):
    delta = columns(generator)
    dense = delta.dense(SHAPE)
    assert torch.equal(dense[:, 0], delta.values[:, 1].float())
    assert torch.equal(dense[:, 39], delta.values[:, 2].float())
    assert dense.count_nonzero(dim=0).gt(0).sum() == 3


@pytest.mark.parametrize("make", [columns, lambda generator: elements(generator)[2]], ids=["columns", "elements"])
def test_product_equals_the_dense_product(make, generator):
    delta = make(generator)
    x = torch.randn(5, 40, generator=generator)
    assert torch.allclose(delta.matmul(x), x @ delta.dense(SHAPE).T, atol=1e-5)
    assert delta.matmul(x[:0]).shape == (0, 6)


@pytest.mark.parametrize("make", [columns, lambda generator: elements(generator)[2]], ids=["columns", "elements"])
def test_tensors_make_the_delta_again(make, generator):
    delta = make(generator)
    again = DELTAS[type(delta).__name__](**delta.tensors())
    assert torch.equal(again.dense(SHAPE), delta.dense(SHAPE))


def test_no_entry_at_all_is_an_empty_delta():
    delta = ElementDelta.from_dense(torch.ones(SHAPE), torch.zeros(SHAPE, dtype=torch.bool))
    assert delta.values.numel() == 0
    assert not delta.matmul(torch.ones(2, 40)).any()


def test_values_beyond_the_stored_range_are_refused():
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[1, 1] = True
    with pytest.raises(InputError, match=r"outlier=1000000.0 is beyond the range of torch.float16"):
        ElementDelta.from_dense(torch.full(SHAPE, 1e6), mask)
