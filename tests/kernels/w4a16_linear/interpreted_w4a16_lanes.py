# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the kernels for few tokens in the interpreter against float64, one line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from interpreted_w4a16 import make_case

from quattuor.kernels import w4a16_linear
from quattuor.kernels.w4a16_linear.lanes import launch_lanes
from quattuor.kernels.w4a16_linear.lanes.fields import (
    FACTOR_BITS,
    exponent_of,
    first_part,
    is_high,
    mask_of,
    num_parts,
    part_exponent,
    part_plane,
    part_word,
)
from quattuor.kernels.w4a16_linear.lanes.integers_kernel import integers_of
from quattuor.kernels.w4a16_linear.planes import LaneTile, Layout, layout_of, pack, prepare_tensors

#: Weight, tokens and their dtype, warps, blocks loaded ahead, and K.
CASES = [
    ((4, 128, "none"), 1, torch.float16, 2, 1, 500),
    ((4, None, "real"), 2, torch.float32, 1, 2, 300),
    ((2, 128, "integer"), 3, torch.bfloat16, 1, 1, 500),
    ((3, 64, "real"), 1, torch.float16, 1, 1, 200),
    ((3, None, "integer"), 4, torch.float16, 2, 1, 600),
    ((8, 128, "none"), 1, torch.float16, 1, 1, 200),
]


def check_case(case, num_tokens, dtype, num_warps, depth, in_features, out_features=9):
    """Fail when the kernel is much farther off than float32, or a token that is not finite spoils another."""
    problem, codes, scale, zero_point = make_case(*case, out_features, in_features)
    x = torch.randn(2 * num_tokens, in_features)[::2].to(dtype)
    # integers are measured from the largest element of a token
    x[0, 5:9] *= 2**-12
    bias = torch.randn(out_features)
    plan = w4a16_linear.plan(problem, force="reference")
    plain = plan.linear(x, plan.prepare(codes, scale, zero_point), bias, torch.float32)
    group_of_k = torch.arange(in_features) // (case[1] or in_features)
    offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
    exact = x.double() @ (scale[:, group_of_k].double() * (codes.double() - offset)).T + bias
    tensors = prepare_tensors(problem, codes, scale, zero_point)
    weight = (tensors["packed"], tensors["scale"], tensors.get("zero_point", tensors.get("offset")))
    tile = LaneTile(num_warps=num_warps, depth=depth, holds=True, before=2, overlap="none")

    def run(x):
        out = torch.full((num_tokens, out_features), torch.nan)
        kind = {"layout": layout_of(problem), "group_size": case[1]}
        launch_lanes(x, *weight, bias, out, tile=tile, interpret=True, **kind)
        return out

    out = run(x)
    error, plain_error = (float((result - exact).abs().max()) for result in (out, plain))
    assert error <= 4 * plain_error, (case, error, plain_error)
    if num_tokens == 2:
        x[0, 7] = torch.inf
        spoilt = run(x)
        assert spoilt[0].isnan().all()
        assert torch.equal(spoilt[1:], out[1:])
    return error, plain_error


def parts_of(layout):
    """Yield plane, part and number of the part of everything that a block holds."""
    for plane in range(layout.planes):
        for part in range(int(num_parts(layout.bits, plane))):
            yield plane, part, int(first_part(layout.bits, plane)) + part


def check_fields(bits):
    """Fail unless the parts of every code, in bytes and with their powers of two, add up to the code."""
    layout = Layout(bits, 32)
    codes = torch.randint(2**bits, (128, layout.block_k), dtype=torch.uint8)
    words = pack(codes, layout)[0, 0].int() & 0xFFFF  # word, row, place
    found = torch.zeros(128, layout.planes, 32, dtype=torch.int64)
    for plane, part, number in parts_of(layout):
        word = words[int(part_word(bits, plane, part))]
        byte = word >> 8 if is_high(bits, plane, part) else word & 255
        assert int(part_plane(number, bits)) == plane
        exponent = int(part_exponent(number, bits))
        found[:, plane] += (byte & (int(mask_of(bits, plane, part)) & 255)).long() << exponent
        # the middle of the range is a whole number of units of the part that stands for the plane
        middle = 1 << (bits - 1 + FACTOR_BITS[bits])
        assert middle % (1 << int(exponent_of(plane, bits))) == 0
    assert torch.equal(found.reshape(128, -1), codes.long() << FACTOR_BITS[bits])


def check_integers(bits, num_tokens):
    """Fail unless bytes of integers, put together, are the elements, and their middles the sums."""
    layout = Layout(bits, 32)
    x = torch.randn(num_tokens, 2 * layout.block_k - 9).half()
    found = integers_of(x, 2, layout, pieces=1, overlap="none")
    tiles, lanes = (1, 16) if num_tokens == 1 else (-(-num_tokens // 2), 32)
    words = found.words.view(2, -1, tiles, lanes, 2, 2)
    middles = found.middles.view(2, tiles * lanes // 16, 4)
    padded = torch.nn.functional.pad(x.double(), (0, 9)).view(num_tokens, 2, layout.planes, 4, 2, 4)
    factor = 1 << FACTOR_BITS[bits]
    for token in range(num_tokens):
        own = words[:, :, token // 2, token % 2 * 16 :][:, :, :16].reshape(2, -1, 4, 4, 2, 2)
        # block, pair, byte, t, product, word and place
        digits = (own[..., None] << (24 - 8 * torch.arange(4, dtype=torch.int32)) >> 24).double()
        number = sum(digits[:, :, byte] * 256**byte for byte in range(4)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)
        unit = float(found.unit[token]) * factor
        for plane, _, index in parts_of(layout):
            expected = padded[token, :, plane] / unit
            close = number[:, index] / 2 ** int(part_exponent(index, bits))
            assert (close - expected).abs().max() <= 0.5000001
        total = (middles[:, token].double() * 256.0 ** torch.arange(4)).sum(1)
        expected = padded[token].flatten(1).sum(1) / unit * -(factor << (bits - 1))
        bound = 0.5 * layout.block_k * (factor << (bits - 1))
        assert (total - expected).abs().max() <= bound


def main() -> None:
    """Print a line for each case; fail at the first that is wrong."""
    torch.manual_seed(0)
    for bits in (2, 3, 4, 8):
        check_fields(bits)
        print("fields", bits)
    for bits, num_tokens in ((2, 1), (3, 1), (4, 3), (8, 2)):
        check_integers(bits, num_tokens)
        print("integers", bits, num_tokens)
    for case in CASES:
        print("close", case, *check_case(*case))


if __name__ == "__main__":
    main()
