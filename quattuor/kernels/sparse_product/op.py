# SPDX-License-Identifier: Apache-2.0
"""The public wrapper: checks the inputs and calls the registered operator."""

import torch
from torch import Tensor

from quattuor.kernels.dispatch import OUTPUT_DTYPES, check, check_tensor, is_plain_call
from quattuor.kernels.requirements import runs_on_triton
from quattuor.kernels.sparse_product import reference

__all__ = ["sparse_product"]

torch.library.define(
    "quattuor::sparse_product", "(Tensor x, Tensor row_offsets, Tensor columns, Tensor values) -> Tensor"
)


def multiply(x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Multiply on the device of x; `sparse_product` checks the arguments."""
    if not runs_on_triton(x.device):
        return reference.multiply(x, row_offsets, columns, values)
    from quattuor.kernels.sparse_product import triton_kernel

    with torch.cuda.device_of(x):
        return triton_kernel.multiply(x, row_offsets, columns, values)


torch.library.impl("quattuor::sparse_product", "CompositeExplicitAutograd", multiply)


@torch.library.register_fake("quattuor::sparse_product")
def fake_multiply(x, row_offsets, columns, values):
    return x.new_empty((x.shape[0], row_offsets.shape[0] - 1), dtype=torch.float32)


def sparse_product(x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Multiply tokens by a few entries in compressed rows: y[m, n] = sum_e x[m, columns[e]] * values[e].

    The sum runs over the entries e from row_offsets[n] to row_offsets[n + 1], in float32, and has the same bits in
    every run.

    Args:
        x: float16, bfloat16 or float32 [M, K]; M may be 0; any strides.
        row_offsets: int32 [N + 1], from 0 to nnz, never decreasing.
        columns: int16 or int32 [nnz], each below K; not looked at.
        values: float16, bfloat16 or float32 [nnz].

    Returns:
        float32 [M, N], contiguous.

    Raises:
        InputError: An input has the wrong dtype, shape or device.
    """
    place = "sparse_product"
    check(x.dim() == 2, "x.dim()", x.dim(), "is not 2", place, "flatten tokens to [M, K]")
    check_tensor("x", x, tuple(x.shape), OUTPUT_DTYPES, x.device, place)
    count = row_offsets.numel()
    check(count > 0, "row_offsets.numel()", count, "is not N + 1", place, "begin the offsets with 0")
    check_tensor("row_offsets", row_offsets, (count,), (torch.int32,), x.device, place)
    entries = (values.numel(),)
    check_tensor("columns", columns, entries, (torch.int16, torch.int32), x.device, place)
    check_tensor("values", values, entries, OUTPUT_DTYPES, x.device, place)
    if is_plain_call(x):
        return multiply(x, row_offsets, columns, values)
    return torch.ops.quattuor.sparse_product(x, row_offsets, columns, values)
