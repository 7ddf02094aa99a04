# SPDX-License-Identifier: Apache-2.0
"""The kernels for one token and groups: interpreted, their machine code, and a CUDA device if there is one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ahead_of_time import compile_kernel
from few_tokens import check_runs, random_layer
from test_w4a16_lanes import loop_of
from test_w4a16_triton import kernel_constants, problem

from quattuor.kernels import w4a16_linear
from quattuor.kernels.w4a16_linear.lanes.fields import FACTOR_BITS, INTEGER_BITS
from quattuor.kernels.w4a16_linear.overlap import OVERLAPS
from quattuor.kernels.w4a16_linear.pairs import launch_pairs
from quattuor.kernels.w4a16_linear.pairs.integers_kernel import (
    WORDS_OF_PROGRAM,
    integers_kernel,
    is_magic,
    num_slots,
    num_steps,
)
from quattuor.kernels.w4a16_linear.pairs.product_kernel import product_kernel
from quattuor.kernels.w4a16_linear.planes import Layout, PairTile, layout_of


def test_interpreted_pairs_are_close_to_float64():
    program = Path(__file__).with_name("interpreted_w4a16_pairs.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a16_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [result.stdout.count(word) for word in ("fields", "integers", "close")] == [9, 4, 6]


def compile_product(tile, layout, group_size, zero):
    """Compile the product for a tile, without a bias; `zero` as in `kernel_constants`."""
    pointers = {
        "words": "*i32",
        "middles": "*i32",
        "unit": "*fp32",
        "packed": "*i32",
        "scale": "*i32",
        "zero_point": ("*i32", "*i16", "*fp32")[zero],
        "bias": "*fp16",
        "out": "*fp16",
    }
    sizes = dict.fromkeys(("N", "N_PADDED", "NUM_BLOCKS", "ROUNDS"), "i32")
    pieces = layout.pieces(group_size)
    constants = kernel_constants(layout, group_size, zero) | {
        "WARPS": tile.num_warps,
        "IS_EARLY": tile.is_early,
        "STEPS": num_steps(layout, pieces),
        "IS_MAGIC": is_magic(layout, pieces),
        "HAS_BIAS": False,
        "OVERLAP": OVERLAPS[tile.overlap].value,
    }
    return compile_kernel(
        product_kernel,
        pointers | sizes,
        constants,
        capability=90,
        divisible=[*pointers, "N", "N_PADDED"],
        num_warps=tile.num_warps,
        num_stages=1,
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "zero", "is_early", "most"),
    [
        (4, 128, 0, False, 0.85),
        (2, 128, 0, False, 0.75),
        (3, 128, 0, True, 1.05),
        pytest.param(4, 128, 1, True, 1.1, marks=pytest.mark.slow),
        pytest.param(3, 64, 2, False, 1.5, marks=pytest.mark.slow),
        pytest.param(8, 64, 0, False, 1.2, marks=pytest.mark.slow),
    ],
)
def test_machine_code(bits, group_size, zero, is_early, most):
    layout = layout_of(problem(bits, group_size))
    binary = compile_product(PairTile(num_warps=2, is_early=is_early, overlap="late"), layout, group_size, zero)
    assert binary.count("STL") == binary.count("LDL") == 0
    loop = loop_of(binary.sass, "IMMA")
    turns = 2 if is_early else 1
    pieces = layout.pieces(group_size)
    products = num_slots(layout, pieces) * layout.plane_k // 16
    assert sum("IMMA.16832.U8.S8" in text for text in loop) == products * turns
    assert not any(re.search(r"\b(LDS|STS|BAR)\b", text) for text in loop)
    assert sum("LDG.E.NA.128" in text for text in loop) == 2 * layout.words * layout.plane_k // 32 * turns
    assert sum("LDG.E.128" in text for text in loop) == (num_steps(layout, pieces) + pieces // 2) * turns
    assert len(loop) <= most * layout.block_k / 2 * turns


@pytest.mark.parametrize(("bits", "dtype", "pieces"), [(4, "fp16", 2), (3, "bf16", 4), (2, "fp32", 8)])
def test_machine_code_of_the_token(bits, dtype, pieces):
    layout = Layout(bits, 32 if bits == 3 else 64)
    pointers = {"x": f"*{dtype}", "words": "*i32", "unit": "*fp32", "middles": "*i32"}
    constants = {
        "BITS": bits,
        "PLANES": layout.planes,
        "PLANE_K": layout.plane_k,
        "PIECES": pieces,
        "SLOTS": num_slots(layout, pieces),
        "STEPS": num_steps(layout, pieces),
        "WRITERS": 2,
        "SIZE": WORDS_OF_PROGRAM,
        "INTEGER_BITS": INTEGER_BITS[bits],
        "FACTOR_BITS": FACTOR_BITS[bits],
        "START": 0,
        "SEARCH": 8192,
        "STARTS": True,
        "WAITS": True,
    }
    signature = pointers | {"K": "i32"}
    binary = compile_kernel(
        integers_kernel, signature, constants, capability=90, divisible=list(signature), num_warps=8
    )
    assert binary.stack_bytes == 0
    assert binary.count(r"RED\.|ATOM") == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "tile",
    [
        PairTile(num_warps=1, is_early=True, overlap="own"),
        PairTile(num_warps=2, is_early=False, overlap="late"),
        PairTile(num_warps=4, is_early=True, overlap="early"),
        PairTile(num_warps=8, is_early=False, overlap="none"),
    ],
    ids=["1", "2", "4", "8"],
)
@pytest.mark.parametrize(
    ("bits", "group_size", "zero"),
    [
        (4, 128, "none"),
        (4, 32, "real"),
        (3, 128, "none"),
        (3, 64, "integer"),
        (2, 128, "real"),
        (2, 64, "integer"),
        (2, 256, "none"),
        (8, 64, "integer"),
    ],
)
def test_gpu_tiles_of_pairs(tile, bits, group_size, zero):
    layer = random_layer(1, bits, group_size, zero)

    def run(x):
        out = torch.full((1, layer.problem.out_features), torch.nan, device="cuda")
        layout = layout_of(layer.problem)
        launch_pairs(x, *layer.weight, layer.bias, out, layout=layout, group_size=group_size, tile=tile)
        return out

    check_runs(layer, run, row=0)
