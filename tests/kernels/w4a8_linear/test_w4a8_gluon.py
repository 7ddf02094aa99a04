# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel without a GPU: its machine code, its tiles, its share of work, its refusals."""

import dataclasses
import itertools
import re

import pytest

pytest.importorskip("triton.experimental.gluon")

from ahead_of_time import compile_kernel, product_loops

from quattuor.errors import UnsupportedError
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.layer import prepare_layouts
from quattuor.kernels.w4a8_linear.gluon_kernel import MODES, w4a8_hopper_kernel
from quattuor.kernels.w4a8_linear.hopper import CUTS, choose_hopper_tile, make_schedule
from quattuor.kernels.w4a8_linear.planes import HopperTile, mode_of

LAYOUT = "NVMMASharedLayout(swizzle_byte_width={}, element_bitwidth={}, rank=2)"
GROUP_SCALE = {"integer": ("i8", 8), "half": ("fp16", 16), "unclamped": ("fp16", 16)}


def compile_tile(mode, tile):
    """Compile the kernel as it is launched with a tile."""
    group_type, group_bits = GROUP_SCALE.get(mode, ("i8", 8))
    signature = {
        "x_desc": f"tensordesc<i8[{tile.tokens}, 128],{LAYOUT.format(128, 8)}>",
        "w_desc": f"tensordesc<i8[128, 128],{LAYOUT.format(128, 8)}>",
        "group_desc": f"tensordesc<{group_type}[1, {tile.rows}],{LAYOUT.format(0, group_bits)}>",
        "out_desc": f"tensordesc<fp16[{tile.tokens // tile.spans}, 64],{LAYOUT.format(128, 16)}>",
        "out": "*fp16",
        "scale": "*fp32",
        "x_scale": "*fp32",
        "bias": "*fp16",
        "partial": "*i32",
        "arrivals": "*i32",
        "num_tokens": "i32",
        "num_rows": "i32",
        "num_blocks": "i32",
        "whole": "i32",
        "sharers": "i32",
    }
    constants = {
        "CONSUMERS": tile.consumers,
        "BLOCKS": tile.blocks,
        "SPANS": tile.spans,
        "TOKENS": tile.tokens,
        "MODE": MODES[mode].value,
        "GROUP_SIZE": 128,
        "BAND": 8,
        "STAGES": tile.stages,
        "UNROLL": tile.unroll,
        "HAS_BIAS": False,
        "BULK_STORE": True,
        "EARLY_SCALE": tile.has_room_for_scales(mode),
        "IS_CUT": tile.cut != "none",
        "PDL": True,
        "CONSUMER_REGISTERS": tile.registers,
    }
    divisible = ["out", "scale", "x_scale", "bias", "partial", "arrivals", "num_rows"]
    return compile_kernel(
        w4a8_hopper_kernel,
        signature,
        constants,
        capability=90,
        divisible=divisible,
        num_warps=4,
        maxnreg=tile.max_registers,
        launch_pdl=True,
        enable_fp_fusion=False,
    )


TILES = {
    "narrow": HopperTile(blocks=1, tokens=64, stages=6),
    "square": HopperTile(blocks=1, tokens=128, stages=4),
    "unrolled": HopperTile(blocks=1, tokens=128, stages=4, unroll=2),
    "tall": HopperTile(blocks=2, tokens=128, stages=3),
    "tall half": HopperTile(blocks=2, tokens=128, stages=2),
    "wide": HopperTile(blocks=1, tokens=256, spans=2, stages=2),
    "paired": HopperTile(blocks=1, tokens=64, stages=3, registers=96, max_registers=80),
}


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("channel", "tall"),
        ("integer", "unrolled"),
        ("channel", "paired"),
        ("integer", "wide"),
        pytest.param("channel", "square", marks=pytest.mark.slow),
        pytest.param("channel", "wide", marks=pytest.mark.slow),
        pytest.param("channel", "unrolled", marks=pytest.mark.slow),
        pytest.param("integer", "narrow", marks=pytest.mark.slow),
        pytest.param("integer", "paired", marks=pytest.mark.slow),
        pytest.param("integer", "tall", marks=pytest.mark.slow),
        pytest.param("half", "square", marks=pytest.mark.slow),
        pytest.param("half", "tall half", marks=pytest.mark.slow),
        ("unclamped", "square"),
        pytest.param("unclamped", "wide", marks=pytest.mark.slow),
    ],
)
def test_machine_code(mode, name):
    tile = TILES[name]
    binary = compile_tile(mode, tile)
    loops = 1 if tile.unroll == 1 else 2  # several K blocks at a time, then the last ones
    bodies = tile.unroll + loops - 1
    # two consumers, 256 / 32 products for each 64 rows and span of tokens
    assert binary.count("IGMMA") == 2 * tile.blocks * tile.spans * 8 * bodies
    # one wait for each consumer and loop: more would mean that the compiler serialized the products
    assert binary.count(r"WARPGROUP\.DEPBAR") == 2 * loops
    # weights early and in the loop, activations of two planes, group scales of two planes
    assert binary.count("UTMALDG") == 2 * tile.rows // 128 + (2 if mode == "channel" else 4)
    assert binary.count("UTMASTG") == 2 * tile.blocks * tile.spans
    assert binary.count("STSM") > 0
    permutations = {"half": 500, "unclamped": 16 + 64 * tile.blocks * bodies}
    assert binary.count("PRMT") <= permutations.get(mode, 16)
    assert (binary.count("HMNMX2") > 0) == (mode == "half")
    # sums are exchanged 8 bytes for a thread at a time
    assert binary.count(r"STG\.E\.64") == 2 * tile.blocks * tile.tokens // 4
    assert binary.shared_bytes <= tile.shared_limit
    if tile.max_registers is not None:
        assert binary.registers <= tile.max_registers
    for loop in product_loops(binary, "IGMMA"):
        assert not re.search(r"\b(STL|LDL)\b", loop), "spills between the products"
        assert loop.count("LDSM.16.M88.4") == 4 * tile.blocks * bodies


def test_specialized_warps_read_their_state_behind_all_that_the_kernel_shares():
    """What racecheck reports of the kernel: bytes of the compiler, between barriers of all warps."""
    tile = TILES["square"]
    binary = compile_tile("channel", tile)
    reads = re.findall(r"LDS\.U8 R\d+, \[R\d+\+UR\d+\+(0x[0-9a-f]+)\]", binary.sass)
    states = binary.shared_bytes - 8  # a byte for each of eight worker warps, whose numbers begin with 4
    assert [int(offset, 16) + 4 for offset in reads] == [states]
    assert binary.sass.count(f"+{states:#x}]") == 2, "written before and after the partitions run"
    last_barrier = states - 8
    assert f"+{last_barrier:#x}]" in binary.sass


@pytest.mark.parametrize("mode", [{}, {"group_size": 128, "integer_group_scale": True}, {"group_size": 128}])
def test_tiles_of_unmeasured_layers(mode):
    large = LinearProblem(out_features=28672, in_features=8192, **mode)
    small = LinearProblem(out_features=4096, in_features=4096, **mode)
    for problem, num_tokens in itertools.product((large, small), (1, 8, 9, 16, 17, 33, 64, 65, 128, 700, 4096)):
        tile = choose_hopper_tile(num_tokens, problem, 132)
        assert tile.tokens < max(16, 2 * num_tokens)
        assert tile.tokens >= num_tokens or tile.tokens >= 64
        assert tile.shared_bytes(mode_of(problem)) <= tile.shared_limit
        if tile.per_processor == 2:
            assert tile.max_registers == 80
            assert tile.stages == (3 if tile.tokens == 64 else 5)
    assert choose_hopper_tile(16, large, 132).per_processor == 2, "13 blocks of K for each program"
    assert choose_hopper_tile(16, small, 132).per_processor == 1, "two blocks"
    assert choose_hopper_tile(64, large, 132).per_processor == (1 if mode_of(large) == "half" else 2)
    if mode_of(large) == "half":
        assert choose_hopper_tile(256, large, 132).tokens == 256, "an operand takes long to unpack"
    else:
        few = choose_hopper_tile(128, small, 132)
        assert (few.tokens, few.cut) == (64, "aligned"), "64 tiles, so that two programs share each"
    assert choose_hopper_tile(256, small, 132).cut == "none", "128 tiles of 64 tokens"
    assert choose_hopper_tile(4096, large, 132).rows * choose_hopper_tile(4096, large, 132).tokens == 256 * 128


def test_refusals_have_reasons(layer):
    base = dataclasses.replace(layer(64, 256).problem, device_type="cuda", compute_capability=(9, 0))
    group = dataclasses.replace(base, group_size=64)
    for change, words in (
        ({"compute_capability": (8, 0)}, "warpgroup instructions"),
        ({"compute_capability": (10, 0)}, "warpgroup instructions"),
        ({"weight_bits": 5}, "at most 4 bits"),
        ({"in_features": 250}, "multiple of 16"),
        ({"group_size": 64}, "multiple of 128"),
        ({"device_type": "cpu", "compute_capability": None}, "CUDA"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            w4a8_linear.plan(dataclasses.replace(base, **change), force="gluon")
    plan = w4a8_linear.plan(base)
    assert [plan.implementation(m) for m in (1, 2, 64, 65, 5000)] == [
        "lanes",
        "triton",
        "triton",
        "gluon",
        "gluon",
    ]
    assert w4a8_linear.plan(group).implementation(5000) == "triton"
    assert set(plan.schedule.layouts()) == {"planes"}
    zero = dataclasses.replace(base, activation_zero_point=True)
    assert w4a8_linear.plan(zero).implementation(5000) == "triton"
    half = dataclasses.replace(base, group_size=128)
    assert [w4a8_linear.plan(half).implementation(m) for m in (1, 2, 5000)] == ["lanes", "gluon", "gluon"]
    rows = [row for row in w4a8_linear.plan(half).explain() if row.is_chosen]
    assert all("clamped only where" in row.reason for row in rows)


@pytest.mark.parametrize("clamps", [True, False])
def test_a_plan_explains_whether_products_are_clamped(layer, clamps):
    made = layer(64, 256, group_size=128, clamps=clamps)
    problem = dataclasses.replace(made.problem, device_type="cuda", compute_capability=(9, 0))
    plan = w4a8_linear.plan(problem)
    operand = prepare_layouts(plan.schedule, problem, made.codes, made.scale, made.group_scale)
    reasons = {row.reason for row in plan.explain(operand) if row.is_chosen}
    assert len(reasons) == 1
    assert ("so they are clamped" in reasons.pop()) == clamps
    assert not any("this weight" in row.reason for row in plan.explain())
    per_channel = layer(64, 256)
    problem = dataclasses.replace(per_channel.problem, device_type="cuda", compute_capability=(9, 0))
    plan = w4a8_linear.plan(problem)
    assert (
        plan.explain(prepare_layouts(plan.schedule, problem, per_channel.codes, per_channel.scale, None))
        == plan.explain()
    )


def test_a_layer_of_one_block_compiles_the_kernel_of_longer_layers():
    # with the count of blocks compiled in as 1, Triton 3.6 aborts in the loop over blocks
    assert {"num_blocks", "num_tokens"} <= set(w4a8_hopper_kernel.do_not_specialize)


def work_items(me, num_tiles, num_blocks, schedule):
    """Return the (tile, first block, last block) of one program, by the rules of `share`."""
    programs, whole, sharers = schedule
    units = (num_tiles - whole) * num_blocks
    begin, end = (min((me + more) * units // sharers, units) for more in (0, 1))
    items = [(tile, 0, num_blocks) for tile in range(me, whole, programs)]
    for cut in range(begin // num_blocks, -(-end // num_blocks) if begin < end else 0):
        first, last = max(begin - cut * num_blocks, 0), min(end - cut * num_blocks, num_blocks)
        items.insert(0 if first else len(items), (whole + cut, first, last))
    return items


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("programs", [132, 264])
def test_every_block_is_multiplied_once_and_every_owner_is_served(cut, programs):
    for num_tiles, num_blocks in itertools.product(
        (1, 2, 5, 64, 131, 132, 133, 172, 224, 400, 700), (1, 2, 3, 16, 43)
    ):
        schedule = make_schedule(num_tiles, num_blocks, programs, cut)
        case = (num_tiles, num_blocks, schedule)
        multiplied, leaves, waits = [], [], []
        for me in range(schedule.programs):
            items = work_items(me, num_tiles, num_blocks, schedule)
            assert items, case
            for position, (tile, first, last) in enumerate(items):
                multiplied += [(tile, block) for block in range(first, last)]
                if first > 0:
                    assert position == 0, "what is left to others comes first"
                    leaves.append(me)
                elif last < num_blocks:
                    assert position == len(items) - 1, "what waits for others comes last"
                    units = (num_tiles - schedule.whole) * num_blocks
                    final = ((tile - schedule.whole + 1) * num_blocks * schedule.sharers - 1) // units
                    waits += range(me + 1, final + 1)
        assert len(set(multiplied)) == len(multiplied) == num_tiles * num_blocks, case
        assert waits == leaves, case


def test_cuts():
    assert make_schedule(128, 16, 132, "even") == (132, 0, 132)
    assert make_schedule(64, 16, 132, "aligned") == (128, 0, 128), "two programs for each tile"
    assert make_schedule(172, 16, 132, "aligned") == (132, 132, 120), "a whole wave, then three for each tile"
    assert make_schedule(224, 32, 132, "none") == (132, 224, 1)
    assert make_schedule(5, 3, 132, "even") == (15, 0, 15), "no program without a block"
    assert make_schedule(264, 16, 132, "even") == (132, 264, 1), "whole waves"
