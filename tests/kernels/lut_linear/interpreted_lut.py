# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the Triton kernel in the interpreter against the reference, one line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from lut_layers import make_layer

from quattuor.kernels import lut_linear
from quattuor.kernels.lut_linear.decode_kernel import decode_rows
from quattuor.kernels.lut_linear.layout import prepare_tiles
from quattuor.kernels.lut_linear.triton_kernel import launch
from quattuor.kernels.w4a8_linear.planes import Tile

CASES = [
    ({"kind": "codebook", "bits": 4, "sparse": True}, 1, False),
    ({"kind": "codebook", "bits": 3, "sparse": True, "group_size": 32}, 2, False),
    ({"kind": "codebook", "bits": 2}, 2, False),
    ({"kind": "codebook", "bits": 1}, 1, False),
    ({"kind": "planes", "bits": 2, "group_size": 128, "offset": True}, 1, False),
    ({"kind": "planes", "bits": 2, "group_size": 256, "offset": True}, 1, True),
    ({"kind": "planes", "bits": 3, "offset": True, "sparse": True, "table_dtype": torch.float32}, 2, True),
]
DECODED = [
    {"kind": "codebook", "bits": 3, "group_size": 32, "sparse": True},
    {"kind": "codebook", "bits": 4},
    {"kind": "codebook", "bits": 6, "group_size": 64},
    {"kind": "planes", "bits": 2, "group_size": 16, "offset": True},
]


def check_product(case: dict[str, object], split: int, is_masked: bool) -> None:
    """Compare the kernel with float64; it may be a little farther off than the reference."""
    num_tokens, out_features, in_features = 2, 40, 200
    layer = make_layer(out_features, in_features, **case)
    generator = torch.Generator().manual_seed(1)
    # in half precision the interpreter multiplies exactly and adds in float32 as the tensor cores do
    x = torch.randn(2 * num_tokens, in_features, generator=generator)[::2].half()
    bias = torch.randn(out_features, generator=generator)
    plan = lut_linear.plan(layer.problem, force="reference")
    plain = plan.linear(x, plan.prepare(*layer.tensors), bias, torch.float32)
    exact = x.double() @ layer.weight.T + bias.double()
    operand = prepare_tiles(layer.problem, *layer.tensors[:3], *(layer.sparse or (None, None, None)))
    out = torch.full((num_tokens, out_features), torch.nan)
    tile = Tile(rows=64, tokens=8, split=split, num_warps=4, num_stages=2)
    launch(layer.problem, x, operand, bias, out, tile=tile, is_masked=is_masked, interpret=True)
    # planes are scaled after their sums, whose terms are larger than those of the reference
    error, plain_error = (float((result - exact).abs().max()) for result in (out, plain))
    assert error <= 8 * plain_error, (case, error, plain_error)
    assert not operand["arrivals"].any(), f"{case}: counters are not reset"
    print("close", case, split, is_masked, error, plain_error)


def check_decoding(case: dict[str, object]) -> None:
    """Decode some rows; entries are exact, planes as close as float32 sums are."""
    layer = make_layer(70, 200, **case)
    operand = prepare_tiles(layer.problem, *layer.tensors[:3], *(layer.sparse or (None, None, None)))
    out = torch.full((38, 200), torch.nan)
    decode_rows(layer.problem, operand, 32, out, interpret=True)
    error = float((out - layer.weight[32:]).abs().max())
    assert error <= (2e-6 if layer.problem.kind == "planes" else 0.0), (case, error)
    print("decoded", case, error)


def main() -> None:
    """Print a line for each case; fail at the first that is wrong."""
    for case, split, is_masked in CASES:
        check_product(case, split, is_masked)
    for case in DECODED:
        check_decoding(case)


if __name__ == "__main__":
    main()
