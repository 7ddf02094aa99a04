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
from lut_layers import make_layer

from quattuor.errors import UnsupportedError
from quattuor.kernels import lut_linear
from quattuor.kernels.dispatch import describe_device
from quattuor.kernels.lut_linear import LutProblem
from quattuor.kernels.lut_linear.triton import choose_tile, pack_fields, prepare_tensors, widths_of
from quattuor.kernels.lut_linear.triton_kernel import lut_kernel


def test_interpreted_kernel_is_close_to_the_reference():
    program = Path(__file__).with_name("interpreted_lut.py")
    env = os.environ | {"PYTHONPATH": str(Path(lut_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("close") == 11


@pytest.mark.parametrize(
    ("capability", "dtype", "num_tokens", "kind", "bits"),
    [
        (80, "fp16", 16, "codebook", 4),
        (90, "bf16", 4096, "planes", 3),
        pytest.param(90, "bf16", 16, "codebook", 3, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 4096, "codebook", 4, marks=pytest.mark.slow),
        pytest.param(80, "fp16", 16, "planes", 2, marks=pytest.mark.slow),
    ],
)
def test_machine_code(capability, dtype, num_tokens, kind, bits):
    tile = choose_tile(num_tokens, 4096, 32, 132, capability == 90)
    signature = {
        "x": f"*{dtype}",
        "words": "*i32",
        "table": "*fp16",
        "offset": "*fp16",
        "row_offsets": "*i32",
        "columns": "*i16",
        "values": "*fp16",
        "bias": f"*{dtype}",
        "out": f"*{dtype}",
        "partial": "*fp32",
        "arrivals": "*i32",
    } | dict.fromkeys(("M", "N", "K", "stride_xm", "N_PADDED", "K_PADDED", "NUM_GROUPS"), "i32")
    constants = {
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "PIECE": 128,
        "GROUP_SIZE": 128,
        "BITS": bits,
        "PLANES": kind == "planes",
        "HAS_OFFSET": kind == "planes",
        "HAS_SPARSE": kind == "codebook",
        "HAS_BIAS": True,
        "SPLIT": tile.split,
    }
    binary = compile_kernel(
        lut_kernel,
        signature,
        constants,
        capability=capability,
        divisible=[name for name in signature if name not in ("M", "NUM_GROUPS")],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    assert binary.stack_bytes == 0
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.shared_bytes <= {80: 99, 90: 227}[capability] * 1024
    assert binary.count("HGMMA" if capability == 90 else "HMMA") > 0


def test_every_code_is_stored_in_its_bits():
    for bits in range(1, 9):
        layer = make_layer(70, 200, bits=bits, kind="codebook")
        assert sum(widths_of(layer.problem)) == bits
        words = prepare_tensors(layer.problem, *layer.tensors[:3], None, None, None)["words"]
        assert words.numel() * 32 == 128 * 256 * bits
    codes = torch.arange(32, dtype=torch.uint8)[None] % 4
    expected = sum((place % 4) << (2 * place) for place in range(16))
    assert pack_fields(codes, 2).tolist() == [[expected - 2**32, expected - 2**32]]


def test_refusals_have_reasons():
    fields = {"out_features": 64, "in_features": 256, "weight_bits": 4, "kind": "codebook"}
    fields |= {"device_type": "cuda", "compute_capability": (8, 0)}
    for change, words in (
        ({"compute_capability": (7, 5)}, "compute capability 8.0"),
        ({"group_size": 16}, "multiple of 32"),
        ({"table_dtype": torch.float32}, "float16 entries"),
        ({"device_type": "cpu", "compute_capability": None}, "CUDA"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            lut_linear.plan(LutProblem(**fields | change), force="triton")
    assert lut_linear.plan(LutProblem(**fields), force="triton").implementation(1) == "triton"
    rows = lut_linear.plan(LutProblem(**fields)).explain()
    assert all("not run on a GPU" in row.reason for row in rows if row.implementation == "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "codebook", "bits": 4, "sparse": True},
        {"kind": "codebook", "bits": 3, "group_size": 64, "sparse": True},
        {"kind": "codebook", "bits": 5},
        {"kind": "planes", "bits": 2, "group_size": 128, "offset": True},
        {"kind": "planes", "bits": 3, "group_size": 32},
        {"kind": "planes", "bits": 8, "offset": True, "table_dtype": torch.float32},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 65, 200])
def test_gpu_kernel(dtype, options, num_tokens):
    layer = make_layer(391, 1300, **options, **describe_cuda())
    x = torch.randn(2 * num_tokens, 1300, device="cuda").to(dtype)[::2]
    exact = x.double() @ layer.weight.T
    results = []
    for name in ("triton", "reference"):
        plan = lut_linear.plan(layer.problem, force=name)
        operand = plan.prepare(*layer.tensors)
        results.append(plan.linear(x, operand, out_dtype=torch.float32))
        assert torch.equal(results[-1], plan.linear(x, operand, out_dtype=torch.float32)) or name == "reference"
    if num_tokens == 0:
        assert results[0].shape == (0, 391)
        return
    # tensor cores add several products at once with fewer guard bits than a scalar sum
    error, plain_error = ((result - exact).abs().max() for result in results)
    assert error <= 16 * plain_error + 1e-6 * exact.abs().max()


def describe_cuda():
    fields = describe_device("cuda")
    return {"device": fields.pop("device_type")} | fields
