# SPDX-License-Identifier: Apache-2.0
"""The kernel for one token: interpreted, its machine code, what it refuses, and on a CUDA device."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_kernel

from quattuor.errors import UnsupportedError
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.token_quantize import token_quantize
from quattuor.kernels.w4a8_linear.lane_scales import STEP_BLOCKS, pack_lane_scales
from quattuor.kernels.w4a8_linear.lanes import MAX_TOKENS, choose_lanes_tile, tile_for
from quattuor.kernels.w4a8_linear.lanes_kernel import w4a8_lanes_kernel
from quattuor.kernels.w4a8_linear.lanes_sums import MODES
from quattuor.kernels.w4a8_linear.planes import LanesTile


def test_interpreted_kernel_equals_the_reference():
    program = Path(__file__).with_name("interpreted_w4a8_lanes.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a8_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 16
    assert result.stdout.count("close") == 6


def words_of(num_blocks: int, mode: str) -> int:
    """Return how many words hold the scales of all steps, which come by twos."""
    steps = -(-num_blocks // STEP_BLOCKS)
    return 2 * -(-steps // (4 if mode == "integer" else 2))


def compile_tile(tile: LanesTile, num_blocks: int, capability: int, mode: str = "channel", parts: int = 1):
    """Compile the kernel for a tile."""
    signature = {
        "x": "*i8",
        "x_scale": "*fp32",
        "packed": "*i8",
        "scale": "*fp32",
        "lane_scales": "*i32",
        "bias": "*fp16",
        "out": "*fp16",
    }
    signature |= dict.fromkeys(("N", "stride_xm"), "i32")
    constants = {
        "NUM_BLOCKS": num_blocks,
        "MODE": MODES[mode].value,
        "PARTS": parts,
        "WORDS": words_of(num_blocks, mode),
        "ROWS": tile.rows,
        "WARPS": tile.num_warps,
        "AHEAD": tile.ahead,
        "HAS_BIAS": True,
        "IS_GATED": False,
        "ASM": True,
        "OVERLAP": capability >= 90,
    }
    return compile_kernel(
        w4a8_lanes_kernel,
        signature,
        constants,
        capability=capability,
        divisible=list(signature),
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
        enable_fp_fusion=False,
    )


@pytest.mark.parametrize(
    ("capability", "num_blocks", "mode", "parts"),
    [
        (80, 16, "channel", 1),
        (90, 20, "channel", 1),
        (90, 54, "channel", 1),
        (80, 20, "integer", 4),
        (90, 20, "integer", 1),
        (90, 54, "integer", 1),
        (90, 16, "half", 1),
        (90, 16, "unclamped", 2),
    ],
)
def test_machine_code(capability, num_blocks, mode, parts):
    tile = choose_lanes_tile(5120, num_blocks)
    binary = compile_tile(tile, num_blocks, capability, mode, parts)
    assert binary.stack_bytes == binary.count("STL") == binary.count("LDL") == 0
    steps, own_rows = -(-num_blocks // 4), tile.rows // tile.num_warps
    # weights come 16 bytes at a time, and go to the products without a detour through shared memory
    assert binary.count(r"LDG\.E\.EF\.128") == steps * own_rows
    assert binary.count(r"IDP\.4A") == steps * own_rows * 4 * 2
    assert binary.count("LDS") <= 1
    # scales of several steps come at once, and the first of them before the kernel waits
    words = words_of(num_blocks, mode)
    vectors = 0 if mode == "channel" else words // (4 if words % 4 == 0 else 2)
    found = binary.count(r"LDG\.E\.64$") if words % 4 else binary.count(r"LDG\.E\.128$") - 2 * steps
    assert found == vectors * own_rows
    assert (binary.count("ACQBULK") > 0) is (capability == 90)
    before_wait = binary.sass.split("ACQBULK")[0] if capability == 90 else ""
    assert before_wait.count("LDG.E.EF.128") == (tile.ahead * own_rows if capability == 90 else 0)


def test_integer_groups_cost_few_instructions():
    tile = LanesTile(rows=16, num_warps=4, ahead=4)
    found = {mode: compile_tile(tile, 32, 90, mode) for mode in ("channel", "integer")}
    count = {mode: sum(binary.opcodes().values()) for mode, binary in found.items()}
    # 16 bytes of a row need two multiply-adds, two extractions and half a load more
    assert count["integer"] - count["channel"] <= 7 * 8 * 4
    assert found["integer"].registers <= found["channel"].registers + 16


BASE = LinearProblem(out_features=192, in_features=512, device_type="cuda", compute_capability=(9, 0))


def test_one_token_is_computed_by_lanes():
    plan = w4a8_linear.plan(BASE)
    assert plan.implementation(MAX_TOKENS) == "lanes"
    assert plan.implementation(MAX_TOKENS + 1) != "lanes"
    assert w4a8_linear.plan(BASE, force="lanes").implementation(300) == "lanes"
    for fields in ({"group_size": 128, "integer_group_scale": True}, {"group_size": 32}, {"group_size": 384}):
        grouped = dataclasses.replace(BASE, in_features=768, **fields)
        assert w4a8_linear.plan(grouped).implementation(MAX_TOKENS) == "lanes"
    in_nibbles = dataclasses.replace(BASE, weight_bits=3, group_size=64)
    assert w4a8_linear.plan(in_nibbles).implementation(MAX_TOKENS) == "lanes"


def test_scales_lie_where_lanes_look():
    """Word w of part p of block j of a step: two planes of two steps, or of one step with float16 scales."""
    group_scale = torch.arange(1, 41).repeat(2, 1).half() * torch.tensor([[1], [-1]])
    words = pack_lane_scales(group_scale, 64, 2560, is_integer=True)
    assert words.shape == (2, 8, 2)
    found = words.view(torch.int8).view(2, 4, 2, 4, 2)  # block of a step, part, step, plane
    for block, part, plane in itertools.product(range(10), range(2), range(2)):
        group = 4 * block + 2 * plane + part
        assert found[0, block % 4, part, block // 4, plane] == group + 1
        assert found[1, block % 4, part, block // 4, plane] == -group - 1
    halves = pack_lane_scales(group_scale / 4, 64, 2560, is_integer=False)
    assert halves.shape == (2, 8, 4)
    assert torch.equal(halves.view(torch.float16).view(2, 4, 2, 4, 2) * 4, found.half())


def test_short_groups_take_the_tile_of_planes():
    problem = dataclasses.replace(BASE, out_features=4096, in_features=4096, group_size=128)
    for is_integer in (True, False):
        plane = dataclasses.replace(problem, integer_group_scale=is_integer)
        assert tile_for(dataclasses.replace(plane, group_size=32)) == tile_for(plane)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 48}, "groups of 16"),
        ({"group_size": 8, "integer_group_scale": True}, "groups of 16"),
        ({"group_size": 128, "activation_zero_point": True}, "zero points"),
        ({"weight_bits": 8}, "8 bits"),
        ({"weight_bits": 3}, "3 bits"),
        ({"activation_zero_point": True}, "zero points"),
        ({"in_features": 528}, "multiple of 256"),
        ({"compute_capability": (7, 5)}, "capability 8.0"),
        ({"device_type": "cpu", "compute_capability": None}, "CUDA"),
    ],
)
def test_refusals_have_reasons(change, words):
    with pytest.raises(UnsupportedError, match=words):
        w4a8_linear.plan(dataclasses.replace(BASE, **change), force="lanes")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 256), (300, 1280), (5120, 5120), (5120, 13824)])
def test_gpu_kernel_equals_the_reference(out_features, in_features, out_dtype, layer, inputs):
    made = layer(out_features, in_features, device="cuda")
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    x_codes, x_scale = inputs(6, in_features, device="cuda")
    exact = w4a8_linear.plan(problem, force="reference")
    plan = w4a8_linear.plan(problem, force="lanes")
    for bias in (None, torch.randn(out_features, device="cuda", dtype=torch.float16)):
        expected = exact.linear(x_codes, x_scale, exact.prepare(made.codes, made.scale), bias, out_dtype)
        operand = plan.prepare(made.codes, made.scale)
        for rows in (slice(0, 6), slice(0, 6, 2), slice(1, 2)):
            found = plan.linear(x_codes[rows], x_scale[rows].contiguous(), operand, bias, out_dtype)
            assert torch.equal(found, expected[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("out_features", "in_features", "out_dtype", "fields"),
    [
        (5120, 5376, torch.float16, {"group_size": 128, "integer": True}),
        (1, 8192, torch.bfloat16, {"group_size": 128, "integer": True}),
        (300, 1536, torch.bfloat16, {"group_size": 64, "integer": True}),
        (301, 2560, torch.float16, {"group_size": 32, "integer": True}),
        (300, 1536, torch.float32, {"group_size": 384, "integer": True}),
        (5120, 1536, torch.float16, {"group_size": 128}),
        (300, 1280, torch.bfloat16, {"group_size": 16}),
        (304, 2304, torch.float16, {"group_size": 32, "clamps": False}),
    ],
)
def test_gpu_kernel_scales_groups_as_the_reference(out_features, in_features, out_dtype, fields, layer, inputs):
    made = layer(out_features, in_features, device="cuda", **fields)
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    exact = w4a8_linear.plan(problem, force="reference")
    plan = w4a8_linear.plan(problem, force="lanes")
    bias = torch.randn(out_features, device="cuda", dtype=torch.float16)
    x_codes, x_scale = inputs(3, in_features, device="cuda")
    extreme = torch.full_like(made.codes, -8), made.scale * 1e-3, torch.full_like(made.group_scale, 16)
    for weight in ((made.codes, made.scale, made.group_scale), extreme):
        slow, operand = exact.prepare(*weight), plan.prepare(*weight)
        for codes in (x_codes, torch.full_like(x_codes, -128)):
            expected = exact.linear(codes, x_scale, slow, bias, out_dtype)
            for rows in (slice(0, 3), slice(1, 2)):
                found = plan.linear(codes[rows], x_scale[rows].contiguous(), operand, bias, out_dtype)
                assert torch.equal(found, expected[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fields", [{}, {"group_size": 128, "integer": True}, {"group_size": 32}], ids=str)
def test_a_chain_in_a_graph_sees_every_new_token(fields, layer, inputs):
    made = layer(2048, 2048, device="cuda", **fields)
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    plan, exact = w4a8_linear.plan(problem, force="lanes"), w4a8_linear.plan(problem, force="reference")
    # scaled codes are larger, and float16 has to hold what four products make of them
    weight = made.codes, made.scale * (0.05 if fields else 1.0), made.group_scale
    operand, slow = plan.prepare(*weight), exact.prepare(*weight)
    x_codes, x_scale = inputs(1, 2048, device="cuda")

    def chain(plan, operand):
        """Four products, each of the codes of the one before: they start while that one drains."""
        codes, scale = x_codes, x_scale
        for _ in range(4):
            y = plan.linear(codes, scale, operand, None, torch.float16)
            codes, scale = token_quantize(y)
        return y

    for _ in range(2):
        chain(plan, operand)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(plan, operand)
    for seed in range(20):
        x_codes.copy_(inputs(1, 2048, seed=seed)[0])
        graph.replay()
        assert out.isfinite().all()
        assert torch.equal(out, chain(exact, slow))
