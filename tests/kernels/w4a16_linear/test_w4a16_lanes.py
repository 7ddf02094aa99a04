# SPDX-License-Identifier: Apache-2.0
"""The kernels for few tokens: interpreted, their machine code, and a CUDA device if there is one."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from ahead_of_time import compile_kernel
from few_tokens import check_runs, random_layer
from test_w4a16_triton import kernel_constants, problem

from quattuor.kernels import w4a16_linear
from quattuor.kernels.w4a16_linear.lanes import launch_lanes
from quattuor.kernels.w4a16_linear.lanes.fields import FACTOR_BITS, INTEGER_BITS, num_terms
from quattuor.kernels.w4a16_linear.lanes.integers_kernel import MAX_SEARCH, integers_kernel, num_pairs
from quattuor.kernels.w4a16_linear.lanes.product_kernel import product_kernel
from quattuor.kernels.w4a16_linear.planes import DigitTile, LaneTile, Layout, PairTile, layout_of
from quattuor.kernels.w4a16_linear.triton import choose_bytes_tile, choose_lane_tile, takes_bytes


def test_interpreted_kernels_are_close_to_float64():
    program = Path(__file__).with_name("interpreted_w4a16_lanes.py")
    env = os.environ | {"PYTHONPATH": str(Path(w4a16_linear.__file__).parents[3])}
    result = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [result.stdout.count(word) for word in ("fields", "integers", "close")] == [4, 4, 6]


def loop_of(sass, opcode):
    """Return the instructions of the longest loop that holds an opcode."""
    labels, found, longest = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(found)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction[1])
            jump = re.search(r"BRA\S*\s.*`\((\.L_\S+)\)", found[-1])
            inside = found[labels[jump[1]] :] if jump and jump[1] in labels else []
            if any(opcode in text for text in inside) and len(inside) > len(longest):
                longest = inside
    return longest


def compile_product(tile, layout, group_size, zero, num_tokens):
    """Compile the product for a tile, without a bias; `zero` as in `kernel_constants`."""
    pointers = {
        "words": "*i32",
        "middles": "*i32",
        "unit": "*fp32",
        "packed": "*i32",
        "scale": "*fp16",
        "zero_point": ("*fp16", "*u8", "*fp32")[zero],
        "bias": "*fp16",
        "out": "*fp16",
    }
    sizes = dict.fromkeys(("M", "N", "N_PADDED", "NUM_BLOCKS", "ROUNDS"), "i32")
    constants = kernel_constants(layout, group_size, zero) | {
        "WARPS": tile.num_warps,
        "DEPTH": tile.depth,
        "HOLDS": tile.holds,
        "BEFORE": tile.before,
        "TILES": -(-num_tokens // 2),
        "IS_SINGLE": num_tokens == 1,
        "PAIRS": num_pairs(layout),
        "HAS_BIAS": False,
        "OVERLAP": 2,
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
    ("bits", "group_size", "zero", "num_tokens", "most"),
    [
        (4, 128, 0, 1, 1.35),
        (3, None, 0, 1, 1.1),
        (2, 128, 0, 1, 1.1),
        (4, 128, 1, 1, 1.7),
        pytest.param(2, None, 0, 1, 0.75, marks=pytest.mark.slow),
        pytest.param(3, 64, 2, 2, 2.4, marks=pytest.mark.slow),
        pytest.param(2, 128, 1, 4, 1.8, marks=pytest.mark.slow),
        pytest.param(8, 128, 0, 1, 1.4, marks=pytest.mark.slow),
    ],
)
def test_machine_code(bits, group_size, zero, num_tokens, most):
    layout = layout_of(problem(bits, group_size))
    tile = LaneTile(num_warps=2, depth=1, holds=False, before=4, overlap="late")
    binary = compile_product(tile, layout, group_size, zero, num_tokens)
    assert binary.count("STL") == binary.count("LDL") == 0
    tiles = -(-num_tokens // 2)
    terms = num_terms(bits, layout.planes, layout.plane_k // 32)
    assert binary.count("IMMA.16832.U8.S8") == terms * tiles
    # nothing but sums at the end passes through shared memory
    loop = loop_of(binary.sass, "IMMA")
    assert not any(re.search(r"\b(LDS|STS|BAR)\b", text) for text in loop)
    assert sum("LDG.E.NA.128" in text for text in loop) == 2 * layout.words * layout.plane_k // 32
    assert len(loop) <= most * layout.block_k / 2


def test_loads_of_the_next_block_come_before_the_products_where_they_are_held():
    layout = layout_of(problem(4, 128))
    places = {}
    for holds in (False, True):
        tile = LaneTile(num_warps=2, depth=1, holds=holds, before=4, overlap="late")
        loop = loop_of(compile_product(tile, layout, 128, 0, 1).sass, "IMMA")
        first = next(i for i, text in enumerate(loop) if "IMMA" in text)
        places[holds] = [i < first for i, text in enumerate(loop) if "LDG.E.NA.128" in text]
    assert all(places[True])
    assert not any(places[False])


@pytest.mark.parametrize(("bits", "dtype", "pieces"), [(4, "fp16", 2), (3, "bf16", 8), (2, "fp32", 1)])
def test_machine_code_of_the_tokens(bits, dtype, pieces):
    layout = Layout(bits, 32 if bits == 3 else 64)
    pointers = {"x": f"*{dtype}", "words": "*i32", "unit": "*fp32", "middles": "*i32"}
    constants = {
        "BITS": bits,
        "PLANES": layout.planes,
        "PLANE_K": layout.plane_k,
        "PIECES": pieces,
        "TERMS": num_terms(bits, layout.planes, layout.plane_k // 32),
        "SIZE": triton.next_power_of_2(num_pairs(layout) * 64),
        "INTEGER_BITS": INTEGER_BITS[bits],
        "FACTOR_BITS": FACTOR_BITS[bits],
        "SEARCH": MAX_SEARCH,
        "STARTS": True,
        "WAITS": True,
    }
    signature = pointers | dict.fromkeys(("M", "K", "stride_xm"), "i32")
    divisible = [*pointers, "K", "stride_xm"]
    binary = compile_kernel(integers_kernel, signature, constants, capability=90, divisible=divisible, num_warps=8)
    assert binary.stack_bytes == 0
    assert binary.count(r"RED\.|ATOM") == 0


def test_bytes_are_taken_for_few_tokens_of_large_layers_with_long_planes():
    layer = problem(4, 128)
    large = replace(layer, out_features=28672)
    assert takes_bytes(large, 2, 2, True)
    assert not takes_bytes(large, 3, 2, True)
    assert not takes_bytes(large, 1, 2, False)
    assert not takes_bytes(replace(large, weight_bits=8), 1, 2, True)
    # one token of smaller layers, two tokens only where the kernel before the product does not show
    assert takes_bytes(layer, 1, 2, True)
    assert not takes_bytes(layer, 2, 2, True)
    small = replace(layer, out_features=1024, in_features=4096)
    assert not takes_bytes(small, 1, 2, True)
    # float32 has no other products on tensor cores
    assert takes_bytes(small, 2, 4, True)
    assert not takes_bytes(problem(4, 16), 1, 4, True)
    # the sum of a whole row must fit 32 bits: 2^17 products of -128 and -128 do not
    assert takes_bytes(replace(large, in_features=2**17 - 1), 1, 2, True)
    assert not takes_bytes(replace(large, in_features=2**17), 1, 2, True)


def test_small_layers_share_blocks_between_more_warps():
    warps = [choose_lane_tile(n, k // 256, 132).num_warps for n, k in ((28672, 8192), (11008, 4096), (4096, 4096))]
    assert warps == [1, 2, 4]
    assert choose_lane_tile(64, 2, 132).num_warps == 2


@pytest.mark.parametrize(
    ("bits", "size", "num_tokens", "kind"),
    [(4, 28672, 2, DigitTile), (4, 28672, 1, PairTile), (3, 28672, 1, LaneTile), (4, 4096, 1, LaneTile)],
)
def test_the_kernel_of_a_layer_that_was_not_measured(bits, size, num_tokens, kind):
    layer = replace(problem(bits, 128), out_features=size)
    layout = layout_of(layer)
    tile = choose_bytes_tile(layer, layout, 8192 // layout.block_k, 132, num_tokens)
    assert isinstance(tile, kind)
    assert kind is not DigitTile or tile.split == 1
    # programs of a single warp, and those of digits, let the next kernel wait
    assert tile.overlap == ("late" if size == 4096 or kind is PairTile else "own")
    # pairs need groups
    whole = replace(layer, group_size=None)
    assert not isinstance(choose_bytes_tile(whole, layout_of(whole), 32, 132, num_tokens), PairTile)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("num_tokens", "tile"),
    [
        (1, LaneTile(num_warps=2, depth=1, holds=False, before=4, overlap="late")),
        (2, LaneTile(num_warps=1, depth=2, holds=True, before=4, overlap="early")),
        (3, LaneTile(num_warps=4, depth=1, holds=True, before=0, overlap="late")),
        (4, LaneTile(num_warps=8, depth=2, holds=False, before=0, overlap="none")),
    ],
    ids=["1", "2", "3", "4"],
)
@pytest.mark.parametrize(
    ("bits", "group_size", "zero"),
    [
        (4, 128, "none"),
        (4, None, "real"),
        (3, 64, "none"),
        (3, None, "integer"),
        (2, 128, "real"),
        (2, 64, "integer"),
        (8, 128, "integer"),
    ],
)
def test_gpu_tiles_of_lanes(num_tokens, tile, bits, group_size, zero):
    layer = random_layer(num_tokens, bits, group_size, zero)

    def run(x):
        out = torch.full((num_tokens, layer.problem.out_features), torch.nan, device="cuda")
        layout = layout_of(layer.problem)
        launch_lanes(x, *layer.weight, layer.bias, out, layout=layout, group_size=group_size, tile=tile)
        return out

    check_runs(layer, run, row=0)
