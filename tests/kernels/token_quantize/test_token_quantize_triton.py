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

from ahead_of_time import compile_kernel

from quattuor.kernels.token_quantize import reference, triton_kernel


def test_interpreted_kernel_equals_the_reference():
    program = Path(__file__).with_name("interpreted_token_quantize.py")
    env = os.environ | {"PYTHONPATH": str(Path(token_quantize.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 6


KERNELS = {
    "token_quantize_kernel": {"x": "*fp16", "codes": "*i8", "scale": "*fp32", "K": "i32", "stride_x": "i32"},
    "rms_norm_quantize_kernel": {
        "x": "*fp16",
        "residual": "*fp16",
        "weight": "*fp16",
        "hidden": "*fp16",
        "codes": "*i8",
        "scale": "*fp32",
        "K": "i32",
        "stride_x": "i32",
        "stride_residual": "i32",
        "eps": "fp32",
    },
    "silu_mul_quantize_kernel": {
        "gate": "*fp16",
        "up": "*fp16",
        "codes": "*i8",
        "scale": "*fp32",
        "K": "i32",
        "stride_gate": "i32",
        "stride_up": "i32",
    },
}


@pytest.mark.parametrize("name", list(KERNELS))
@pytest.mark.parametrize(
    ("capability", "in_features", "is_few"), [(80, 4096, False), (90, 8192, False), (90, 28672, True)]
)
def test_machine_code(name, capability, in_features, is_few):
    kernel, signature = getattr(triton_kernel, name), KERNELS[name]
    threads, step, steps = triton_kernel.steps_of(in_features, is_few)
    constants = {
        "STEP": step,
        "STEPS": steps,
        "IS_WHOLE": in_features <= triton_kernel.MAX_HELD,
        "OVERLAP": capability >= 90,
        "DEVICE": True,
    } | ({"HAS_RESIDUAL": True} if "residual" in signature else {})
    binary = compile_kernel(
        kernel,
        signature,
        constants,
        capability=capability,
        divisible=[argument for argument in signature if argument != "eps"],
        num_warps=threads // 32,
    )
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.count(r"LDG\.E" if is_few else r"LDG\.E\.64") > 0  # two or four elements of 16 bits at a time
    assert (binary.count("ACQBULK") > 0) is (capability >= 90)  # waits for the kernel before it


@pytest.mark.parametrize("is_few", [False, True])
@pytest.mark.parametrize("in_features", [1, 100, 576, 2048, 4096, 13824, 28672, 32768, 40000])
def test_a_token_is_covered_once(in_features, is_few):
    threads, step, steps = triton_kernel.steps_of(in_features, is_few)
    held = min(in_features, triton_kernel.MAX_HELD)
    assert step * (steps - 1) < held <= step * steps
    assert threads in (32, 64, 128, 256, 512, 1024)
    assert step * steps <= triton_kernel.MAX_HELD


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 127), (17, 4096), (5, 28672), (5, 40000), (300, 11008)])
def test_gpu_kernel_equals_the_reference(dtype, shape):
    x = torch.randn(shape, device="cuda").to(dtype)
    if shape[0] > 4:
        x[1] = 0
        x[2, -1] = torch.nan
        x[3, 0] = torch.inf
        x[4] = 2.0**-149
    for fast, exact in zip(token_quantize.token_quantize(x), reference.quantize_tokens(x), strict=True):
        assert torch.equal(fast.nan_to_num(-1.0), exact.nan_to_num(-1.0))


def test_a_norm_adds_in_the_same_order_in_every_batch():
    few, many = (torch.zeros(num_tokens, 16384) for num_tokens in (1, triton_kernel.FEW_TOKENS + 1))
    ordered = [triton_kernel.launch_options(x, is_sum_ordered=True) for x in (few, many)]
    assert ordered[0] == ordered[1]
    assert triton_kernel.launch_options(few)["num_warps"] > triton_kernel.launch_options(many)["num_warps"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("exponent", [-140, -70, -58, -14, 0, 15, 60, 120])
def test_multiply_adds_divide_as_a_division_does(exponent):
    generator = torch.Generator("cuda").manual_seed(exponent + 200)
    absmax = torch.rand(200, 1, device="cuda", generator=generator) + 1
    step = absmax / torch.full_like(absmax, 127.0)
    halves = (torch.arange(8190, device="cuda") % 254 - 127 + 0.5) * step
    x = torch.cat(
        [absmax, halves, torch.nextafter(halves, 2 * halves), torch.nextafter(halves, 0 * halves)], dim=1
    )
    x = (x.double() * 2.0**exponent).float()
    for fast, exact in zip(token_quantize.token_quantize(x), reference.quantize_tokens(x), strict=True):
        assert torch.equal(fast, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_gate_gives_the_bits_of_separate_modules(dtype):
    gates = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype).view(64, 1024)
    for up in (torch.ones_like(gates), torch.randn(64, 1024, device="cuda").to(dtype)):
        found = token_quantize.silu_mul_quantize(gates, up)
        expected = reference.quantize_tokens(torch.nn.functional.silu(gates) * up)
        for fast, exact in zip(found, expected, strict=True):
            assert torch.equal(fast.nan_to_num(-1.0), exact.nan_to_num(-1.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 127), (17, 4096), (5, 28672), (5, 40000)])
def test_fused_gpu_kernels_are_close_to_the_reference(dtype, shape):
    x, other = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], device="cuda")
    pairs = [
        (token_quantize.silu_mul_quantize(x, other), reference.silu_mul_quantize_tokens(x, other)),
        (
            token_quantize.rms_norm_quantize(x, weight, 1e-6, other),
            reference.rms_norm_quantize_tokens(x, weight, 1e-6, other),
        ),
    ]
    for found, expected in pairs:
        assert ((found[1] - expected[1]).abs() <= 2 * torch.finfo(dtype).eps * expected[1].abs()).all()
        difference = (found[0].int() - expected[0].int()).abs()
        assert difference.numel() == 0 or difference.max() <= 1
        assert (difference > 0).float().sum() <= 0.01 * difference.numel()
    assert torch.equal(pairs[1][0][2], pairs[1][1][2])
