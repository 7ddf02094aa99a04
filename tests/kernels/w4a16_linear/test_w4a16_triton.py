# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel: interpreted against the reference, its machine code, and a CUDA device where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_kernel

from quattuor.errors import UnsupportedError
from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.w4a16_linear.triton import choose_tile
from quattuor.kernels.w4a16_linear.triton_kernel import w4a16_kernel

SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}


def test_interpreted_kernel_is_close_to_the_reference():
    program = Path(__file__).with_name("interpreted_w4a16.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a16_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("close") == 7


@pytest.mark.parametrize(
    ("capability", "dtype", "num_tokens", "piece", "nibbles"),
    [
        (80, "fp16", 16, 128, True),
        (90, "bf16", 4096, 128, True),
        pytest.param(80, "bf16", 4096, 128, True, marks=pytest.mark.slow),
        pytest.param(80, "bf16", 4096, 128, False, marks=pytest.mark.slow),
        pytest.param(80, "fp16", 16, 32, True, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 16, 128, True, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 64, 32, True, marks=pytest.mark.slow),
    ],
)
def test_machine_code(capability, dtype, num_tokens, piece, nibbles):
    tile = choose_tile(num_tokens, 4096, 16, 132, capability == 90)
    binary = compile_tile(capability, dtype, tile, piece, nibbles)
    check_machine_code(binary, capability, dtype)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("nibbles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_float32_activations_fit_shared_memory(capability, nibbles):
    tile = choose_tile(4096, 4096, 16, 132, capability == 90, 4)
    binary = compile_tile(capability, "fp32", tile, 128, nibbles)
    assert binary.shared_bytes <= SHARED_BYTES[capability]
    assert binary.count("STL") == binary.count("LDL") == 0


def compile_tile(capability, dtype, tile, piece, nibbles):
    """Compile the kernel for a tile, with zero points and a bias."""
    signature = {
        "x": f"*{dtype}",
        "packed": "*i8",
        "scale": "*fp32",
        "zero_point": "*fp32",
        "bias": f"*{dtype}",
        "out": f"*{dtype}",
        "partial": "*fp32",
        "arrivals": "*i32",
    } | dict.fromkeys(("M", "N", "K", "stride_xm", "N_PADDED", "NUM_BLOCKS"), "i32")
    constants = {
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "PIECE": piece,
        "GROUP_SIZE": piece,
        "NIBBLES": nibbles,
        "HAS_ZERO": True,
        "HAS_BIAS": True,
        "SPLIT": tile.split,
        "ASM": True,
    }
    return compile_kernel(
        w4a16_kernel,
        signature,
        constants,
        capability=capability,
        divisible=[name for name in signature if name not in ("M", "NUM_BLOCKS")],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def check_machine_code(binary, capability, dtype):
    """Assert that nothing spills and that the tensor cores are fed as meant."""
    assert binary.stack_bytes == 0
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.shared_bytes <= SHARED_BYTES[capability]
    assert binary.count("HGMMA" if capability == 90 else "HMMA") > 0
    assert binary.count("LDGSTS") > 0  # asynchronous copies: the loop is pipelined


def test_refusals_have_reasons():
    fields = {"out_features": 64, "in_features": 256, "activation_bits": 16}
    fields |= {"device_type": "cuda", "compute_capability": (8, 0)}
    for change, words in (
        ({"compute_capability": (7, 5)}, "compute capability 8.0"),
        ({"group_size": 8}, "multiple of 16"),
        ({"device_type": "cpu", "compute_capability": None}, "CUDA"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            w4a16_linear.plan(LinearProblem(**fields | change), force="triton")
    assert w4a16_linear.plan(LinearProblem(**fields)).implementation(1) == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(4, None), (4, 128), (4, 32), (3, 64), (2, 128), (8, 128), (6, None)]
)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 65])
def test_gpu_kernel(dtype, bits, group_size, unsigned, num_tokens):
    out_features, in_features = 391, 1300
    low = 0 if unsigned else -(2 ** (bits - 1))
    codes = torch.randint(low, low + 2**bits, (out_features, in_features), device="cuda")
    codes = codes.to(torch.uint8 if unsigned else torch.int8)
    groups = 1 if group_size is None else -(-in_features // group_size)
    scale = torch.randn(out_features, groups, device="cuda")
    zero_point = torch.rand(out_features, groups, device="cuda") * 2**bits if unsigned else None
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        zero_point=unsigned,
        activation_bits=16,
        output_dtype=torch.float32,
        **describe_device("cuda"),
    )
    x = torch.randn(2 * num_tokens, in_features, device="cuda").to(dtype)[::2]
    group_of_k = torch.arange(in_features, device="cuda") // (group_size or in_features)
    offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
    exact = x.double() @ (scale[:, group_of_k].double() * (codes.double() - offset)).T
    results = []
    for name in ("triton", "reference"):
        plan = w4a16_linear.plan(problem, force=name)
        operand = plan.prepare(codes, scale, zero_point)
        results.append(plan.linear(x, operand))
        assert torch.equal(results[-1], plan.linear(x, operand))
    if num_tokens == 0:
        assert results[0].shape == (0, out_features)
        return
    # tensor cores add several products at once with fewer guard bits than a scalar sum
    error, plain_error = ((result - exact).abs().max() for result in results)
    assert error <= 16 * plain_error + 1e-6 * exact.abs().max()
