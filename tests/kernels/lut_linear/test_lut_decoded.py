# SPDX-License-Identifier: Apache-2.0
"""Rows decoded from a byte for each code: what takes this path, machine code, and a CUDA device where one is."""

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_kernel
from lut_layers import make_layer

from quattuor.errors import UnsupportedError
from quattuor.kernels import lut_linear
from quattuor.kernels.dispatch import describe_device
from quattuor.kernels.lut_linear import LutProblem
from quattuor.kernels.lut_linear.decode_kernel import decode_kernel

CUDA = {"device_type": "cuda", "compute_capability": (9, 0)}


@pytest.mark.parametrize(("kind", "bits"), [("codebook", 6), ("planes", 2)])
def test_machine_code_of_the_decoder(kind, bits):
    signature = {"codes": "*u8", "table": "*fp16", "offset": "*fp16", "out": "*fp16"}
    signature |= dict.fromkeys(("first_row", "K", "NUM_GROUPS", "GROUP_SIZE"), "i32")
    constants = {"BITS": bits, "PLANES": kind == "planes", "HAS_OFFSET": kind == "planes", "BLOCK": 1024}
    divisible = [name for name in signature if name not in ("first_row", "NUM_GROUPS")]
    binary = compile_kernel(decode_kernel, signature, constants, capability=90, divisible=divisible, num_warps=4)
    assert binary.stack_bytes == 0
    assert binary.count(r"STG\.E\.128") == binary.count("STG")


def test_what_lanes_refuse_is_decoded_from_bytes():
    fields = {"out_features": 64, "in_features": 256, "weight_bits": 4, "kind": "codebook"} | CUDA
    for change in (
        {"weight_bits": 5},
        {"group_size": 24},
        {"table_dtype": torch.float32},
        {"kind": "planes", "group_size": 8},
    ):
        plan = lut_linear.plan(LutProblem(**fields | change))
        assert {plan.implementation(count) for count in (1, 16, 4096)} == {"decoded"}
        assert any("8 bits" in row.reason for row in plan.explain() if row.is_chosen)


def test_refusals_have_reasons():
    fields = {"out_features": 64, "in_features": 256, "weight_bits": 5, "kind": "codebook"}
    for change, words in (
        ({"device_type": "cuda", "compute_capability": (7, 5)}, "compute capability 8.0"),
        ({}, "runs on CUDA devices, not on cpu"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            lut_linear.plan(LutProblem(**fields | change), force="decoded")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "codebook", "bits": 5, "sparse": True},
        {"kind": "codebook", "bits": 4, "group_size": 24, "table_dtype": torch.float32},
        {"kind": "planes", "bits": 3, "group_size": 8, "offset": True, "sparse": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [0, 1, 65])
def test_gpu_kernel_of_decoded_rows(dtype, options, num_tokens):
    fields = describe_device("cuda")
    layer = make_layer(391, 1300, **options, device=fields.pop("device_type"), **fields)
    x = torch.randn(2 * num_tokens, 1300, device="cuda").to(dtype)[::2]
    exact = x.double() @ layer.weight.T
    plan = lut_linear.plan(layer.problem)
    assert plan.implementation(num_tokens) == "decoded"
    operand = plan.prepare(*layer.tensors)
    result = plan.linear(x, operand, out_dtype=torch.float32)
    assert torch.equal(result, plan.linear(x, operand, out_dtype=torch.float32))
    assert result.shape == (num_tokens, 391)
    if num_tokens:
        bound = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert (result - exact).norm() <= bound * exact.norm()
