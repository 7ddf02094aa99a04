# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the kernel for one token in the interpreter against the reference, one line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from conftest import make_inputs, make_layer

from quattuor.kernels import w4a8_linear
from quattuor.kernels.w4a8_linear.lanes_kernel import launch_lanes
from quattuor.kernels.w4a8_linear.planes import LanesTile, prepare_planes

#: Tokens, outputs, blocks of K, rows, warps, steps ahead.
CASES = [(1, 70, 5, 16, 4, 2), (1, 352, 4, 32, 4, 1), (3, 65, 6, 8, 8, 3), (2, 80, 1, 16, 8, 2)]


def main() -> None:
    """Print a line for each case; exit with an error at the first that differs."""
    for num_tokens, out_features, num_blocks, rows, num_warps, ahead in CASES:
        made = make_layer(out_features, 256 * num_blocks)
        x_codes, x_scale = make_inputs(num_tokens, 256 * num_blocks)
        bias = torch.randn(out_features, dtype=torch.float16) if num_tokens == 1 else None
        plan = w4a8_linear.plan(made.problem, force="reference")
        expected = plan.linear(x_codes, x_scale, plan.prepare(made.codes, made.scale), bias, torch.float32)
        tensors = prepare_planes(made.problem, made.codes, made.scale, None)
        out = torch.full((num_tokens, out_features), torch.nan)
        tile = LanesTile(rows=rows, num_warps=num_warps, ahead=ahead)
        launch_lanes(x_codes, x_scale, tensors["packed"], tensors["scale"], bias, out, tile=tile, interpret=True)
        assert torch.equal(out, expected), f"{tile}: outputs differ from the reference"
        print("equal", tile)
        if out_features % (2 * num_warps) == 0 and out_features // 2 % (rows // 2) == 0:
            gated = torch.full((num_tokens, out_features // 2), torch.nan)
            launch_lanes(
                x_codes,
                x_scale,
                tensors["packed"],
                tensors["scale"],
                bias,
                gated,
                tile=tile,
                is_gated=True,
                interpret=True,
            )
            gate, up = expected.chunk(2, dim=1)
            torch.testing.assert_close(gated, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=0)
            print("close", tile)


if __name__ == "__main__":
    main()
