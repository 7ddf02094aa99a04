# SPDX-License-Identifier: Apache-2.0
"""Products with entries in compressed rows: what they are, and what is refused."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.kernels.sparse_product import reference, sparse_product

DENSE = torch.tensor([[0.0, 2.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 4.0, 0.0]])
OFFSETS = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
COLUMNS = torch.tensor([1, 3, 0, 2], dtype=torch.int16)
VALUES = torch.tensor([2.0, -1.0, 0.5, 4.0], dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_product_equals_the_dense_product(dtype):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 8.0, 0.0]], dtype=dtype)
    y = sparse_product(x, OFFSETS, COLUMNS, VALUES)
    assert y.dtype == torch.float32
    assert torch.equal(y, x.float() @ DENSE.T)
    assert torch.equal(sparse_product(x.T.contiguous().T, OFFSETS, COLUMNS.int(), VALUES.float()), y)
    assert sparse_product(x[:0], OFFSETS, COLUMNS, VALUES).shape == (0, 3)


def test_tokens_are_taken_some_at_a_time(monkeypatch):
    x = torch.randn(11, 4)
    expected = sparse_product(x, OFFSETS, COLUMNS, VALUES)
    monkeypatch.setattr(reference, "MAX_TERMS", 9)
    assert torch.equal(sparse_product(x, OFFSETS, COLUMNS, VALUES), expected)


def test_rows_without_entries_are_zero():
    y = sparse_product(torch.ones(2, 4), torch.zeros(4, dtype=torch.int32), COLUMNS[:0], VALUES[:0])
    assert torch.equal(y, torch.zeros(2, 3))


def test_a_compiler_sees_the_operator():
    x = torch.randn(2, 4)

    def model(x):
        return sparse_product(x, OFFSETS, COLUMNS, VALUES) + 1

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    torch.library.opcheck(torch.ops.quattuor.sparse_product, (x, OFFSETS, COLUMNS, VALUES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4)}, r"x.dim\(\)=1 is not 2"),
        ({"x": torch.ones(2, 4, dtype=torch.int8)}, r"x.dtype=torch.int8 is not"),
        ({"row_offsets": OFFSETS.long()}, r"row_offsets.dtype=torch.int64 is not int32"),
        ({"row_offsets": OFFSETS[:0]}, r"row_offsets.numel\(\)=0 is not N \+ 1"),
        ({"columns": COLUMNS.long()}, r"columns.dtype=torch.int64 is not int16 or int32"),
        ({"columns": COLUMNS[:2]}, r"columns"),
        ({"values": VALUES.int()}, r"values.dtype=torch.int32 is not"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"x": torch.ones(2, 4), "row_offsets": OFFSETS, "columns": COLUMNS, "values": VALUES} | change
    with pytest.raises(InputError, match=message):
        sparse_product(**arguments)
