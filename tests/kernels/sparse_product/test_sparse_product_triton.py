# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of sparse products: interpreted, compiled, and on a CUDA device where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quattuor.kernels import sparse_product

pytest.importorskip("triton")

from ahead_of_time import compile_kernel

from quattuor.kernels.sparse_product import reference, triton_kernel


def test_interpreted_kernel_equals_the_reference():
    program = Path(__file__).with_name("interpreted_sparse_product.py")
    env = os.environ | {"PYTHONPATH": str(Path(sparse_product.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 13


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("num_tokens", [1, 8, 2048])
def test_machine_code_keeps_sums_in_registers(num_tokens, capability):
    entries, tokens = triton_kernel.tile_of(num_tokens)
    pointers = {"x": "*fp16", "row_offsets": "*i32", "columns": "*i16", "values": "*fp16", "out": "*fp32"}
    numbers = dict.fromkeys(("M", "stride_m", "stride_k", "stride_out_m", "stride_out_n"), "i32")
    binary = compile_kernel(
        triton_kernel.sparse_product_kernel,
        pointers | numbers,
        {"ENTRIES": entries, "TOKENS": tokens},
        capability=capability,
        divisible=list(pointers),
        num_warps=1 if tokens <= 32 else 4,
    )
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.count("RED") == binary.count("ATOM") == 0  # sums in a fixed order
    assert binary.count("FFMA") >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 8, 9, 300, 2048])
def test_gpu_kernel_equals_the_reference_in_every_run(num_tokens, dtype):
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    mask = torch.rand(600, 1536, device="cuda", generator=generator) < 0.02
    mask[7], mask[9] = True, False
    columns = mask.nonzero()[:, 1]
    row_offsets = torch.zeros(601, dtype=torch.int32, device="cuda")
    row_offsets[1:] = mask.sum(dim=1).cumsum(0)
    values = torch.randn(columns.numel(), device="cuda", generator=generator).half()
    x = torch.randn(num_tokens, 1536, device="cuda", generator=generator).to(dtype)
    arguments = (x, row_offsets, columns.to(torch.int16), values)
    found = sparse_product.sparse_product(*arguments)
    torch.testing.assert_close(found, reference.multiply(*arguments), rtol=2e-5, atol=2e-4)
    for _ in range(5):
        assert torch.equal(sparse_product.sparse_product(*arguments), found)
        assert torch.equal(reference.multiply(*arguments), reference.multiply(*arguments))
