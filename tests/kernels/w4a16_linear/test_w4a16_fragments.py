# SPDX-License-Identifier: Apache-2.0
"""The kernel for few tokens: emulated against the definition, its machine code, and on a CUDA device."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import compile_kernel
from emulated_fragments import emulate

from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.w4a16_linear import measured, triton
from quattuor.kernels.w4a16_linear.fragments.kernel import fragments_kernel, launch_fragments
from quattuor.kernels.w4a16_linear.fragments.text import BFLOAT, EXACT, RAW, field_position, field_shift, plane_at
from quattuor.kernels.w4a16_linear.planes import FewTile, Layout, Tile, layout_of, prepare_tensors

SMALL = FewTile(fragments=1, num_warps=2, programs=3)


def make(bits, group_size, zero, out_features, in_features, num_tokens, dtype, device="cpu"):
    """Return a problem, its weight, activations, a bias and the exact outputs in float64."""
    low = -(2 ** (bits - 1)) if zero is None else 0
    shape = (out_features, in_features)
    codes = torch.randint(low, low + 2**bits, shape, device=device).to(torch.int8 if zero is None else torch.uint8)
    num_groups = -(-in_features // group_size) if group_size else 1
    scale = torch.rand(out_features, num_groups, device=device) + 0.5
    scale = scale.half().float() if bits != 3 else scale
    zero_point = None if zero is None else torch.rand(out_features, num_groups, device=device) * 2**bits
    zero_point = zero_point.floor() if zero == "integer" else zero_point
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        zero_point=zero is not None,
        activation_bits=16,
        **describe_device(device),
    )
    x = torch.randn(num_tokens, in_features, device=device).to(dtype)
    bias = torch.randn(out_features, device=device)
    group_of_k = torch.arange(in_features, device=device) // (group_size or in_features)
    offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
    exact = x.double() @ (scale[:, group_of_k].double() * (codes.double() - offset)).T + bias.double()
    return problem, (codes, scale, zero_point), x, bias, exact


@pytest.mark.parametrize(
    ("bits", "group_size", "zero", "shape", "num_tokens", "tile", "dtype"),
    [
        (4, 128, None, (64, 1024), 1, SMALL, torch.float16),
        # rows and K that fill no tile, tokens past 8, programs that share tiles
        (4, 128, "integer", (40, 712), 13, SMALL, torch.float16),
        (2, 64, "integer", (64, 1024), 3, FewTile(fragments=2, num_warps=2, programs=9), torch.float16),
        (3, 64, "real", (40, 1024), 1, dataclasses.replace(SMALL, ahead=False), torch.bfloat16),
        (3, 128, None, (32, 1024), 2, FewTile(fragments=2, num_warps=1, programs=64), torch.float16),
        (8, None, "integer", (32, 512), 2, FewTile(fragments=2, num_warps=4, programs=1), torch.float16),
        (2, None, None, (32, 1024), 8, SMALL, torch.bfloat16),
        (4, 32, "real", (32, 512), 2, FewTile(fragments=1, num_warps=1, programs=64), torch.float16),
    ],
)
def test_emulated_kernel_is_close_to_the_definition(bits, group_size, zero, shape, num_tokens, tile, dtype):
    problem, weight, x, bias, exact = make(bits, group_size, zero, *shape, num_tokens, dtype)
    for kind in (BFLOAT,) if dtype == torch.bfloat16 else (RAW, EXACT):
        found = emulate(problem, weight, x, bias, tile, kind).double()
        assert (found - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("kind", [RAW, EXACT, BFLOAT])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_fit_below_the_exponent_and_come_once(bits, kind):
    if bits == 8 and kind == BFLOAT:
        return
    layout = Layout(bits, 32)
    for plane in range(layout.planes):
        position, shift = field_position(bits, plane, kind), field_shift(bits, plane, kind)
        assert position + bits <= (7 if kind == BFLOAT else 10)
        if (bits, plane) != (3, 15):
            assert position + shift == plane % (5 if bits == 3 else 16) * bits
    for length in (1, 2, layout.planes):
        places = [plane_at(bits, length, place, kind) for place in range(layout.planes)]
        assert sorted(places) == list(range(layout.planes))
        assert all(place // length == plane // length for place, plane in enumerate(places))


@pytest.mark.parametrize(
    ("capability", "bits", "group_size", "zero", "fragments", "tokens", "kind", "ahead"),
    [
        (90, 2, 128, 1, 1, 1, RAW, False),
        (80, 4, 128, 1, 2, 1, EXACT, True),
        pytest.param(90, 3, 128, 0, 1, 1, RAW, True, marks=pytest.mark.slow),
        pytest.param(90, 4, 128, 2, 1, 16, BFLOAT, True, marks=pytest.mark.slow),
        pytest.param(90, 8, None, 0, 2, 1, RAW, True, marks=pytest.mark.slow),
    ],
)
def test_machine_code(capability, bits, group_size, zero, fragments, tokens, kind, ahead):
    layout = Layout(bits, 32 if bits == 3 else 64)
    element = "bf16" if kind == BFLOAT else "fp16"
    signature = {
        "x": f"*{element}",
        "packed": "*i16",
        "scale": "*fp16",
        "zero_point": ("*fp16", "*u8", "*fp32")[zero],
        "bias": f"*{element}",
        "out": f"*{element}",
        "partial": "*fp32",
        "arrivals": "*i32",
    } | dict.fromkeys(("M", "N", "K", "stride_xm", "N_PADDED", "NUM_BLOCKS", "NUM_STEPS"), "i32")
    constants = {
        "R": fragments,
        "T": -(-tokens // 8),
        "W": 4,
        "BITS": bits,
        "PLANES": layout.planes,
        "WORDS": layout.words,
        "PLANE_K": layout.plane_k,
        "PIECES": layout.pieces(group_size),
        "GROUP_SIZE": group_size or 0,
        "ZERO": zero,
        "HAS_BIAS": False,
        "IS_SPLIT": True,
        "EVEN_K": True,
        "AHEAD": ahead,
        "KIND": kind,
    }
    divisible = [name for name in signature if name not in ("M", "NUM_BLOCKS", "NUM_STEPS")]
    binary = compile_kernel(
        fragments_kernel, signature, constants, capability=capability, divisible=divisible, num_warps=4
    )
    assert binary.count("STL") == binary.count("LDL") == 0
    # one product for 16 rows by 16 of K and 8 tokens, and one with ones for each of them that shares activations
    runs = layout.block_k // 16 * -(-tokens // 8)
    assert binary.count("HMMA") == runs * (fragments + 1)
    # codes reach operands by one instruction, or by two
    assert binary.count(r"HFMA2") == (0 if kind == RAW else runs // -(-tokens // 8) * fragments * 4)
    # the weight goes to registers; shared memory holds the sums of warps at the end of a tile only
    assert binary.count("LDSM|LDGSTS") == 0
    assert binary.count("LDG.E.NA") == (1 + ahead) * layout.words * layout.plane_k // 32 * 2 * fragments


def test_a_measured_tile_is_used_where_the_kernel_takes_the_call(tmp_path, monkeypatch):
    few = {"fragments": 1, "num_warps": 4, "programs": 528, "ahead": True, "max_registers": 96}
    wide = dataclasses.asdict(Tile(rows=64, tokens=16, split=1, num_warps=4, num_stages=3))
    row = {"n": 256, "k": 512, "bits": 4, "group_size": None}
    choices = [row | {"max_tokens": 8, "tile": few}, row | {"max_tokens": 16, "tile": wide}]
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"compute_capability": [9, 0], "choices": choices}))
    monkeypatch.setattr(measured, "FILE", file)
    measured.table.cache_clear()
    triton.tile_for.cache_clear()
    problem = LinearProblem(
        out_features=256,
        in_features=512,
        weight_bits=4,
        activation_bits=16,
        device_type="cuda",
        compute_capability=(9, 0),
    )
    monkeypatch.setattr(triton, "processors", lambda device: (132, True))
    try:
        x = torch.zeros(3, 512, dtype=torch.float16)
        assert triton.tile_of(problem, x) == FewTile(**few)
        assert triton.tile_of(problem, x.new_zeros(16, 512)) == Tile(**wide)
        assert isinstance(triton.tile_of(problem, x.float()), Tile)
        # rows that do not start at 16 bytes
        assert isinstance(triton.tile_of(problem, torch.zeros(3, 513, dtype=torch.float16)[:, 1:]), Tile)
    finally:
        measured.table.cache_clear()
        triton.tile_for.cache_clear()


def test_refusals_have_reasons():
    x = torch.zeros(4, 512, dtype=torch.float16)
    layout = Layout(4, 64)
    assert SMALL.refuses(x, layout) is None
    assert "tokens" in SMALL.refuses(x.new_zeros(17, 512), layout)
    assert "16 bits" in SMALL.refuses(x.float(), layout)
    assert "mantissa" in SMALL.refuses(x.bfloat16(), Layout(8, 64))
    assert "planes" in SMALL.refuses(x, Layout(4, 16))
    for other in (x[:, :-4], x.T[:4, :4].T, torch.zeros(4, 513, dtype=torch.float16)[:, 1:]):
        assert "multiples of 16 bytes" in SMALL.refuses(other, layout)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("bits", "group_size", "zero"),
    [(4, 128, "integer"), (4, None, "real"), (4, 32, None), (3, 128, None), (2, 64, "integer"), (8, None, None)],
)
@pytest.mark.parametrize("ahead", [True, False])
def test_gpu_kernel(bits, group_size, zero, ahead):
    for dtype, num_tokens, shape in ((torch.float16, 1, (391, 1304)), (torch.bfloat16, 13, (512, 4096))):
        if bits == 8 and dtype == torch.bfloat16:
            continue
        problem, weight, x, bias, exact = make(bits, group_size, zero, *shape, num_tokens, dtype, "cuda")
        operand = prepare_tensors(problem, *weight)
        tensors = (operand["packed"], operand["scale"], operand.get("zero_point", operand.get("offset")))
        tile = FewTile(fragments=1, num_warps=4, programs=37, ahead=ahead)
        for out_dtype, largest in ((torch.float32, 1e-6), (dtype, torch.finfo(dtype).eps)):
            results = []
            for _ in range(2):
                out = torch.empty(num_tokens, shape[0], dtype=out_dtype, device="cuda")
                launch_fragments(
                    x,
                    *tensors,
                    operand["arrivals"],
                    bias,
                    out,
                    layout=layout_of(problem),
                    group_size=group_size,
                    tile=tile,
                )
                results.append(out)
            assert torch.equal(*results)
            assert not operand["arrivals"].any()
            assert (results[0].double() - exact).norm() / exact.norm() < largest
