# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel without a GPU: its machine code, its tiles, its refusals."""

import dataclasses
import itertools
import re

import pytest

pytest.importorskip("triton.experimental.gluon")

from ahead_of_time import compile_kernel, product_loops

from quattuor.errors import UnsupportedError
from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.hopper import make_schedule
from quattuor.kernels.w4a8_linear.planes import MAX_SPLIT_TILES
from quattuor.kernels.w4a16_linear.gluon_kernel import CONSUMERS, mode_of, w4a16_hopper_kernel
from quattuor.kernels.w4a16_linear.hopper import COSTS, SHARED_LIMIT, choose_hopper_tile, tile_of
from quattuor.kernels.w4a16_linear.planes import layout_of

LAYOUT = "NVMMASharedLayout(swizzle_byte_width={}, element_bitwidth={}, rank=2)"


def problem_of(bits=4, group_size=128, out_features=28672, in_features=8192, zero_point=False):
    """Describe a layer on an H200."""
    return LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        zero_point=zero_point,
        activation_bits=16,
        device_type="cuda",
        compute_capability=(9, 0),
    )


def row_type(dtype, bits, rows):
    """The type of a descriptor of values of one group."""
    return f"tensordesc<{dtype}[1, {rows}],{LAYOUT.format(0, bits)}>"


def compile_tile(problem, tile, dtype="fp16", scale="fp16"):
    """Compile the kernel as it is launched with a tile, with zero points where the problem has them."""
    layout = layout_of(problem)
    plane_k = layout.plane_k
    planes = LAYOUT.format(2 * plane_k, 16)
    words = f"tensordesc<i16[128, {plane_k}],{planes}>"
    signature = {
        "x_desc": f"tensordesc<{dtype}[{tile.tokens}, {plane_k}],{planes}>",
        "w_desc": words,
        "scale_desc": row_type(scale, 16 if scale == "fp16" else 32, tile.rows) if problem.group_size else words,
        "zero_desc": row_type("u8", 8, tile.rows) if problem.zero_point else words,
        "out_desc": f"tensordesc<{dtype}[{tile.tokens}, 64],{LAYOUT.format(128, 16)}>",
        "out": f"*{dtype}",
        "scale": f"*{scale}",
        "bias": f"*{dtype}",
        "partial": "*fp32",
        "arrivals": "*i32",
    } | dict.fromkeys(("num_tokens", "num_rows", "num_blocks", "whole", "sharers"), "i32")
    constants = {
        "CONSUMERS": CONSUMERS,
        "BLOCKS": tile.blocks,
        "TOKENS": tile.tokens,
        "BITS": layout.bits,
        "PLANES": layout.planes,
        "PIECES": layout.pieces(problem.group_size),
        "TOGETHER": tile.together,
        "UNROLL": tile.unroll,
        "LAGS": tile.lags,
        "GROUP_SIZE": problem.group_size or 0,
        "HAS_ZERO": problem.zero_point,
        "MODE": mode_of(tile, problem.group_size).value,
        "BAND": 8,
        "W_STAGES": tile.w_stages,
        "X_STAGES": tile.x_stages,
        "HAS_BIAS": False,
        "BULK_STORE": True,
        "IS_CUT": tile.cut != "none",
        "PDL": True,
    }
    return compile_kernel(
        w4a16_hopper_kernel,
        signature,
        constants,
        capability=90,
        divisible=["out", "scale", "bias", "partial", "arrivals", "num_rows"],
        num_warps=4,
        launch_pdl=True,
    )


@pytest.mark.parametrize(
    ("size", "scaling", "fields"),
    [
        ("tall", "sums", {}),
        ("wide", "carried", {}),
        ("square", "sums", {"group_size": 64, "zero_point": True}),
        pytest.param("slim", "sums", {}, marks=pytest.mark.slow),
        pytest.param("narrow", "sums", {"zero_point": True}, marks=pytest.mark.slow),
        pytest.param("square", "sums", {}, marks=pytest.mark.slow),
        pytest.param("wide", "carried", {"bits": 8}, marks=pytest.mark.slow),
        pytest.param("wide", "carried", {"bits": 2}, marks=pytest.mark.slow),
        pytest.param("wide", "row", {"group_size": None}, marks=pytest.mark.slow),
        pytest.param("square", "row", {"group_size": None}, marks=pytest.mark.slow),
        pytest.param("square", "sums", {"group_size": 32}, marks=pytest.mark.slow),
        pytest.param("wide", "carried", {"group_size": 32, "zero_point": True}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_machine_code(size, scaling, fields, dtype):
    problem = problem_of(**fields)
    tile = tile_of(problem, size, scaling, "even")
    layout = layout_of(problem)
    pieces = layout.pieces(problem.group_size)
    binary = compile_tile(problem, tile, dtype)
    planes = tile.unroll * layout.planes
    # two consumers, and products of 16 elements of K for each 64 rows
    assert binary.count("HGMMA") == 2 * tile.blocks * planes * layout.plane_k // 16
    # every operand comes from registers
    assert len(re.findall(r"HGMMA\.64x\d+x16\.F32\S* R\d+, R\d+, gdesc", binary.sass)) == binary.count("HGMMA")
    # a wait where products are left in flight and one at each end, none for each instruction: that is a plane's
    assert 2 <= binary.count(r"WARPGROUP\.DEPBAR") <= 2 * tile.blocks * planes
    assert binary.shared_bytes <= tile.shared_bytes(layout, pieces) <= SHARED_LIMIT
    assert binary.count("UTMASTG") == 2 * tile.blocks
    for loop in product_loops(binary, "HGMMA"):
        assert not re.search(r"\b(STL|LDL)\b", loop), "spills between the products"
        # words go from shared memory to the lanes that multiply them, 16 bytes at a time
        assert loop.count("LDSM.16.M88.4") >= layout.plane_k // 16 * (tile.unroll - 1) * tile.blocks


def test_tiles_fit_every_layer():
    for bits, group_size, (size, scaling) in itertools.product((2, 4, 8), (None, 32, 64, 96, 128, 512), COSTS):
        if (scaling == "row") != (group_size is None):
            continue
        problem = problem_of(bits, group_size)
        tile = tile_of(problem, size, scaling, "none")
        layout = layout_of(problem)
        assert tile.shared_bytes(layout, layout.pieces(group_size)) <= SHARED_LIMIT
        assert tile.x_stages * tile.together >= 3
        assert layout.planes % tile.together == 0


def test_the_rule_for_tiles():
    large, small = problem_of(), problem_of(out_features=4096, in_features=4096)
    for problem, num_tokens in itertools.product((large, small), (17, 32, 33, 64, 65, 128, 300, 512, 4096)):
        tile = choose_hopper_tile(num_tokens, problem, 132, True)
        assert tile.tokens < 2 * num_tokens + 32
        assert choose_hopper_tile(num_tokens, problem, 132, False).scaling == "sums", "float32 scales"
        tiles = -(-problem.out_features // tile.rows) * -(-num_tokens // tile.tokens)
        steps = tile.num_steps(-(-problem.in_features // layout_of(problem).block_k))
        assert make_schedule(tiles, steps, 132, tile.cut).programs * CONSUMERS <= MAX_SPLIT_TILES
    wide = choose_hopper_tile(1024, large, 132, True)
    assert (wide.tokens, wide.scaling) == (256, "carried")
    per_row = choose_hopper_tile(1024, problem_of(group_size=None), 132, True)
    assert (per_row.tokens, per_row.scaling, per_row.unroll) == (256, "sums", 2)
    assert choose_hopper_tile(64, small, 132, True).lags, "few tokens leave room for a third sum"


def test_refusals_have_reasons():
    base = problem_of()
    for change, words in (
        ({"compute_capability": (8, 6)}, "warpgroup instructions"),
        ({"compute_capability": (10, 0)}, "warpgroup instructions"),
        ({"weight_bits": 3}, "3 bits lie in three"),
        ({"in_features": 8190}, "multiple of 8"),
        ({"group_size": 16}, "multiple of 32"),
        ({"device_type": "cpu", "compute_capability": None}, "CUDA"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            w4a16_linear.plan(dataclasses.replace(base, **change), force="gluon")


def test_plans_take_it_for_many_tokens():
    plan = w4a16_linear.plan(problem_of(zero_point=True))
    assert [plan.implementation(m) for m in (1, 16, 65, 5000)] == ["triton", "triton", "gluon", "gluon"]
    assert set(plan.schedule.layouts()) == {"fields"}, "one copy of the weight"
    rows = {row.tokens: row.reason for row in plan.explain() if row.is_chosen}
    assert "zero points that are no integers" in rows["129+"]
    assert w4a16_linear.plan(problem_of(bits=3)).implementation(5000) == "triton"


def test_a_layer_of_one_block_compiles_the_kernel_of_longer_layers():
    assert {"num_blocks", "num_tokens"} <= set(w4a16_hopper_kernel.do_not_specialize)
