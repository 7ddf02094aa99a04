# SPDX-License-Identifier: Apache-2.0
"""The kernels for few tokens: interpreted, their machine code, and a CUDA device if there is one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_kernel
from few_tokens import check_runs, random_layer
from test_w4a16_triton import SHARED_BYTES, kernel_constants, problem

from quattuor.kernels import w4a16_linear
from quattuor.kernels.w4a16_linear import measured
from quattuor.kernels.w4a16_linear.digits import launch_digits
from quattuor.kernels.w4a16_linear.digits.product_kernel import product_kernel
from quattuor.kernels.w4a16_linear.planes import DigitTile, LaneTile, PairTile, Tile, layout_of


def test_interpreted_kernels_are_close_to_float64():
    program = Path(__file__).with_name("interpreted_digits.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a16_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("close") == 20
    assert result.stdout.count("digits") == 3


@pytest.mark.parametrize(
    ("bits", "group_size", "zero", "num_warps", "is_direct"),
    [
        (4, 128, 0, 4, False),
        (3, 128, 0, 2, True),
        (2, 64, 1, 2, False),
        pytest.param(2, 128, 0, 2, True, marks=pytest.mark.slow),
        pytest.param(4, None, 0, 4, False, marks=pytest.mark.slow),
        pytest.param(3, 64, 2, 2, False, marks=pytest.mark.slow),
        pytest.param(8, 128, 1, 4, False, marks=pytest.mark.slow),
    ],
)
def test_machine_code(bits, group_size, zero, num_warps, is_direct):
    layout = layout_of(problem(bits, group_size))
    sizes = {"rows": 64, "tokens": 2, "split": 1, "num_warps": num_warps, "num_stages": 3, "before": 4}
    tile = DigitTile(**sizes, overlap="own", is_direct=is_direct)
    binary = compile_product(tile, layout, group_size, zero)
    assert binary.stack_bytes == 0
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.shared_bytes <= SHARED_BYTES[90]
    steps = layout.planes * layout.plane_k // 32
    products = steps * tile.rows // 16 // tile.num_warps
    assert binary.count("IMMA.16832.S8.S8") == products
    # words and digits come through asynchronous copies
    assert binary.count("LDGSTS") > 0
    assert binary.count("LDS.64") > 0
    if num_warps == 2:
        # two barriers for each stage, and few after the loop; the others are for scales
        assert (binary.count("BAR") <= 6) == is_direct


def compile_product(tile, layout, group_size, zero):
    """Compile the product for a tile, without a bias; `zero` as in `kernel_constants`."""
    pointers = {
        "digits": "*i8",
        "unit": "*fp32",
        "sums": "*fp32",
        "packed": "*i16",
        "scale": "*fp16",
        "zero_point": ("*fp16", "*u8", "*fp32")[zero],
        "bias": "*fp16",
        "out": "*fp16",
        "partial": "*fp32",
        "arrivals": "*i32",
    }
    sizes = dict.fromkeys(("M", "N", "K_PADDED", "N_PADDED", "NUM_BLOCKS", "SPLIT"), "i32")
    constants = kernel_constants(layout, group_size, zero) | {
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "HAS_BIAS": False,
        "IS_SPLIT": tile.split > 1,
        "OVERLAP": 2,
        "BEFORE": tile.before,
        "IS_DIRECT": tile.is_direct,
    }
    return compile_kernel(
        product_kernel,
        pointers | sizes,
        constants,
        capability=90,
        divisible=[*pointers, "N", "K_PADDED", "N_PADDED"],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def test_measured_layers_take_the_tile_that_was_faster():
    layer = replace(problem(3, 128), out_features=28672, device_type="cuda", compute_capability=(9, 0))
    assert isinstance(measured.find(layer, 1), LaneTile)
    assert isinstance(measured.find(layer, 3), Tile)
    # with zero points, that of the layer without where it was not measured
    assert measured.find(replace(layer, zero_point=True), 2) == measured.find(layer, 2)
    layer = replace(layer, weight_bits=4)
    assert isinstance(measured.find(layer, 1), PairTile)
    assert isinstance(measured.find(layer, 2), DigitTile)
    assert measured.find(replace(layer, zero_point=True), 1) != measured.find(layer, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "tile",
    [
        DigitTile(rows=64, tokens=2, split=1, num_warps=4, num_stages=3, overlap="late", before=4, is_direct=True),
        DigitTile(
            rows=64, tokens=4, split=3, num_warps=4, num_stages=4, overlap="early", before=0, is_direct=False
        ),
        DigitTile(rows=32, tokens=2, split=2, num_warps=2, num_stages=3, overlap="none", before=0, is_direct=True),
    ],
    ids=["late", "early", "none"],
)
@pytest.mark.parametrize(
    ("bits", "group_size", "zero"),
    [
        (4, 128, "integer"),
        (4, None, "real"),
        (3, 64, "none"),
        (3, None, "integer"),
        (2, 128, "real"),
        (8, 128, "integer"),
    ],
)
def test_gpu_tiles(tile, bits, group_size, zero):
    layer = random_layer(5, bits, group_size, zero)
    arrivals = layer.tensors["arrivals"]

    def run(x):
        out = torch.full((5, layer.problem.out_features), torch.nan, device="cuda")
        layout = layout_of(layer.problem)
        launch_digits(x, *layer.weight, arrivals, layer.bias, out, layout=layout, group_size=group_size, tile=tile)
        return out

    check_runs(layer, run, row=1)
    assert not arrivals.any()
