# SPDX-License-Identifier: Apache-2.0
"""The kernels in the order of lanes: interpreted, their layout, machine code, and a CUDA device where one is."""

import os
import re
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
from quattuor.kernels.lut_linear.lanes.batch_kernel import batch_kernel
from quattuor.kernels.lut_linear.lanes.halves_kernel import halves_kernel
from quattuor.kernels.lut_linear.lanes.implementation import choose_batch_warps, choose_warps, fewest_warps
from quattuor.kernels.lut_linear.lanes.layout import LARGEST_ENTRY, ONE_GROUP, carry, limb_tables, pack_codes
from quattuor.kernels.lut_linear.lanes.limbs_kernel import limbs_kernel
from quattuor.kernels.lut_linear.lanes.token_kernel import ahead_of, token_kernel

CUDA = {"device_type": "cuda", "compute_capability": (9, 0)}


def test_interpreted_kernels_are_close_to_the_reference():
    program = Path(__file__).with_name("interpreted_lanes.py")
    env = os.environ | {"PYTHONPATH": str(Path(lut_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = {word: result.stdout.count(word) for word in ("close", "batch", "not finite", "decoded")}
    assert counts == {"close": 4, "batch": 5, "not finite": 1, "decoded": 4}


def test_halves_of_a_table_add_up_to_every_entry():
    lower, upper = torch.meshgrid(torch.arange(-128, 127), torch.arange(-128, 127), indexing="ij")
    a, b = carry(lower, upper)
    assert torch.stack((a, b)).aminmax() == (-128, 127)
    # a permutation returns the sign of the byte of the other half
    assert torch.equal(a - (b < 0).long(), lower)
    assert torch.equal(b - (a < 0).long(), upper)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_entries_are_integers_within_a_unit_and_a_half(bits):
    table = torch.randn(2, 16, 2**bits, generator=torch.Generator().manual_seed(bits)).half()
    registers, scale = limb_tables(table)
    assert registers.shape == (1, 2, 8, 2, 8)
    # tile, group, g, r, register -> group, row, limb, half, entry
    bytes_of = (registers.long()[..., None] >> torch.arange(0, 32, 8)) & 255
    signed = torch.where(bytes_of >= 128, bytes_of - 256, bytes_of)
    halves = signed[0].permute(0, 2, 1, 3, 4).reshape(2, 16, 2, 2, 8)
    if bits == 4:  # undo the carries
        halves = halves - (halves.flip(3) < 0).long()
    entries = halves.flatten(3)[..., : 2**bits]
    value = (256 * entries[:, :, 0] + entries[:, :, 1]).double() * scale[..., None].double()
    unit = table.double().abs().amax(2, keepdim=True) / LARGEST_ENTRY
    assert ((value - table.double()).abs() <= 1.501 * unit).all()


def test_bits_and_nibbles_by_hand():
    codes = torch.zeros(16, 256, dtype=torch.uint8)
    codes[9, 3 * 32 + 16 + 4 * 2 + 1] = 2  # row 1 + 8, step 3, half 1, lane 4 + 2, place 1; plane 1
    planes = pack_codes(make_layer(16, 256, bits=2, kind="planes").problem, codes)
    assert planes.shape == (1, 1, 2, 32, 4)
    assert planes[0, 0, 1, 4 + 2, 2 + 1] == 1 << (8 + 3)
    nibbles = pack_codes(make_layer(16, 256, bits=4, kind="codebook").problem, codes)
    assert nibbles[0, 0, 1, 4 + 2, 2 + 1] == 2 << (16 + 4)  # word 2 * 3 + 1
    thirds = pack_codes(make_layer(16, 256, bits=3, kind="codebook").problem, codes)
    assert thirds[0, 0, 1, 4 + 2, 0] == 8 << (16 + 4)  # word 3 + 1: the second bit of the fourth step
    for tiles in (planes, nibbles, thirds):
        assert tiles.count_nonzero() == 1


@pytest.mark.parametrize("kind", ["codebook", "planes"])
def test_every_code_is_stored_in_its_bits(kind):
    for bits in range(1, 5 if kind == "codebook" else 9):
        layer = make_layer(70, 2000, bits=bits, kind=kind)
        assert pack_codes(layer.problem, layer.codes).numel() * 32 == 80 * 2048 * bits


def test_one_layout_serves_every_token_count():
    for kind, bits, group_size in (("codebook", 3, None), ("planes", 8, 16), ("planes", 2, 128)):
        problem = LutProblem(
            out_features=64, in_features=256, kind=kind, weight_bits=bits, group_size=group_size, **CUDA
        )
        plan = lut_linear.plan(problem)
        assert plan.schedule.layouts().keys() == {"lanes"}
        reasons = {row.tokens: row.reason for row in plan.explain() if row.is_chosen}
        assert "decodes" in reasons["129+"]
        assert "decodes" not in reasons["2-16"]


def test_refusals_have_reasons():
    fields = {"out_features": 64, "in_features": 256, "weight_bits": 4, "kind": "codebook"} | CUDA
    for change, words in (
        ({"compute_capability": (7, 5)}, "compute capability 8.0"),
        ({"group_size": 24}, "multiple of 16"),
        ({"weight_bits": 5}, "at most 16 entries"),
        ({"table_dtype": torch.float32}, "float16 entries"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            lut_linear.plan(LutProblem(**fields | change), force="lanes")


def test_warps_fill_the_device_and_have_blocks():
    for shape, expected in (((28672, 8192), 2), ((11008, 4096), 4), ((4096, 4096), 8), ((64, 256), 2)):
        problem = LutProblem(out_features=shape[0], in_features=shape[1], kind="planes", weight_bits=2)
        assert choose_warps(problem, 132, 2) == expected
        row_warps, k_warps = choose_batch_warps(problem, 16, 132)
        assert k_warps == expected
        assert row_warps * k_warps == max(4, expected)
        assert choose_batch_warps(problem, 64, 132) == ((4, 2) if expected == 2 else (2, 4))


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "fewest"),
    [
        ("codebook", 4, None, 2),
        ("codebook", 3, None, 4),
        ("planes", 2, None, 4),
        ("planes", 3, None, 2),
        ("planes", 2, 128, 2),
    ],
)
def test_formats_share_blocks_of_large_layers_between_few_warps(kind, bits, group_size, fewest):
    fields = {"out_features": 16, "in_features": 256, "kind": kind, "weight_bits": bits}
    assert fewest_warps(LutProblem(**fields, group_size=group_size)) == fewest


def compiled(kernel, kind, capability, constants, num_warps):
    """Compile a kernel with pointers of the types that the layer of a kind has."""
    pointers = {"x": "fp16", "words": "i32", "unit": "fp32", "sums": "fp32", "packed": "i32", "limb_scale": "fp32"}
    pointers |= {"table": "fp16" if kind == "planes" else "i32", "offset": "fp16", "row_offsets": "i32"}
    pointers |= {"columns": "i16", "values": "fp16", "bias": "fp16", "out": "fp16", "transposed": "i32"}
    sizes = {"N": 16, "stride_xm": 16, "N_PADDED": 16, "K": 16}
    sizes |= dict.fromkeys(("M", "NUM_BLOCKS", "NUM_GROUPS", "ROUNDS", "ALL_TILES"), 1)
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    divisible = [name for name in names if name in pointers or sizes[name] == 16]
    return compile_kernel(
        kernel, signature, constants, capability=capability, divisible=divisible, num_warps=num_warps, num_stages=1
    )


def loop_length(binary, opcode):
    """Return the instructions of the shortest loop that holds an opcode."""
    labels, found, shortest = {}, [], None
    for line in binary.sass.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(found)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction[1])
            jump = re.search(r"BRA\S*\s.*`\((\.L_\S+)\)", found[-1])
            inside = found[labels[jump[1]] :] if jump and jump[1] in labels else []
            if any(opcode in text for text in inside) and (shortest is None or len(inside) < shortest):
                shortest = len(inside)
    return shortest


@pytest.mark.parametrize(
    ("capability", "kind", "bits", "unit", "most"),
    [
        (90, "planes", 2, 0, 1.0),
        (80, "codebook", 4, 0, 2.1),
        (90, "codebook", 3, 128, 2.1),
        pytest.param(90, "planes", 2, 128, 2.1, marks=pytest.mark.slow),
        pytest.param(90, "planes", 6, 32, 12.0, marks=pytest.mark.slow),
    ],
)
def test_machine_code_for_one_token(capability, kind, bits, unit, most):
    is_planes = kind == "planes"
    ahead = ahead_of(make_layer(16, 256, kind=kind, bits=bits, group_size=unit or None).problem)
    constants = {"EARLY": ahead.early, "HOLDS": ahead.holds, "BITS": bits}
    constants |= {"WARPS": 4, "PLANES": is_planes, "UNIT": unit, "GROUP_SIZE": unit or ONE_GROUP}
    constants |= {"HAS_OFFSET": is_planes, "HAS_SPARSE": not is_planes, "HAS_BIAS": True}
    constants |= {"WAITS": capability == 90, "ASM": True}
    binary = compiled(token_kernel, kind, capability, constants, 4)
    assert binary.stack_bytes <= (32 if bits <= 4 else 48)  # the scales of six planes do not all stay in registers
    # per block of 256 elements: eight steps of each plane, or of both bytes of entries and both halves of sixteen
    assert binary.count("IMMA") == 8 * (bits if is_planes else 4 if bits == 4 else 2)
    assert loop_length(binary, "IMMA") <= most * 128
    assert binary.count("PRMT") >= (0 if is_planes else 8 * 8 * (2 if bits == 4 else 1))


@pytest.mark.parametrize(
    ("capability", "kind", "bits", "tiles", "unit", "most"),
    [
        (90, "planes", 2, 2, 0, 3.5),
        (80, "codebook", 4, 1, 0, 4.5),
        pytest.param(90, "codebook", 3, 8, 128, 8.0, marks=pytest.mark.slow),
        pytest.param(90, "planes", 3, 2, 16, 13.0, marks=pytest.mark.slow),
        pytest.param(90, "planes", 8, 8, 0, 15.0, marks=pytest.mark.slow),
    ],
)
def test_machine_code_for_a_batch(capability, kind, bits, tiles, unit, most):
    is_planes = kind == "planes"
    constants = {
        "ROW_WARPS": 4,
        "K_WARPS": 2,
        "TILES": tiles,
        "IN_TURN": kind == "codebook" and bits == 4,
        "BITS": bits,
        "PLANES": is_planes,
    }
    constants |= {"UNIT": unit, "GROUP_SIZE": unit or ONE_GROUP, "HAS_OFFSET": is_planes and unit > 0}
    constants |= {"HAS_SPARSE": not is_planes, "HAS_BIAS": True, "WAITS": capability == 90, "ASM": True}
    binary = compiled(batch_kernel, kind, capability, constants, 8)
    assert binary.stack_bytes <= 16
    assert binary.count("HMMA") == 16 * tiles
    assert loop_length(binary, "HMMA") <= most * 128


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_machine_code_of_the_tokens(dtype):
    pointers = {"x": dtype, "unit": "fp32", "sums": "fp32"}
    fields = {"BITS": 22, "SHIFTED": True, "PARTS": 0, "SEARCH": 8192, "STARTS": True}
    signature = {name: f"*{element}" for name, element in (pointers | {"words": "i32"}).items()} | {"K": "i32"}
    limbs = compile_kernel(limbs_kernel, signature, fields, capability=90, divisible=list(signature), num_warps=8)
    pointers = {"x": dtype, "unit": "fp32", "words": "fp16", "transposed": "fp16"}
    fields = {"BITS": 15, "SCALED": dtype == "bf16", "TRANSPOSED": True, "SEARCH": 8192, "STARTS": True}
    signature = {name: f"*{element}" for name, element in pointers.items()}
    signature |= {"M": "i32", "K": "i32", "stride_xm": "i32"}
    halves = compile_kernel(
        halves_kernel, signature, fields, capability=90, divisible=[*pointers, "K", "stride_xm"], num_warps=8
    )
    assert limbs.stack_bytes == halves.stack_bytes == 0
    assert limbs.count(r"RED\.|ATOM") == halves.count(r"RED\.|ATOM") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "codebook", "bits": 4, "sparse": True},
        {"kind": "codebook", "bits": 3, "group_size": 64, "sparse": True},
        {"kind": "codebook", "bits": 2},
        {"kind": "planes", "bits": 2, "group_size": 128, "offset": True},
        {"kind": "planes", "bits": 3, "group_size": 48, "sparse": True},
        {"kind": "planes", "bits": 4, "sparse": True},
        {"kind": "planes", "bits": 8, "offset": True, "table_dtype": torch.float32},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 16, 40, 130])
def test_gpu_kernel_of_lanes(dtype, options, num_tokens):
    fields = describe_device("cuda")
    layer = make_layer(391, 1300, **options, device=fields.pop("device_type"), **fields)
    x = torch.randn(2 * num_tokens, 1300, device="cuda").to(dtype)[::2]
    exact = x.double() @ layer.weight.T
    plan = lut_linear.plan(layer.problem)
    assert plan.implementation(num_tokens) == "lanes"
    operand = plan.prepare(*layer.tensors)
    result = plan.linear(x, operand, out_dtype=torch.float32)
    assert torch.equal(result, plan.linear(x, operand, out_dtype=torch.float32))
    assert result.shape == (num_tokens, 391)
    error = (result - exact).norm() / exact.norm() if num_tokens else 0.0
    is_rounded = dtype != torch.float32 and num_tokens > (0 if options.get("group_size") == 48 else 1)
    # a batch meets weights in float16, more tokens meet them in their own dtype
    eps = torch.finfo(dtype if num_tokens > 64 else torch.float16).eps
    assert error <= (2 * eps if is_rounded else 1e-4)
