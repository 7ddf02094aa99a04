# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the Triton kernel in the interpreter against the reference, one line per case."""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch

from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.planes import Tile
from quattuor.kernels.w4a16_linear.triton import piece_of, prepare_tensors
from quattuor.kernels.w4a16_linear.triton_kernel import launch

WEIGHTS = [
    {"bits": 4, "group_size": None, "unsigned": False},
    {"bits": 4, "group_size": 128, "unsigned": True},
    {"bits": 4, "group_size": 32, "unsigned": True},
    {"bits": 3, "group_size": 96, "unsigned": False},
    {"bits": 2, "group_size": 256, "unsigned": True},
    {"bits": 8, "group_size": 64, "unsigned": True},
    {"bits": 5, "group_size": None, "unsigned": False},
]


def main() -> None:
    """Print a line for each case; fail at the first that is much farther off than the reference."""
    for case, split in zip(WEIGHTS, itertools.cycle((1, 2)), strict=False):
        num_tokens, out_features, in_features = 19, 70, 600
        bits, group_size, unsigned = case["bits"], case["group_size"], case["unsigned"]
        low = 0 if unsigned else -(2 ** (bits - 1))
        codes = torch.randint(low, low + 2**bits, (out_features, in_features))
        codes = codes.to(torch.uint8 if unsigned else torch.int8)
        groups = 1 if group_size is None else -(-in_features // group_size)
        scale = torch.randn(out_features, groups)
        zero_point = torch.rand(out_features, groups) * 2**bits if unsigned else None
        problem = LinearProblem(
            out_features=out_features,
            in_features=in_features,
            weight_bits=bits,
            group_size=group_size,
            zero_point=unsigned,
            activation_bits=16,
        )
        x = torch.randn(2 * num_tokens, in_features)[::2]
        x = x.half() if bits == 4 else x
        bias = torch.randn(out_features)
        plan = w4a16_linear.plan(problem, force="reference")
        plain = plan.linear(x, plan.prepare(codes, scale, zero_point), bias, torch.float32)
        group_of_k = torch.arange(in_features) // (group_size or in_features)
        offset = 0 if zero_point is None else zero_point[:, group_of_k].double()
        weight = scale[:, group_of_k].double() * (codes.double() - offset)
        exact = x.double() @ weight.T + bias
        tensors = prepare_tensors(problem, codes, scale, zero_point)
        out = torch.full((num_tokens, out_features), torch.nan)
        launch(
            x,
            tensors["packed"],
            tensors["scale"],
            tensors.get("zero_point"),
            tensors["arrivals"],
            bias,
            out,
            nibbles=bits <= 4,
            group_size=group_size or 768,
            piece=piece_of(problem),
            tile=Tile(rows=64, tokens=16, split=split, num_warps=4, num_stages=2),
            interpret=True,
        )
        # the kernel subtracts zero points after summing: its terms are up to twice those of the reference
        error, plain_error = ((result - exact).abs().max() for result in (out, plain))
        assert error <= 4 * plain_error, (case, error, plain_error)
        assert not tensors["arrivals"].any(), f"{case}: counters are not reset"
        print("close", case, split, float(error), float(plain_error))


if __name__ == "__main__":
    main()
