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
from quattuor.kernels.lut_linear.decode_kernel import decode_kernel
from quattuor.kernels.lut_linear.layout import ONE_GROUP, block_k, exchange_nibbles, num_tiles, pack_tiles
from quattuor.kernels.lut_linear.side_kernel import side_kernel
from quattuor.kernels.lut_linear.triton import MANY_TOKENS, choose_tile, takes_bits
from quattuor.kernels.lut_linear.triton_kernel import lut_kernel


def test_interpreted_kernels_are_close_to_the_reference():
    program = Path(__file__).with_name("interpreted_lut.py")
    env = os.environ | {"PYTHONPATH": str(Path(lut_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("close") == 7
    assert result.stdout.count("decoded") == 4


TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize(
    ("capability", "dtype", "num_tokens", "kind", "bits", "is_grouped"),
    [
        (80, "fp16", 1, "codebook", 4, False),
        (90, "fp16", 1, "planes", 2, False),
        (90, "fp16", 16, "codebook", 4, False),
        pytest.param(90, "bf16", 16, "codebook", 3, False, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 1, "codebook", 3, True, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 1, "planes", 2, True, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 1, "planes", 8, False, marks=pytest.mark.slow),
        pytest.param(80, "bf16", 16, "planes", 3, False, marks=pytest.mark.slow),
    ],
)
def test_machine_code(capability, dtype, num_tokens, kind, bits, is_grouped):
    problem = make_layer(4096, 8192, kind=kind, bits=bits, group_size=128 if is_grouped else None).problem
    tile = choose_tile(problem, num_tokens, 132)
    is_planes = kind == "planes"
    pointers = {"x": dtype, "packed": "i16", "table": "fp16" if is_planes else "i32", "offset": "fp16"}
    pointers |= {"sums": "fp32", "side": "fp32", "bias": dtype, "out": dtype, "partial": "fp32", "arrivals": "i32"}
    signature = {name: f"*{element}" for name, element in pointers.items()}
    signature |= dict.fromkeys(
        ("M", "N", "K", "stride_xm", "N_PADDED", "NUM_BLOCKS", "NUM_GROUPS", "SPLIT"), "i32"
    )
    constants = {
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "BLOCK_K": block_k(problem),
        "TILES": num_tiles(problem),
        "PIECE": 64,
        "UNIT": 128 if is_grouped else 0,
        "GROUP_SIZE": 128 if is_grouped else ONE_GROUP,
        "HAS_GROUPS": is_grouped,
        "BITS": bits,
        "PLANES": is_planes,
        "MASKED": takes_bits(problem, TORCH_TYPES[dtype]),
        "HAS_OFFSET": is_planes,
        "HAS_SIDE": not is_grouped,
        "HAS_BIAS": True,
        "IS_SPLIT": True,
        "EVEN_K": True,
        "WAITS": capability == 90 and not is_grouped,
        "ASM": True,
    }
    binary = compile_kernel(
        lut_kernel,
        signature,
        constants,
        capability=capability,
        divisible=[name for name in signature if name not in ("M", "NUM_BLOCKS", "NUM_GROUPS", "SPLIT")],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.shared_bytes <= {80: 99, 90: 227}[capability] * 1024
    assert binary.count("HMMA") > 0
    assert (binary.count("PRMT") > 0) or is_planes


@pytest.mark.parametrize(("kind", "bits"), [("codebook", 4), ("codebook", 6), ("planes", 2)])
def test_machine_code_of_the_decoder(kind, bits):
    problem = make_layer(128, 1024, kind=kind, bits=bits).problem
    is_look_up = kind == "codebook" and bits <= 4
    signature = {"packed": "*i16", "table": "*i32" if is_look_up else "*fp16", "offset": "*fp16", "out": "*fp16"}
    signature |= dict.fromkeys(("first_row", "N", "K", "N_PADDED", "NUM_BLOCKS", "NUM_GROUPS"), "i32")
    constants = {
        "ROWS": 32,
        "BLOCK_K": block_k(problem),
        "TILES": num_tiles(problem),
        "PIECE": 64,
        "GROUP_SIZE": ONE_GROUP,
        "BITS": bits,
        "PLANES": kind == "planes",
        "HAS_OFFSET": False,
        "ASM": True,
    }
    binary = compile_kernel(
        decode_kernel,
        signature,
        constants,
        capability=90,
        divisible=[name for name in signature if name not in ("first_row", "NUM_BLOCKS", "NUM_GROUPS")],
        num_warps=4,
    )
    assert binary.stack_bytes == 0
    assert binary.count(r"STG\.E\.128") == binary.count("STG")


def test_machine_code_beside_the_products():
    pointers = {"x": "fp16", "table": "fp16", "offset": "fp16", "row_offsets": "i32", "columns": "i16"}
    pointers |= {"values": "fp16", "side": "fp32"}
    signature = {name: f"*{element}" for name, element in pointers.items()}
    signature |= dict.fromkeys(("N", "K", "stride_xm", "N_PADDED"), "i32")
    constants = {"ROWS": 32, "CHUNK": 32, "BITS": 2, "HAS_SUM": True, "HAS_OFFSET": True, "MASKED": True}
    constants |= {"HAS_SPARSE": True, "STARTS": True}
    binary = compile_kernel(
        side_kernel, signature, constants, capability=90, divisible=list(signature), num_warps=4
    )
    assert binary.stack_bytes == 0
    assert binary.count(r"RED\.|ATOM") == 0  # nothing is added in an order of its own


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


def test_few_tokens_meet_the_packed_weight_and_many_a_decoded_one():
    fields = {"out_features": 64, "in_features": 256, "device_type": "cuda", "compute_capability": (9, 0)}
    for kind, bits in (("codebook", 3), ("codebook", 4), ("planes", 2), ("planes", 8)):
        plan = lut_linear.plan(LutProblem(**fields, kind=kind, weight_bits=bits))
        assert plan.implementation(1) == plan.implementation(16) == "triton"
        assert plan.implementation(4096) == "decoded"
        reasons = {(row.tokens, row.implementation): row.reason for row in plan.explain()}
        assert "decoding it once costs less" in reasons["129+", "triton"]
    wide = lut_linear.plan(LutProblem(**fields, kind="codebook", weight_bits=5))
    assert wide.implementation(1) == "decoded"


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
    few = "decoded" if options["kind"] == "codebook" and options["bits"] > 4 else "triton"
    chosen = few if num_tokens < MANY_TOKENS else "decoded"
    for name in (chosen, "reference"):
        plan = lut_linear.plan(layer.problem, force=name)
        operand = plan.prepare(*layer.tensors)
        results.append(plan.linear(x, operand, out_dtype=torch.float32))
        assert torch.equal(results[-1], plan.linear(x, operand, out_dtype=torch.float32)) or name == "reference"
    if num_tokens == 0:
        assert results[0].shape == (0, 391)
        return
    if chosen == "decoded" and dtype != torch.float32:  # a weight rounded to the dtype of the tokens
        assert (results[0] - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
        return
    # tensor cores add several products at once with fewer guard bits than a scalar sum
    error, plain_error = ((result - exact).abs().max() for result in results)
    assert error <= 16 * plain_error + 1e-6 * exact.abs().max()


def describe_cuda():
    fields = describe_device("cuda")
    return {"device": fields.pop("device_type")} | fields
