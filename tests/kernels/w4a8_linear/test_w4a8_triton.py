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
from quattuor.kernels.w4a8_linear.narrow import BLOCKS, pack_narrow
from quattuor.kernels.w4a8_linear.planes import (
    BLOCK_K,
    PLANE_K,
    ROW_TILE,
    TILE_ROWS,
    pack_planes,
    pack_words,
    unpack_planes,
)
from quattuor.kernels.w4a8_linear.triton import choose_tile
from quattuor.kernels.w4a8_linear.triton_kernel import MAX_SUM_TOKENS, MODES, OVERLAPS, w4a8_kernel

GROUP_SCALE_TYPE = {"integer": "*i8", "half": "*fp16", "sums": "*i32"}
ANY_INTEGER = ("NUM_BLOCKS", "SPLIT", "PART_BLOCKS", "LONGER_PARTS")
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}


def test_interpreted_kernel_equals_the_reference():
    program = Path(__file__).with_name("interpreted_triton.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a8_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 16


@pytest.mark.parametrize(
    ("mode", "width", "group_size"),
    [
        ("channel", 4, 128),
        ("channel", 2, 128),
        ("channel", 3, 128),
        ("sums", 4, 128),
        ("sums", 2, 128),
        ("sums", 3, 128),
        ("integer", 4, 128),
        ("half", 4, 128),
        ("half", 4, 64),
        ("byte", 8, 128),
    ],
)
@pytest.mark.parametrize(
    ("capability", "num_tokens"),
    [
        (80, 4096),
        (90, 16),
        pytest.param(80, 16, marks=pytest.mark.slow),
        pytest.param(90, 1, marks=pytest.mark.slow),
        pytest.param(90, 64, marks=pytest.mark.slow),
        pytest.param(90, 4096, marks=pytest.mark.slow),
    ],
)
def test_machine_code(capability, mode, width, group_size, num_tokens):
    if mode == "sums" and width == 4 and num_tokens > MAX_SUM_TOKENS:
        pytest.skip("more tokens scale nibbles")
    scaled = {"sums": "planes", "integer": "planes", "half": "planes" if group_size == 128 else "elements"}.get(
        mode
    )
    tile = choose_tile(num_tokens, 4096, 16, 132, capability == 90, width, scaled)
    binary = compile_tile(capability, mode, tile, width, group_size)
    assert binary.stack_bytes == 0
    assert binary.count("STL") == binary.count("LDL") == 0
    assert binary.shared_bytes <= SHARED_BYTES[capability]
    planes = BLOCKS[width].planes
    if capability == 90 and tile.tokens >= 16:
        assert binary.count("IGMMA") == planes * tile.columns // 32
        # one wait per dot in the loop: more would mean that the compiler serialized the warpgroup products
        assert binary.count(r"WARPGROUP\.DEPBAR") == planes
    else:  # warpgroup products of 8 tokens are left to single warps
        assert binary.count("IMMA") >= min(tile.tokens // 2, 8) * planes
    assert binary.count("LDGSTS") > 0  # asynchronous copies: the loop is pipelined
    # bytes are not extracted and inserted one by one; the float16 route packs its results by permutation
    assert binary.count("PRMT") <= (136 if mode == "half" else 40)


@pytest.mark.parametrize(("num_tokens", "width"), [(16, 4), (64, 4), (16, 2), (1, 3)])
def test_group_scales_are_copied_ahead(num_tokens, width):
    tile = choose_tile(num_tokens, 4096, 16, 132, True, width, "planes")
    with_scales = compile_tile(90, "sums", tile, width).opcodes()
    without = compile_tile(90, "channel", tile, width).opcodes()

    def count(opcodes, start):
        return sum(n for name, n in opcodes.items() if name.startswith(start))

    # no scale is loaded to a register, where a product would wait for it
    assert count(with_scales, "LDG.") == count(without, "LDG.")
    assert count(with_scales, "LDGSTS") > count(without, "LDGSTS")


@pytest.mark.parametrize(("capability", "mode", "width"), [(80, "channel", 4), (90, "byte", 8)])
def test_zero_points_do_not_spill(capability, mode, width):
    tile = choose_tile(4096, 4096, 16, 132, capability == 90, width)
    binary = compile_tile(capability, mode, tile, width, has_zero_point=True)
    assert binary.count("STL") == binary.count("LDL") == binary.stack_bytes == 0
    assert binary.shared_bytes <= SHARED_BYTES[capability]


def compile_tile(capability, mode, tile, width=4, group_size=128, has_zero_point=False):
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
    } | dict.fromkeys(("M", "N", "K", "stride_xm", "N_PADDED", *ANY_INTEGER), "i32")
    constants = {
        "ROWS": tile.rows,
        "TOKENS": tile.tokens,
        "MODE": MODES[mode].value,
        "WIDTH": width,
        "PLANES": BLOCKS[width].planes,
        "CHUNKS": BLOCKS[width].chunks,
        "GROUP_SIZE": group_size,
        "IS_SPLIT": tile.split > 1,
        "EVEN_K": True,
        "HAS_BIAS": True,
        "HAS_ZERO_POINT": has_zero_point,
        "ASM": True,
        "OVERLAP": OVERLAPS[tile.overlap].value,
        "COLUMNS": tile.columns,
        "STAGES": tile.num_stages if mode == "sums" else None,
    }
    return compile_kernel(
        w4a8_kernel,
        signature,
        constants,
        capability=capability,
        divisible=[name for name in signature if name not in ("M", *ANY_INTEGER)],
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


@pytest.mark.parametrize(("bits", "planes"), [(2, 4), (3, 8)])
def test_narrow_planes_hold_every_code_where_the_layout_says(bits, planes):
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (5, 2100), dtype=torch.int8)
    packed = pack_narrow(codes, bits)
    block_k, chunks = planes * PLANE_K, BLOCKS[bits].chunks
    blocks = -(-2100 // block_k)
    assert packed.shape == (ROW_TILE // TILE_ROWS, blocks * chunks, TILE_ROWS, PLANE_K)
    assert packed.numel() * 8 == ROW_TILE * blocks * block_k * bits
    stored = packed[0].view(blocks, chunks, TILE_ROWS, PLANE_K).int() & 0xFF
    for n, k in ((0, 0), (1, 127), (2, 128), (3, 300), (4, 511), (0, 700), (1, 800), (2, 1000), (4, 2099)):
        chunk = stored[k // block_k, :, n, k % PLANE_K].tolist()
        plane = k % block_k // PLANE_K
        if bits == 2:
            found = chunk[0] >> 2 * plane & 3
        elif plane < 6:
            found = chunk[plane // 2] >> (2 if plane % 2 else 5) & 7
        else:
            found = (chunk[0 if plane == 6 else 2] & 3) << 1 | chunk[1] >> (1 if plane == 6 else 0) & 1
        assert found == int(codes[n, k]) & ((1 << bits) - 1)
    assert not packed[0, :, 5:].any()
    assert not packed[1:].any()


@pytest.mark.parametrize(("planes", "group_size"), [(2, 128), (2, 512), (4, 128), (8, 256)])
def test_words_hold_the_scale_of_each_plane(planes, group_size):
    in_features = 2 * planes * PLANE_K
    group_scale = torch.randint(-15, 17, (-(-in_features // group_size), 3), dtype=torch.int8)
    words = pack_words(group_scale, group_size, planes, in_features)
    per_block = -(-planes // 4)
    assert words.shape == (2 * per_block, 3)
    for block in range(2):
        for plane in range(planes):
            word = words[block * per_block + plane // 4]
            found = (word << (24 - plane % 4 * 8)) >> 24
            assert torch.equal(found, group_scale[(block * planes + plane) * PLANE_K // group_size].int())


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 33, 64, 65, 1000])
@pytest.mark.parametrize("has_warpgroups", [False, True])
@pytest.mark.parametrize(
    ("width", "scaled"), [(4, None), (4, "planes"), (4, "elements"), (2, None), (3, "planes")]
)
def test_split_parts_are_never_empty(num_tokens, has_warpgroups, width, scaled):
    for out_features in (1, 64, 4096, 57344):
        for num_blocks in (1, 3, 16, 112):
            tile = choose_tile(num_tokens, out_features, num_blocks, 132, has_warpgroups, width, scaled)
            assert 1 <= tile.split <= num_blocks
            assert has_warpgroups or tile.overlap == "none"


def test_refusals_have_reasons(layer):
    on_gpu = dataclasses.replace(layer(8, 64).problem, device_type="cuda", compute_capability=(7, 5))
    for problem, words in ((layer(8, 64).problem, "runs on CUDA"), (on_gpu, "compute capability 8.0")):
        rows = [row for row in w4a8_linear.plan(problem).explain() if row.implementation == "triton"]
        assert rows
        assert all(words in row.reason and not row.is_chosen for row in rows)
