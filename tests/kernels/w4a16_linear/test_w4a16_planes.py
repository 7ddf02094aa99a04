# SPDX-License-Identifier: Apache-2.0
"""The word layout of weight-only layers: codes come back, the kernel's tensors say what the layer says."""

import pytest
import torch

from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a16_linear.planes import STORED_BITS, layout_of, pack, prepare_tensors, unpack
from quattuor.kernels.w4a16_linear.reference import decoded_weight, spread


def make(bits, group_size, zero_point, out_features=130, in_features=700):
    """Return a problem, signed or unsigned codes, a scale that float16 does not hold, and zero points."""
    low = 0 if zero_point else -(2 ** (bits - 1))
    codes = torch.randint(low, low + 2**bits, (out_features, in_features))
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        zero_point=zero_point,
        activation_bits=16,
    )
    scale = torch.randn(out_features, problem.num_groups)
    zero = torch.randint(2**bits, scale.shape).float() if zero_point else None
    return problem, codes.to(torch.uint8 if zero_point else torch.int8), scale, zero


@pytest.mark.parametrize("group_size", [None, 16, 32, 64, 96, 128, 512])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_come_back(bits, group_size):
    layout = layout_of(make(bits, group_size, False)[0])
    codes = torch.randint(2**bits, (256, 3 * layout.block_k)).to(torch.uint8)
    packed = pack(codes, layout)
    assert packed.dtype == torch.int16
    assert packed.numel() * 16 == codes.numel() * bits
    assert torch.equal(unpack(packed, layout), codes)


@pytest.mark.parametrize("group_size", [None, 16, 48, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("zero_point", [False, True])
def test_prepared_tensors_decode_to_the_weight(bits, group_size, zero_point):
    problem, codes, scale, zero = make(bits, group_size, zero_point)
    layout = layout_of(problem)
    tensors = prepare_tensors(problem, codes, scale, zero)
    stored = unpack(tensors["packed"], layout).float()
    middle = (
        tensors["zero_point"].float()
        if zero_point
        else torch.full_like(tensors["scale"], 2.0 ** (layout.bits - 1))
    )
    step = group_size or stored.shape[1]
    padded = spread(tensors["scale"].T, step, stored.shape[1]) * (stored - spread(middle.T, step, stored.shape[1]))
    assert torch.equal(padded[:130, :700], decoded_weight(problem, codes, scale, zero))
    assert not padded[130:].any()
    assert not (stored - spread(middle.T, step, stored.shape[1]))[:130, 700:].any() or zero_point


def test_pieces_never_cross_a_group():
    for bits in (2, 3, 4, 8):
        for group_size in (16, 32, 48, 64, 96, 128, 256, 1024):
            layout = layout_of(make(bits, group_size, False)[0])
            length = layout.block_k // layout.pieces(group_size)
            assert length % layout.plane_k == 0
            assert group_size % length == 0, (bits, group_size)


def test_zero_points_that_are_no_small_integers_are_kept_as_float32():
    problem, codes, scale, zero = make(4, 128, True)
    assert "offset" not in prepare_tensors(problem, codes, scale, zero)
    for wrong in (zero + 0.5, zero - 20, zero + 300):
        tensors = prepare_tensors(problem, codes, scale, wrong)
        assert "zero_point" not in tensors
        assert torch.equal(tensors["offset"][:6, :130].T, wrong - 8)


def test_scales_take_float16_only_where_it_is_exact():
    problem, codes, scale, _ = make(4, 128, False)
    assert prepare_tensors(problem, codes, scale, None)["scale"].dtype == torch.float32
    halves = prepare_tensors(problem, codes, scale.half().float(), None)["scale"]
    assert halves.dtype == torch.float16
    assert torch.equal(halves[:6, :130].T.float(), scale.half().float())


def test_explain_says_what_is_stored_and_what_is_decoded():
    fields = {"out_features": 64, "in_features": 256, "activation_bits": 16}
    fields |= {"device_type": "cuda", "compute_capability": (9, 0)}
    rows = w4a16_linear.plan(LinearProblem(**fields, weight_bits=3)).explain()
    chosen = {row.tokens: row.reason for row in rows if row.is_chosen}
    assert "bits of memory" not in chosen["2-16"]
    assert "decoded" not in chosen["65-128"]
    assert "decoded" in chosen["129+"]
    assert STORED_BITS[5] == 8
    wide = w4a16_linear.plan(LinearProblem(**fields, weight_bits=5)).explain()
    assert any("8 bits of memory" in row.reason for row in wide if row.is_chosen)
