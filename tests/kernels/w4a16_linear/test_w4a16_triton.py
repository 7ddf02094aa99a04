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
from quattuor.kernels.w4a16_linear.decode_kernel import decode_kernel
from quattuor.kernels.w4a16_linear.planes import layout_of
from quattuor.kernels.w4a16_linear.triton import DECODED_FROM, choose_tile
from quattuor.kernels.w4a16_linear.triton_kernel import w4a16_kernel

SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}


def test_interpreted_kernel_is_close_to_the_reference():
    program = Path(__file__).with_name("interpreted_w4a16.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a16_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("close") == 21


@pytest.mark.parametrize(
    ("capability", "dtype", "num_tokens", "bits", "group_size", "zero"),
    [
        (80, "fp16", 1, 4, 128, 1),
        (90, "bf16", 16, 3, 128, 1),
        (90, "fp16", 4096, 2, None, 0),
        pytest.param(80, "bf16", 4096, 3, 32, 1, marks=pytest.mark.slow),
        pytest.param(80, "bf16", 64, 8, 128, 1, marks=pytest.mark.slow),
        pytest.param(80, "fp16", 64, 2, 64, 1, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 1, 2, 128, 1, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 64, 3, 64, 1, marks=pytest.mark.slow),
        pytest.param(90, "bf16", 128, 4, 128, 2, marks=pytest.mark.slow),
        pytest.param(90, "bf16", 4096, 8, 128, 1, marks=pytest.mark.slow),
    ],
)
def test_machine_code(capability, dtype, num_tokens, bits, group_size, zero):
    layout = layout_of(problem(bits, group_size))
    tile = choose_tile(num_tokens, 4096, layout, 16, 132, capability == 90)
    binary = compile_tile(capability, dtype, tile, layout, group_size, zero)
    assert binary.stack_bytes == 0
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.shared_bytes <= SHARED_BYTES[capability]
    # 8 tokens are too few for warpgroups
    assert binary.count("HGMMA" if capability == 90 and tile.tokens > 8 else "HMMA") > 0
    assert binary.count("LDGSTS") > 0  # asynchronous copies: the loop is pipelined
    if zero == 1 and bits < 8:
        # zero points reach the operand in registers: only the epilogue writes to shared memory, not every plane
        assert binary.count("STS.128") < 16


@pytest.mark.parametrize(
    "bits", [4, pytest.param(3, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("capability", [80, 90])
def test_float32_activations_fit_shared_memory(capability, bits):
    layout = layout_of(problem(bits, 128))
    tile = choose_tile(4096, 4096, layout, 16, 132, capability == 90, 4)
    binary = compile_tile(capability, "fp32", tile, layout, 128, 1)
    assert binary.shared_bytes <= SHARED_BYTES[capability]
    assert binary.count("STL") == binary.count("LDL") == 0


@pytest.mark.slow
def test_decoding_is_compiled_for_both_dtypes():
    layout = layout_of(problem(3, 128))
    for dtype in ("fp16", "bf16"):
        signature = {"packed": "*i16", "scale": "*fp16", "zero_point": "*u8", "out": f"*{dtype}"}
        signature |= dict.fromkeys(("N", "K", "N_PADDED", "NUM_BLOCKS"), "i32")
        fields = kernel_constants(layout, 128, 1) | {"ROWS": 64}
        binary = compile_kernel(decode_kernel, signature, fields, capability=90, divisible=signature, num_warps=4)
        assert binary.count("STL") == binary.count("LDL") == 0
        assert binary.count("STG.E.128") > 0


def problem(bits, group_size):
    """Describe a layer whose size does not matter."""
    return LinearProblem(
        out_features=4096, in_features=8192, weight_bits=bits, group_size=group_size, activation_bits=16
    )


def kernel_constants(layout, group_size, zero):
    """What both kernels are compiled for; `zero` is 0 without zero points, 1 for integers, 2 for real ones."""
    return {
        "BITS": layout.bits,
        "PLANES": layout.planes,
        "WORDS": layout.words,
        "PLANE_K": layout.plane_k,
        "PIECES": layout.pieces(group_size),
        "GROUP_SIZE": group_size or 0,
        "ZERO": zero,
        "ASM": True,
    }


def compile_tile(capability, dtype, tile, layout, group_size, zero):
    """Compile the kernel for a tile, with a bias."""
    signature = {
        "x": f"*{dtype}",
        "packed": "*i16",
        "scale": "*fp16",
        "zero_point": ("*fp16", "*u8", "*fp32")[zero],
        "bias": f"*{dtype}",
        "out": f"*{dtype}",
        "partial": "*fp32",
        "arrivals": "*i32",
    } | dict.fromkeys(("M", "N", "K", "stride_xm", "N_PADDED", "NUM_BLOCKS", "SPLIT"), "i32")
    constants = kernel_constants(layout, group_size, zero) | {
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "HAS_BIAS": True,
        "IS_SPLIT": tile.split > 1,
        "EVEN_K": True,
    }
    return compile_kernel(
        w4a16_kernel,
        signature,
        constants,
        capability=capability,
        divisible=[name for name in signature if name not in ("M", "NUM_BLOCKS", "SPLIT")],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


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
@pytest.mark.parametrize("num_tokens", [0, 1, 9, 65])
def test_gpu_kernel(dtype, bits, group_size, unsigned, num_tokens):
    out_features, in_features = 391, 1300
    low = 0 if unsigned else -(2 ** (bits - 1))
    codes = torch.randint(low, low + 2**bits, (out_features, in_features), device="cuda")
    codes = codes.to(torch.uint8 if unsigned else torch.int8)
    groups = 1 if group_size is None else -(-in_features // group_size)
    scale = torch.randn(out_features, groups, device="cuda")
    zero_point = None
    if unsigned:
        zero_point = torch.rand(out_features, groups, device="cuda") * 2**bits
        # odd widths get real zero points, even ones integers: the kernel treats them apart
        zero_point = zero_point if bits % 2 else zero_point.floor()
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gpu_decoded_product(dtype, bits):
    fields = {"out_features": 391, "in_features": 1300, "weight_bits": bits, "group_size": 64}
    layer = LinearProblem(
        **fields, zero_point=True, activation_bits=16, output_dtype=dtype, **describe_device("cuda")
    )
    codes = torch.randint(2**bits, (391, 1300), device="cuda").to(torch.uint8)
    scale = torch.rand(391, 21, device="cuda") + 0.5
    zero_point = torch.randint(2**bits, (391, 21), device="cuda").float()
    x, bias = torch.randn(DECODED_FROM, 1300, device="cuda").to(dtype), torch.randn(391, device="cuda").to(dtype)
    plan = w4a16_linear.plan(layer, force="triton")
    operand = plan.prepare(codes, scale, zero_point)
    weight = scale.double().repeat_interleave(64, 1)[:, :1300]
    weight *= codes.double() - zero_point.double().repeat_interleave(64, 1)[:, :1300]
    exact = x.double() @ weight.T + bias.double()
    error = (plan.linear(x, operand, bias).double() - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(dtype).eps
    # the same tokens one tile at a time do not decode
    fused = plan.linear(x[:100], operand, bias).double()
    assert (fused - exact[:100]).norm() / exact[:100].norm() < torch.finfo(dtype).eps
