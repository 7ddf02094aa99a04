# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the Triton kernels in the interpreter against the reference, one line per case."""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch

from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a16_linear.decode_kernel import launch_decode
from quattuor.kernels.w4a16_linear.planes import Tile, layout_of, prepare_tensors
from quattuor.kernels.w4a16_linear.triton_kernel import launch

#: Every width and group size, with no zero points (signed codes), integer and real ones in turn.
WEIGHTS = [
    (bits, group_size, zero)
    for (bits, group_size), zero in zip(
        itertools.product((2, 3, 4, 8), (32, 64, 128, None)),
        itertools.cycle(("none", "integer", "real")),
        strict=False,
    )
] + [(4, 16, "integer"), (3, 96, "none"), (2, 1024, "integer"), (5, None, "integer"), (6, 64, "none")]


def make_case(bits, group_size, zero, out_features, in_features):
    """Return a problem, codes, scale and zero points."""
    low = -(2 ** (bits - 1)) if zero == "none" else 0
    codes = torch.randint(low, low + 2**bits, (out_features, in_features))
    codes = codes.to(torch.int8 if zero == "none" else torch.uint8)
    groups = 1 if group_size is None else -(-in_features // group_size)
    # scales that float16 holds, and others: both are kept exactly
    scale = torch.randn(out_features, groups)
    scale = scale.half().float() if bits % 2 else scale
    zero_point = {
        "none": None,
        "integer": torch.randint(0, 2**bits, (out_features, groups)).float(),
        "real": torch.rand(out_features, groups) * 2**bits,
    }[zero]
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        zero_point=zero_point is not None,
        activation_bits=16,
    )
    return problem, codes, scale, zero_point


def check_case(case, split, is_half, out_features=70, in_features=600, num_tokens=9):
    """Fail when a kernel is much farther off than the reference."""
    problem, codes, scale, zero_point = make_case(*case, out_features, in_features)
    group_size = case[1]
    x = torch.randn(2 * num_tokens, in_features)[::2]
    x = x.half() if is_half else x
    bias = torch.randn(out_features)
    plan = w4a16_linear.plan(problem, force="reference")
    plain = plan.linear(x, plan.prepare(codes, scale, zero_point), bias, torch.float32)
    group_of_k = torch.arange(in_features) // (group_size or in_features)
    offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
    weight = scale[:, group_of_k].double() * (codes.double() - offset)
    exact = x.double() @ weight.T + bias
    tensors = prepare_tensors(problem, codes, scale, zero_point)
    packed = (tensors["packed"], tensors["scale"], tensors.get("zero_point", tensors.get("offset")))
    kind = {"layout": layout_of(problem), "group_size": group_size, "interpret": True}
    out = torch.full((num_tokens, out_features), torch.nan)
    tile = Tile(rows=64, tokens=16, split=split, num_warps=4, num_stages=2)
    launch(x, *packed, tensors["arrivals"], bias, out, tile=tile, **kind)
    # the kernel subtracts zero points after summing: its terms are up to twice those of the reference
    error, plain_error = (float((result - exact).abs().max()) for result in (out, plain))
    assert error <= 4 * plain_error, (case, error, plain_error)
    assert not tensors["arrivals"].any(), f"{case}: counters are not reset"
    decoded = torch.full((out_features, in_features), torch.nan)
    launch_decode(*packed, decoded, **kind)
    assert (decoded - weight).abs().max() <= 2**-23 * weight.abs().max(), case
    return error, plain_error


def main() -> None:
    """Print a line for each case; fail at the first that is much farther off than the reference."""
    for case, (split, is_half) in zip(
        WEIGHTS, itertools.cycle(((1, True), (2, False), (2, True), (1, True), (1, False))), strict=False
    ):
        print("close", case, split, is_half, *check_case(case, split, is_half))


if __name__ == "__main__":
    main()
