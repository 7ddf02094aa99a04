# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the Triton kernel in the interpreter against the reference, one line per case."""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from conftest import make_inputs, make_layer

from quattuor.kernels import w4a8_linear
from quattuor.kernels.w4a8_linear.narrow import width_of
from quattuor.kernels.w4a8_linear.planes import Tile, mode_of
from quattuor.kernels.w4a8_linear.triton import Triton
from quattuor.kernels.w4a8_linear.triton_kernel import launch

WEIGHTS = [
    {"bits": 4},
    {"bits": 4, "group_size": 128, "integer": True},
    {"bits": 4, "group_size": 32, "integer": True},
    {"bits": 4, "group_size": 128},
    {"bits": 4, "group_size": 100},
    {"bits": 3, "group_size": 64},
    {"bits": 2},
    {"bits": 2},
    {"bits": 3},
    {"bits": 3},
    {"bits": 2, "group_size": 128, "integer": True},
    {"bits": 3, "group_size": 256, "integer": True},
    {"bits": 3, "group_size": 128, "integer": True},
    {"bits": 4, "group_size": 128, "integer": True},
    {"bits": 5},
    {"bits": 8, "group_size": 32},
]


def main() -> None:
    """Print a line for each case; exit with an error at the first that differs."""
    for weight, split, columns in zip(
        WEIGHTS, itertools.cycle((1, 2)), itertools.cycle((128, 128, 64)), strict=False
    ):
        num_tokens, out_features, in_features = 17, 65, 600 if weight["bits"] > 3 else 1500
        made = make_layer(out_features, in_features, activation_zero_point=split == 2, **weight)
        x_codes, x_scale = make_inputs(2 * num_tokens, in_features)
        x_codes, x_scale = x_codes[::2], x_scale[::2].contiguous()
        x_zero_point = torch.arange(-8, 9, dtype=torch.int8) * 15 if split == 2 else None
        bias = torch.randn(out_features, dtype=torch.float16)
        plan = w4a8_linear.plan(made.problem, force="reference")
        operand = plan.prepare(made.codes, made.scale, made.group_scale)
        expected = plan.linear(x_codes, x_scale, operand, bias, torch.float32, x_zero_point)
        tensors = Triton().prepare(made.problem, made.codes, made.scale, made.group_scale)
        out = torch.full((num_tokens, out_features), torch.nan)
        launch(
            x_codes,
            x_scale,
            tensors["packed"],
            tensors["scale"],
            tensors.get("group_scale"),
            tensors["arrivals"],
            bias,
            out,
            mode=mode_of(made.problem),
            width=width_of(made.problem),
            group_words=tensors.get("group_words"),
            group_size=made.problem.group_size,
            tile=Tile(rows=64, tokens=16, split=split, num_warps=4, num_stages=2, columns=columns),
            x_zero_point=x_zero_point,
            weight_sum=tensors.get("weight_sum"),
            interpret=True,
        )
        assert torch.equal(out, expected), f"{weight} split={split}: outputs differ from the reference"
        assert not tensors["arrivals"].any(), f"{weight} split={split}: counters are not reset"
        print("equal", weight, split)


if __name__ == "__main__":
    main()
