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
from quattuor.kernels.w4a8_linear.planes import LanesTile, group_scale_of, prepare_planes

#: Tokens, outputs, blocks of K, rows, warps, steps ahead, and the groups.
CASES = [
    (1, 70, 5, 16, 4, 2, {}),
    (1, 64, 4, 32, 4, 1, {}),
    (3, 17, 6, 8, 8, 3, {}),
    (2, 32, 1, 16, 8, 2, {}),
    (1, 24, 5, 16, 4, 2, {"group_size": 128, "integer": True}),
    (2, 9, 9, 8, 4, 1, {"group_size": 64, "integer": True}),
    (1, 16, 6, 8, 4, 3, {"group_size": 32, "integer": True}),
    (1, 32, 4, 16, 4, 4, {"group_size": 16, "integer": True, "out_dtype": torch.float16}),
    (1, 10, 5, 8, 4, 2, {"group_size": 384, "integer": True}),
    (1, 16, 5, 16, 4, 2, {"group_size": 128}),
    (1, 9, 3, 8, 4, 1, {"group_size": 32, "out_dtype": torch.float16}),
    (1, 16, 5, 8, 4, 2, {"group_size": 64, "clamps": False}),
]
#: Cases that are computed with the largest products too.
EXTREME = (0, 4, 6, 10)


def compare(
    num_tokens: int,
    out_features: int,
    num_blocks: int,
    rows: int,
    num_warps: int,
    ahead: int,
    fields: dict,
    *,
    is_extreme: bool,
) -> None:
    """Compare one layer with the reference; with `is_extreme` all products have the largest magnitude."""
    fields = dict(fields)
    out_dtype = fields.pop("out_dtype", torch.float32)
    made = make_layer(out_features, 256 * num_blocks, **fields)
    x_codes, x_scale = make_inputs(num_tokens, 256 * num_blocks)
    codes, group_scale = made.codes, made.group_scale
    if is_extreme:
        codes, x_codes = torch.full_like(codes, -8), torch.full_like(x_codes, -128)
        group_scale = group_scale if group_scale is None else torch.full_like(group_scale, 16)
    bias = torch.randn(out_features, dtype=torch.float16) if num_tokens == 1 else None
    plan = w4a8_linear.plan(made.problem, force="reference")
    expected = plan.linear(x_codes, x_scale, plan.prepare(codes, made.scale, group_scale), bias, out_dtype)
    tensors = prepare_planes(made.problem, codes, made.scale, group_scale)
    arguments = (x_codes, x_scale, tensors["packed"], tensors["scale"], bias)
    tile = LanesTile(rows=rows, num_warps=num_warps, ahead=ahead)
    mode = group_scale_of(made.problem, tensors)[0]
    options = {"tile": tile, "mode": mode, "lane_scales": tensors.get("lane_scales"), "interpret": True}
    out = torch.full((num_tokens, out_features), torch.nan, dtype=out_dtype)
    launch_lanes(*arguments, out, **options)
    assert torch.equal(out, expected), f"{mode} {tile}: outputs differ from the reference"
    print("equal", mode, made.problem.group_size, tile)
    if not is_extreme and out_features % (2 * num_warps) == 0 and out_features // 2 % (rows // 2) == 0:
        gated = torch.full((num_tokens, out_features // 2), torch.nan, dtype=out_dtype)
        launch_lanes(*arguments, gated, **options, is_gated=True)
        gate, up = expected.chunk(2, dim=1)
        product = (torch.nn.functional.silu(gate.float()).to(out_dtype) * up).to(out_dtype)
        step = torch.finfo(out_dtype).eps
        torch.testing.assert_close(gated, product, rtol=max(1e-5, 2 * step), atol=0)
        print("close", mode, tile)


def main() -> None:
    """Print a line for each comparison; exit with an error at the first that differs."""
    for index, (*sizes, fields) in enumerate(CASES):
        compare(*sizes, fields, is_extreme=False)
        if index in EXTREME:
            compare(*sizes, fields, is_extreme=True)


if __name__ == "__main__":
    main()
