# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the Triton kernel in the interpreter against the reference, one line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch

from quattuor.kernels.sparse_product import reference, triton_kernel


def main() -> None:
    """Print a line for each case; fail at the first that differs."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 300, generator=generator) < 0.2
    mask[2] = False
    mask[4] = True
    rows, columns = mask.nonzero(as_tuple=True)
    row_offsets = torch.zeros(8, dtype=torch.int32)
    row_offsets[1:] = torch.bincount(rows, minlength=7).cumsum(0)
    values = torch.randn(columns.numel(), generator=generator)
    values[0], values[1] = 65504.0, -65504.0
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for num_tokens in (1, 3, triton_kernel.FEW_TOKENS + 1, 130):
            x = torch.randn(300, num_tokens, generator=generator).to(dtype).T
            arguments = (x, row_offsets, columns.to(torch.int16), values.half())
            found, expected = triton_kernel.multiply(*arguments), reference.multiply(*arguments)
            assert found.is_contiguous()
            assert found.shape == expected.shape == (num_tokens, 7)
            assert not found[:, 2].any()
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-3)
            print("equal", dtype, num_tokens)
    arguments = (row_offsets, columns.to(torch.int32), values)
    assert triton_kernel.multiply(torch.zeros(0, 300), *arguments).shape == (0, 7)
    none = torch.zeros(8, dtype=torch.int32), columns[:0].to(torch.int32), values[:0]
    assert not triton_kernel.multiply(torch.ones(3, 300), *none).any()
    print("equal without tokens or entries")


main()
