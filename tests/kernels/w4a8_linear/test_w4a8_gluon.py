# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel without a GPU: its machine code, its tiles, its share of work, its refusals."""

import dataclasses
import re

import pytest

pytest.importorskip("triton.experimental.gluon")

from ahead_of_time import compile_kernel

from quattuor.errors import UnsupportedError
from quattuor.kernels import w4a8_linear
from quattuor.kernels.w4a8_linear.gluon import choose_hopper_tile, working_programs
from quattuor.kernels.w4a8_linear.gluon_kernel import MODES, w4a8_hopper_kernel

LAYOUT = "NVMMASharedLayout(swizzle_byte_width={}, element_bitwidth={}, rank=2)"
GROUP_SCALE = {"integer": ("i8", 8), "half": ("fp16", 16)}


def compile_tile(mode, num_tokens):
    """Compile the kernel as it is launched for a token count."""
    tile = choose_hopper_tile(num_tokens, 28672, mode, 132)
    group_type, group_bits = GROUP_SCALE.get(mode, ("i8", 8))
    signature = {
        "x_desc": f"tensordesc<i8[{tile.tokens}, 128],{LAYOUT.format(128, 8)}>",
        "w_desc": f"tensordesc<i8[128, 128],{LAYOUT.format(128, 8)}>",
        "group_desc": f"tensordesc<{group_type}[1, {tile.rows}],{LAYOUT.format(0, group_bits)}>",
        "out_desc": f"tensordesc<fp16[{tile.tokens}, 64],{LAYOUT.format(128, 16)}>",
        "out": "*fp16",
        "scale": "*fp32",
        "x_scale": "*fp32",
        "bias": "*fp16",
        "partial": "*i32",
        "arrivals": "*i32",
        "num_tokens": "i32",
        "num_rows": "i32",
        "num_blocks": "i32",
    }
    constants = {
        "CONSUMERS": tile.consumers,
        "BLOCKS": tile.blocks,
        "TOKENS": tile.tokens,
        "MODE": MODES[mode].value,
        "GROUP_SIZE": 128,
        "BAND": 8,
        "STAGES": tile.stages,
        "HAS_BIAS": False,
        "BULK_STORE": True,
        "PDL": True,
        "CONSUMER_REGISTERS": tile.registers,
    }
    divisible = ["out", "scale", "x_scale", "bias", "partial", "arrivals", "num_rows"]
    binary = compile_kernel(
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
    return tile, binary


def product_loops(binary):
    """Return the machine code of the product loop of each consumer: from its barrier wait to its release."""
    lines = binary.sass.splitlines()
    products = [i for i, line in enumerate(lines) if "IGMMA" in line]
    half = len(products) // 2
    loops = []
    for first, last in ((products[0], products[half - 1]), (products[half], products[-1])):
        start = max(i for i in range(first) if "SYNCS.PHASECHK" in lines[i])
        stop = min(i for i in range(last, len(lines)) if "SYNCS.ARRIVE" in lines[i])
        loops.append("\n".join(lines[start:stop]))
    return loops


@pytest.mark.parametrize(
    ("mode", "num_tokens"),
    [
        ("channel", 4096),
        ("integer", 128),
        pytest.param("channel", 128, marks=pytest.mark.slow),
        pytest.param("integer", 4096, marks=pytest.mark.slow),
        pytest.param("half", 128, marks=pytest.mark.slow),
        pytest.param("half", 4096, marks=pytest.mark.slow),
    ],
)
def test_machine_code(mode, num_tokens):
    tile, binary = compile_tile(mode, num_tokens)
    products = 2 * tile.blocks * 8  # two consumers, 256 / 32 products for each 64 rows
    assert binary.count("IGMMA") == products
    # one wait for each consumer: more would mean that the compiler serialized the register-operand products
    assert binary.count(r"WARPGROUP\.DEPBAR") == 2
    # weights early and in the loop, activations of two planes, group scales of two planes
    assert binary.count("UTMALDG") == 2 * tile.rows // 128 + (2 if mode == "channel" else 4)
    assert binary.count("UTMASTG") == 2 * tile.blocks
    assert binary.count("STSM") > 0
    assert binary.count("PRMT") <= (500 if mode == "half" else 16)
    assert binary.shared_bytes <= 227 * 1024
    for loop in product_loops(binary):
        assert not re.search(r"\b(STL|LDL)\b", loop), "spills between the products"
        assert loop.count("LDSM.16.M88.4") == 4 * tile.blocks


@pytest.mark.parametrize("mode", list(MODES))
def test_tiles_hold_the_tokens(mode):
    for num_tokens in (1, 8, 9, 16, 17, 33, 64, 65, 128):
        tile = choose_hopper_tile(num_tokens, 28672, mode, 132)
        assert num_tokens <= tile.tokens < max(16, 2 * num_tokens)
        assert tile.rows == 128
    assert choose_hopper_tile(1024, 4096, mode, 132).rows == 128
    assert choose_hopper_tile(128, 4096, mode, 132).tokens == 64  # more tiles, since there are few rows
    assert choose_hopper_tile(4096, 28672, mode, 132).rows == 256


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
    assert [plan.implementation(m) for m in (1, 64, 65, 5000)] == ["triton", "triton", "gluon", "gluon"]
    assert w4a8_linear.plan(group).implementation(5000) == "triton"
    assert set(plan.schedule.layouts()) == {"planes"}
    half = dataclasses.replace(base, group_size=128)
    assert [w4a8_linear.plan(half).implementation(m) for m in (1, 64, 5000)] == ["gluon"] * 3
    zero = dataclasses.replace(base, activation_zero_point=True)
    assert w4a8_linear.plan(zero).implementation(5000) == "triton"


def test_a_layer_of_one_block_compiles_the_kernel_of_longer_layers():
    # with the count of blocks compiled in as 1, Triton 3.6 aborts in the loop over blocks
    assert {"num_blocks", "num_tokens"} <= set(w4a8_hopper_kernel.do_not_specialize)


def left_waiting(num_tiles, num_blocks, programs):
    """Return which program waits for which one that never sets its flag, by the rules of `share` and `consume`."""
    waves = num_tiles // programs
    units = (num_tiles - waves * programs) * num_blocks
    shares = [(me * units // programs, (me + 1) * units // programs) for me in range(programs)]
    signals = {me for me, (begin, end) in enumerate(shares) if begin < end and begin % num_blocks}
    stuck = []
    for me, (begin, end) in enumerate(shares):
        for tile in range(begin // num_blocks, -(-end // num_blocks) if end > begin else 0):
            if max(begin, tile * num_blocks) == tile * num_blocks and end < (tile + 1) * num_blocks:
                final = ((tile + 1) * num_blocks * programs - 1) // units
                stuck += [(me, other) for other in range(me + 1, final + 1) if other not in signals]
    return stuck


def test_no_program_waits_for_one_without_work():
    assert left_waiting(5, 3, 132), "a small layer with a program on each multiprocessor"
    assert left_waiting(400, 20, 132), "2560 tokens of a layer of 5120 by 5120"
    for num_blocks in (1, 2, 3, 16, 20, 54):
        for num_tiles in range(1, 700):
            programs = working_programs(num_tiles, num_blocks, 132)
            assert not left_waiting(num_tiles, num_blocks, programs), (num_tiles, num_blocks)


def test_few_programs_are_lost():
    assert working_programs(400, 20, 132) == 131
    assert working_programs(5, 3, 132) == 15
    assert all(working_programs(num_tiles, 20, 132) >= 126 for num_tiles in range(132, 700))
