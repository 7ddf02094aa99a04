# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the kernels for few tokens in the interpreter against float64, one line per case."""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from interpreted_w4a16 import WEIGHTS, make_case

from quattuor.kernels import w4a16_linear
from quattuor.kernels.w4a16_linear.digits import launch_digits
from quattuor.kernels.w4a16_linear.digits.digits_kernel import digits_of
from quattuor.kernels.w4a16_linear.planes import MIN_BYTES_PLANE, DigitTile, layout_of, prepare_tensors

#: Tokens of the batch and of a tile, parts of K, dtype of the activations.
KINDS = ((1, 2, 1, torch.float16), (3, 4, 2, torch.float32), (5, 2, 1, torch.bfloat16))


def check_case(case, kind, spoils, out_features=40, in_features=600):
    """Fail when the kernel is much farther off than float32, or a token that is not finite spoils another."""
    problem, codes, scale, zero_point = make_case(*case, out_features, in_features)
    num_tokens, tokens, split, dtype = kind
    x = torch.randn(2 * num_tokens, in_features)[::2].to(dtype)
    # digits are measured from the largest element of a token
    x[0, 5:9] *= 2**-12
    bias = torch.randn(out_features)
    plan = w4a16_linear.plan(problem, force="reference")
    plain = plan.linear(x, plan.prepare(codes, scale, zero_point), bias, torch.float32)
    group_of_k = torch.arange(in_features) // (case[1] or in_features)
    offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
    exact = x.double() @ (scale[:, group_of_k].double() * (codes.double() - offset)).T + bias
    tensors = prepare_tensors(problem, codes, scale, zero_point)
    tile = DigitTile(
        rows=64, tokens=tokens, split=split, num_warps=4, num_stages=2, overlap="none", before=0, is_direct=True
    )

    def run(x):
        out = torch.full((num_tokens, out_features), torch.nan)
        zero = tensors.get("zero_point", tensors.get("offset"))
        operand = (tensors["packed"], tensors["scale"], zero, tensors["arrivals"])
        layout = layout_of(problem)
        launch_digits(x, *operand, bias, out, layout=layout, group_size=case[1], tile=tile, interpret=True)
        assert not tensors["arrivals"].any(), f"{case}: counters are not reset"
        return out

    out = run(x)
    error, plain_error = (float((result - exact).abs().max()) for result in (out, plain))
    assert error <= 4 * plain_error, (case, kind, error, plain_error)
    if not spoils:
        return error, plain_error
    x[0, 7] = (torch.inf, -torch.inf, torch.nan)[num_tokens % 3]
    spoilt = run(x)
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], out[1:])
    return error, plain_error


def check_digits(dtype):
    """Fail unless the digits of a token, put together, are its elements to half a unit."""
    x = (torch.randn(3, 700) * torch.tensor([[1e-3], [1.0], [0.0]])).to(dtype)
    found = digits_of(x, 768, 128, overlap="none")
    digit = found.digits.view(3, 4, 768)
    number = sum(digit[:, i].double() * 256**i for i in range(4))
    assert not number[:, 700:].any()
    unit = found.unit.double()[:, None]
    largest = x.double().abs().amax(dim=1, keepdim=True)
    assert (unit[:2] <= largest[:2] * 2.0**-29).all()
    assert ((number[:, :700] * unit - x.double()).abs() <= 0.5000001 * unit).all()
    sums = (found.sums[:, :, 0] + 65536 * found.sums[:, :, 1].double()).T
    assert torch.equal(sums, number.view(3, 6, 128).sum(dim=2))


def main() -> None:
    """Print a line for each case; fail at the first that is wrong."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check_digits(dtype)
        print("digits", dtype)
    cases = [case for case in WEIGHTS if layout_of(make_case(*case, 8, 600)[0]).plane_k >= MIN_BYTES_PLANE]
    for index, (case, kind) in enumerate(zip(cases, itertools.cycle(KINDS), strict=False)):
        print("close", case, kind, *check_case(case, kind, spoils=index % 4 == 0))


if __name__ == "__main__":
    main()
