# SPDX-License-Identifier: Apache-2.0
"""The kernel for one token: interpreted, its machine code, what it refuses, and on a CUDA device."""

import dataclasses
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
from quattuor.kernels.w4a8_linear.lanes import MAX_TOKENS, choose_lanes_tile
from quattuor.kernels.w4a8_linear.lanes_kernel import w4a8_lanes_kernel
from quattuor.kernels.w4a8_linear.planes import LanesTile


def test_interpreted_kernel_equals_the_reference():
    program = Path(__file__).with_name("interpreted_w4a8_lanes.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a8_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 4
    assert result.stdout.count("close") == 2


def compile_tile(tile: LanesTile, num_blocks: int, capability: int, *, has_bias: bool = True):
    """Compile the kernel for a tile."""
    signature = {
        "x": "*i8",
        "x_scale": "*fp32",
        "packed": "*i8",
        "scale": "*fp32",
        "bias": "*fp16",
        "out": "*fp16",
    }
    signature |= dict.fromkeys(("N", "stride_xm"), "i32")
    constants = {
        "NUM_BLOCKS": num_blocks,
        "ROWS": tile.rows,
        "WARPS": tile.num_warps,
        "AHEAD": tile.ahead,
        "HAS_BIAS": has_bias,
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


@pytest.mark.parametrize(("capability", "num_blocks"), [(80, 16), (90, 20), (90, 54)])
def test_machine_code(capability, num_blocks):
    tile = choose_lanes_tile(5120, num_blocks)
    binary = compile_tile(tile, num_blocks, capability)
    assert binary.stack_bytes == binary.count("STL") == binary.count("LDL") == 0
    steps, own_rows = -(-num_blocks // 4), tile.rows // tile.num_warps
    # weights and tokens come 16 bytes at a time, and go to the products without a detour through shared memory
    assert binary.count(r"LDG\.E\.(EF\.)?128") == steps * (own_rows + 2)
    assert binary.count(r"IDP\.4A") == steps * own_rows * 4 * 2
    assert binary.count("LDS") <= 1
    assert (binary.count("ACQBULK") > 0) is (capability == 90)
    before_wait = binary.sass.split("ACQBULK")[0] if capability == 90 else ""
    assert before_wait.count("LDG.E.EF.128") == (tile.ahead * own_rows if capability == 90 else 0)


BASE = LinearProblem(out_features=192, in_features=512, device_type="cuda", compute_capability=(9, 0))


def test_one_token_without_groups_is_computed_by_lanes():
    plan = w4a8_linear.plan(BASE)
    assert plan.implementation(MAX_TOKENS) == "lanes"
    assert plan.implementation(MAX_TOKENS + 1) != "lanes"
    assert w4a8_linear.plan(BASE, force="lanes").implementation(300) == "lanes"
    grouped = dataclasses.replace(BASE, group_size=128, integer_group_scale=True)
    assert w4a8_linear.plan(grouped).implementation(1) != "lanes"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 128}, "one scale per channel"),
        ({"weight_bits": 8}, "at most 4 bits"),
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
def test_a_chain_in_a_graph_sees_every_new_token(layer, inputs):
    made = layer(2048, 2048, device="cuda")
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    plan, exact = w4a8_linear.plan(problem, force="lanes"), w4a8_linear.plan(problem, force="reference")
    operand = plan.prepare(made.codes, made.scale)
    slow = exact.prepare(made.codes, made.scale)
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
        assert torch.equal(out, chain(exact, slow))
