# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the kernels for one token and groups in the interpreter against float64, a line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from interpreted_w4a16 import make_case

from quattuor.kernels import w4a16_linear
from quattuor.kernels.w4a16_linear.lanes.fields import FACTOR_BITS
from quattuor.kernels.w4a16_linear.lanes.sums import MAGIC_BITS
from quattuor.kernels.w4a16_linear.pairs import launch_pairs
from quattuor.kernels.w4a16_linear.pairs.fields import expands, half_of, pair_of, slots
from quattuor.kernels.w4a16_linear.pairs.integers_kernel import integers_of, is_magic, num_steps
from quattuor.kernels.w4a16_linear.planes import Layout, PairTile, layout_of, pack, prepare_tensors

#: Weight, dtype of the token, warps, whether blocks are loaded early, and K.
CASES = [
    ((4, 128, "none"), torch.float16, 2, False, 500),
    ((3, 128, "integer"), torch.float16, 1, True, 1100),
    ((2, 128, "real"), torch.bfloat16, 2, True, 1100),
    ((2, 256, "none"), torch.float32, 1, False, 600),
    ((3, 32, "none"), torch.float16, 1, False, 600),
    ((8, 64, "integer"), torch.float16, 1, True, 300),
]


def check_case(case, dtype, num_warps, is_early, in_features, out_features=9):
    """Fail when the kernel is much farther off than float32, or a token that is not finite is not NaN."""
    problem, codes, scale, zero_point = make_case(*case, out_features, in_features)
    x = torch.randn(1, in_features).to(dtype)
    # integers are measured from the largest element of a token
    x[0, 5:9] *= 2**-12
    bias = torch.randn(out_features)
    plan = w4a16_linear.plan(problem, force="reference")
    plain = plan.linear(x, plan.prepare(codes, scale, zero_point), bias, torch.float32)
    group_of_k = torch.arange(in_features) // case[1]
    offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
    exact = x.double() @ (scale[:, group_of_k].double() * (codes.double() - offset)).T + bias
    tensors = prepare_tensors(problem, codes, scale, zero_point)
    weight = (tensors["packed"], tensors["scale"], tensors.get("zero_point", tensors.get("offset")))
    tile = PairTile(num_warps=num_warps, is_early=is_early, overlap="none")

    def run():
        out = torch.full((1, out_features), torch.nan)
        kind = {"layout": layout_of(problem), "group_size": case[1]}
        launch_pairs(x, *weight, bias, out, tile=tile, interpret=True, **kind)
        return out

    error, plain_error = (float((result - exact).abs().max()) for result in (run(), plain))
    assert error <= 4 * plain_error, (case, error, plain_error)
    if dtype == torch.bfloat16:
        x[0, 7] = torch.inf
        assert run().isnan().all()
    return error, plain_error


def check_fields(bits, pieces):
    """Fail unless the parts of every code, in bytes and with their powers of two, add up to the code."""
    layout = Layout(bits, 32)
    codes = torch.randint(2**bits, (128, layout.block_k), dtype=torch.uint8)
    words = pack(codes, layout)[0, 0].int() & 0xFFFF  # word, row, place
    found = torch.zeros(128, layout.planes, 32, dtype=torch.int64)
    for pair, *parts in slots(bits, layout.planes, pieces):
        for half, part in enumerate(parts):
            if part is None:
                assert bits == 3
                continue
            word, is_high, plane, mask, exponent = part
            found[:, plane] += (words[word] >> 8 * is_high & mask).long() << exponent
            piece = plane * pieces // layout.planes
            assert (pair_of(bits, pieces, piece), half_of(bits, pieces, piece)) == (pair, half)
            # one mask serves both parts where each has a byte of the words to itself
            assert bits == 3 or (is_high == half and mask == parts[0][3])
    assert torch.equal(found.reshape(128, -1), codes.long() << FACTOR_BITS[bits])


def check_integers(bits, pieces):
    """Fail unless bytes of integers, put together, are the elements, and their middles the sums."""
    layout = Layout(bits, 32)
    x = torch.randn(1, 2 * layout.block_k - 9).half()
    found = integers_of(x, 2, layout, pieces=pieces, overlap="none")
    # block, step, half of the columns, byte, t, word
    words = found.words.view(2, num_steps(layout, pieces), 2, 4, 4, 4)
    digits = (words[..., None] << (24 - 8 * torch.arange(4, dtype=torch.int32)) >> 24).double()
    number = sum(digits[:, :, :, byte] * 256**byte for byte in range(4))
    if not expands(bits):  # two words of a product, in which the codes of the other piece meet zeros
        number = number.unflatten(4, (2, 2)).unflatten(6, (2, 2))
        assert not number[:, :, 0, ..., 1].any()
        assert not number[:, :, 1, ..., 0].any()
        number = torch.stack((number[:, :, 0, ..., 0], number[:, :, 1, ..., 1]), dim=2).flatten(5)
    # block, half, product, t, place of K: products of a slot are neighbours
    number = number.permute(0, 2, 1, 4, 3, 5).flatten(2, 3)
    padded = torch.nn.functional.pad(x.double(), (0, 9)).view(2, layout.planes, 4, 2, 4)
    unit = float(found.unit) * (1 << FACTOR_BITS[bits])
    for slot, (_, *parts) in enumerate(slots(bits, layout.planes, pieces)):
        for half, part in enumerate(parts):
            own = number[:, half, 2 * slot : 2 * slot + 2]  # block, product, t, place
            expected = torch.zeros_like(own) if part is None else padded[:, part[2]].transpose(1, 2) / unit
            close = own / 2 ** (0 if part is None else part[4])
            assert (close - expected).abs().max() <= 0.5000001
    start = int(MAGIC_BITS.value) if is_magic(layout, pieces) else 0
    middles = found.middles.view(2, pieces // 2, 2, 2, 2, 2).double() - start
    own, again = middles.unbind(4)
    assert torch.equal(own, again)
    total = (own.flatten(3) * 256.0 ** torch.arange(4)).sum(3)
    of_pieces = padded.reshape(2, pieces, -1).sum(2) / unit * -(1 << (FACTOR_BITS[bits] + bits - 1))
    bound = 0.5 * layout.block_k // pieces * (1 << (FACTOR_BITS[bits] + bits - 1))
    for piece in range(pieces):
        close = total[:, pair_of(bits, pieces, piece), half_of(bits, pieces, piece)]
        assert (close - of_pieces[:, piece]).abs().max() <= bound


def main() -> None:
    """Print a line for each case; fail at the first that is wrong."""
    torch.manual_seed(0)
    for bits, counts in ((2, (2, 4, 8)), (3, (2, 4, 16)), (4, (2, 4)), (8, (2,))):
        for pieces in counts:
            check_fields(bits, pieces)
            print("fields", bits, pieces)
    for case in ((2, 4), (3, 4), (4, 2), (8, 2)):
        check_integers(*case)
        print("integers", *case)
    for case in CASES:
        print("close", case, *check_case(*case))


if __name__ == "__main__":
    main()
