# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the Triton kernel in the interpreter against the reference, one line per case."""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from lut_layers import make_layer

from quattuor.kernels import lut_linear
from quattuor.kernels.lut_linear.triton import Tile, prepare_tensors
from quattuor.kernels.lut_linear.triton_kernel import launch

CASES = [
    {"kind": "codebook", "bits": 4, "sparse": True},
    {"kind": "codebook", "bits": 3, "sparse": True, "group_size": 64},
    {"kind": "codebook", "bits": 2, "group_size": 32},
    {"kind": "codebook", "bits": 1},
    {"kind": "codebook", "bits": 7, "group_size": 256},
    {"kind": "codebook", "bits": 8},
    {"kind": "planes", "bits": 1},
    {"kind": "planes", "bits": 2, "group_size": 32, "offset": True},
    {"kind": "planes", "bits": 4, "group_size": 96, "offset": True, "sparse": True},
    {"kind": "planes", "bits": 8, "group_size": 128},
    {"kind": "planes", "bits": 3, "offset": True, "table_dtype": torch.float32},
]


def main() -> None:
    """Print a line for each case; fail at the first that is much farther off than the reference."""
    for case, split in zip(CASES, itertools.cycle((1, 2)), strict=False):
        num_tokens, out_features, in_features = 11, 70, 200
        layer = make_layer(out_features, in_features, **case)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2 * num_tokens, in_features, generator=generator)[::2]
        # In half precision the interpreter multiplies exactly and adds in float32 as the tensor cores do.
        x = x.half() if case["bits"] in (2, 4) else x
        bias = torch.randn(out_features, generator=generator)
        plan = lut_linear.plan(layer.problem, force="reference")
        plain = plan.linear(x, plan.prepare(*layer.tensors), bias, torch.float32)
        exact = x.double() @ layer.weight.T + bias.double()
        operand = prepare_tensors(
            layer.problem, layer.codes, layer.table, layer.offset, *(layer.sparse or (None, None, None))
        )
        out = torch.full((num_tokens, out_features), torch.nan)
        tile = Tile(rows=64, tokens=16, split=split, num_warps=4, num_stages=2)
        launch(layer.problem, x, operand, bias, out, tile=tile)
        # Planes are scaled after their sums, whose terms are larger than those of the reference.
        error, plain_error = (float((result - exact).abs().max()) for result in (out, plain))
        assert error <= 8 * plain_error, (case, error, plain_error)
        assert not operand["arrivals"].any(), f"{case}: counters are not reset"
        print("close", case, split, error, plain_error)


if __name__ == "__main__":
    main()
