# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of token quantization: interpreted, and on a CUDA device where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quattuor.kernels import token_quantize

pytest.importorskip("triton")


def test_interpreted_kernel_equals_the_reference():
    program = Path(__file__).with_name("interpreted_token_quantize.py")
    env = os.environ | {"PYTHONPATH": str(Path(token_quantize.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 127), (17, 4096), (5, 28672), (300, 11008)])
def test_gpu_kernel_equals_the_reference(dtype, shape):
    from quattuor.kernels.token_quantize import reference

    x = torch.randn(shape, device="cuda").to(dtype)
    if shape[0] > 4:
        x[1] = 0
        x[2, -1] = torch.nan
        x[3, 0] = torch.inf
        x[4] = 2.0**-149
    for fast, exact in zip(token_quantize.token_quantize(x), reference.quantize_tokens(x), strict=True):
        assert torch.equal(fast.nan_to_num(-1.0), exact.nan_to_num(-1.0))
