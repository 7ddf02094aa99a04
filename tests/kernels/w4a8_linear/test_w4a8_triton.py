# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel without a GPU: interpreted against the reference, and its machine code for two GPUs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_kernel

from quattuor.kernels import w4a8_linear
from quattuor.kernels.w4a8_linear.planes import (
    BLOCK_K,
    PLANE_K,
    ROW_TILE,
    TILE_ROWS,
    pack_planes,
    unpack_planes,
)
from quattuor.kernels.w4a8_linear.triton import choose_tile
from quattuor.kernels.w4a8_linear.triton_kernel import MODES, OVERLAPS, w4a8_kernel

GROUP_SCALE_TYPE = {"integer": "*i8", "half": "*fp16"}
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}


def test_interpreted_kernel_equals_the_reference():
    program = Path(__file__).with_name("interpreted_triton.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a8_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 9


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    ("capability", "num_tokens"),
    [
        (80, 4096),
        (90, 16),
        pytest.param(80, 16, marks=pytest.mark.slow),
        pytest.param(90, 64, marks=pytest.mark.slow),
        pytest.param(90, 4096, marks=pytest.mark.slow),
    ],
)
def test_machine_code(capability, mode, num_tokens):
    tile = choose_tile(num_tokens, 4096, 16, 132, capability == 90)
    binary = compile_tile(capability, mode, tile)
    assert binary.stack_bytes == 0
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.shared_bytes <= SHARED_BYTES[capability]
    if capability == 90:
        assert binary.count("IGMMA") == 8
        # one wait per dot in the loop: more would mean that the compiler serialized the warpgroup products
        assert binary.count(r"WARPGROUP\.DEPBAR") == 2
    else:
        assert binary.count("IMMA") >= 16
    assert binary.count("LDGSTS") > 0  # asynchronous copies: the loop is pipelined
    # bytes are not extracted and inserted one by one; the float16 route packs its results by permutation
    assert binary.count("PRMT") <= (136 if mode == "half" else 40)


@pytest.mark.parametrize(("capability", "mode"), [(80, "channel"), (90, "byte")])
def test_zero_points_do_not_spill(capability, mode):
    tile = choose_tile(4096, 4096, 16, 132, capability == 90)
    binary = compile_tile(capability, mode, tile, has_zero_point=True)
    assert binary.count("STL") == binary.count("LDL") == binary.stack_bytes == 0
    assert binary.shared_bytes <= SHARED_BYTES[capability]


def compile_tile(capability, mode, tile, has_zero_point=False):
    """Compile the kernel for a tile, with a bias."""
    signature = {
        "x": "*i8",
        "x_scale": "*fp32",
        "x_zero_point": "*i8",
        "packed": "*i8",
        "scale": "*fp32",
        "group_scale": GROUP_SCALE_TYPE.get(mode, "*fp32"),
        "weight_sum": "*i32",
        "bias": "*fp16",
        "out": "*fp16",
        "partial": "*i32",
        "arrivals": "*i32",
    } | dict.fromkeys(("M", "N", "K", "stride_xm", "N_PADDED", "NUM_BLOCKS", "SPLIT"), "i32")
    constants = {
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "MODE": MODES[mode].value,
        "GROUP_SIZE": 128,
        "IS_SPLIT": tile.split > 1,
        "EVEN_K": True,
        "HAS_BIAS": True,
        "HAS_ZERO_POINT": has_zero_point,
        "ASM": True,
        "OVERLAP": OVERLAPS[tile.overlap].value,
    }
    return compile_kernel(
        w4a8_kernel,
        signature,
        constants,
        capability=capability,
        divisible=[name for name in signature if name not in ("M", "NUM_BLOCKS", "SPLIT")],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        launch_pdl=tile.overlap != "none",
        enable_fp_fusion=False,
    )


def test_planes_hold_every_code_where_the_layout_says():
    codes = torch.randint(-8, 8, (5, 700), dtype=torch.int8)
    packed = pack_planes(codes)
    assert packed.shape == (ROW_TILE // TILE_ROWS, 3, TILE_ROWS, PLANE_K)
    assert torch.equal(unpack_planes(packed, 5, 700), codes)
    for n, k in ((0, 0), (1, 127), (2, 128), (3, 255), (4, 256), (4, 699)):
        byte = int(packed[0, k // BLOCK_K, n, k % PLANE_K]) & 0xFF
        nibble = byte >> 4 if k % BLOCK_K >= PLANE_K else byte & 15
        assert nibble == int(codes[n, k]) & 15
    assert not packed[0, :, 5:].any()
    assert not packed[1:].any()


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 33, 64, 65, 1000])
@pytest.mark.parametrize("has_warpgroups", [False, True])
def test_split_parts_are_never_empty(num_tokens, has_warpgroups):
    for out_features in (1, 64, 4096, 57344):
        for num_blocks in (1, 3, 16, 112):
            tile = choose_tile(num_tokens, out_features, num_blocks, 132, has_warpgroups)
            assert 1 <= tile.split <= max(1, num_blocks // 4)


def test_refusals_have_reasons(layer):
    on_gpu = dataclasses.replace(layer(8, 64).problem, device_type="cuda", compute_capability=(7, 5))
    for problem, words in ((layer(8, 64).problem, "runs on CUDA"), (on_gpu, "compute capability 8.0")):
        rows = [row for row in w4a8_linear.plan(problem).explain() if row.implementation == "triton"]
        assert rows
        assert all(words in row.reason and not row.is_chosen for row in rows)
