# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel: interpreted against the reference, its machine code, and a CUDA device where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lut_layers import make_layer

from quattuor.errors import UnsupportedError
from quattuor.kernels import lut_linear
from quattuor.kernels.dispatch import describe_device
from quattuor.kernels.lut_linear import LutProblem
from quattuor.kernels.lut_linear.layout import exchange_nibbles, pack_tiles


def test_interpreted_kernels_are_close_to_the_reference():
    program = Path(__file__).with_name("interpreted_lut.py")
    env = os.environ | {"PYTHONPATH": str(Path(lut_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("close") == 14
    assert result.stdout.count("decoded") == 11


@pytest.mark.parametrize("kind", ["codebook", "planes"])
def test_every_code_is_stored_in_its_bits(kind):
    for bits in range(1, 9):
        layer = make_layer(70, 2000, bits=bits, kind=kind)
        packed = pack_tiles(layer.problem, layer.codes)
        stored = 8 if kind == "codebook" and bits > 4 else bits
        assert packed.numel() * 16 == 128 * 2048 * stored


def test_bits_of_a_plane_by_hand():
    codes = torch.zeros(1, 1024, dtype=torch.uint8)
    codes[0, 5] = 1  # bit 0 of word 5 of plane 0
    codes[0, 3 * 64 + 7] = 2  # bit 3 of word 7 of plane 1
    problem = make_layer(1, 1024, bits=2, kind="planes").problem
    tiles = pack_tiles(problem, codes)
    assert tiles.shape == (1, 2, 128, 64)
    assert tiles[0, 0, 0, 5] == 1
    assert tiles[0, 1, 0, 7] == 8
    assert tiles.count_nonzero() == 2


def test_nibbles_of_neighbours_share_a_half():
    words = torch.tensor([0x4321, 0x8765], dtype=torch.int32)
    assert [hex(word) for word in exchange_nibbles(words).tolist()] == ["0x6251", "0x8473"]


def test_refusals_have_reasons():
    fields = {"out_features": 64, "in_features": 256, "weight_bits": 4, "kind": "codebook"}
    fields |= {"device_type": "cuda", "compute_capability": (8, 0)}
    for change, words in (
        ({"compute_capability": (7, 5)}, "compute capability 8.0"),
        ({"group_size": 8}, "multiple of 16"),
        ({"table_dtype": torch.float32}, "float16 entries"),
        ({"weight_bits": 5}, "at most 16 entries"),
        ({"device_type": "cpu", "compute_capability": None}, "CUDA"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            lut_linear.plan(LutProblem(**fields | change), force="triton")


def test_few_tokens_are_unpacked_and_many_decoded_on_a_device():
    fields = {"out_features": 64, "in_features": 256, "device_type": "cuda", "compute_capability": (9, 0)}
    for kind, bits in (("codebook", 3), ("codebook", 4), ("planes", 2), ("planes", 8)):
        plan = lut_linear.plan(LutProblem(**fields, kind=kind, weight_bits=bits))
        assert (plan.implementation(1), plan.implementation(4096)) == ("triton", "decoded")
        reasons = {(row.tokens, row.implementation): row.reason for row in plan.explain()}
        assert "decoding it once costs less" in reasons["129+", "triton"]
    wide = lut_linear.plan(LutProblem(**fields, kind="codebook", weight_bits=6))
    assert wide.implementation(1) == "decoded"
    short = lut_linear.plan(LutProblem(**fields, kind="codebook", weight_bits=4, group_size=8))
    assert short.implementation(1) == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "codebook", "bits": 4, "sparse": True},
        {"kind": "codebook", "bits": 3, "group_size": 64, "sparse": True},
        {"kind": "codebook", "bits": 5, "sparse": True},
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
    for name in (None, "reference"):
        plan = lut_linear.plan(layer.problem, force=name)
        operand = plan.prepare(*layer.tensors)
        results.append(plan.linear(x, operand, out_dtype=torch.float32))
        assert torch.equal(results[-1], plan.linear(x, operand, out_dtype=torch.float32)) or name == "reference"
    if num_tokens == 0:
        assert results[0].shape == (0, 391)
        return
    if num_tokens > 16 and dtype != torch.float32:  # decoded to the dtype of the tokens
        assert (results[0] - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
        return
    # tensor cores add several products at once with fewer guard bits than a scalar sum
    error, plain_error = ((result - exact).abs().max() for result in results)
    assert error <= 16 * plain_error + 1e-6 * exact.abs().max()


def describe_cuda():
    fields = describe_device("cuda")
    return {"device": fields.pop("device_type")} | fields
