# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the kernels in the order of lanes, interpreted, against the reference, one line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from lut_layers import Layer, make_layer

from quattuor.kernels import lut_linear
from quattuor.kernels.lut_linear.lanes.decode_kernel import decode_rows
from quattuor.kernels.lut_linear.lanes.layout import LARGEST_ENTRY, prepare_lanes
from quattuor.kernels.lut_linear.lanes.product_kernel import launch

CASES = [
    ({"kind": "codebook", "bits": 4, "sparse": True}, (9, 200), 1),
    ({"kind": "codebook", "bits": 3, "group_size": 96}, (9, 200), 1),
    ({"kind": "planes", "bits": 2, "group_size": 128, "offset": True}, (9, 200), 1),
    ({"kind": "planes", "bits": 1, "offset": True, "sparse": True, "table_dtype": torch.float32}, (20, 264), 3),
]
DECODED = [
    {"kind": "codebook", "bits": 3, "group_size": 32, "sparse": True},
    {"kind": "codebook", "bits": 4},
    {"kind": "planes", "bits": 2, "group_size": 32, "offset": True},
]


def operand_of(layer: Layer) -> dict[str, torch.Tensor]:
    """Prepare the layer as the kernels need it."""
    return prepare_lanes(layer.problem, *layer.tensors[:3], *(layer.sparse or (None, None, None)))


def check_product(case: dict[str, object], shape: tuple[int, int], num_tokens: int) -> None:
    """Compare with float64: as close as the reference, but for what the integers that entries become are off."""
    out_features, in_features = shape
    layer = make_layer(out_features, in_features, **case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * num_tokens, in_features, generator=generator)[::2].half()
    bias = torch.randn(out_features, generator=generator)
    plan = lut_linear.plan(layer.problem, force="reference")
    plain = plan.linear(x, plan.prepare(*layer.tensors), bias, torch.float32)
    exact = x.double() @ layer.weight.T + bias.double()
    out = torch.full((num_tokens, out_features), torch.nan)
    launch(layer.problem, x, operand_of(layer), bias, out, num_warps=1, interpret=True)
    error, plain_error = ((result - exact).abs() for result in (out, plain))
    bound = 4 * plain_error.max()
    if layer.problem.kind == "codebook":
        unit = 1.5 * layer.table.double().abs().amax(dim=2) / LARGEST_ENTRY
        group = torch.arange(in_features) // (layer.problem.group_size or in_features)
        bound = bound + x.double().abs() @ unit[:, group].T
    assert (error <= bound).all(), (case, error.max(), plain_error.max())
    print("close", case, num_tokens, float(error.max()), float(plain_error.max()))


def check_not_finite() -> None:
    """A token with an infinite element is NaN everywhere, and its neighbour is not."""
    layer = make_layer(16, 256, kind="planes", bits=1)
    x = torch.randn(2, 256).half()
    x[1, 7] = torch.inf
    out = torch.zeros(2, 16)
    launch(layer.problem, x, operand_of(layer), None, out, num_warps=1, interpret=True)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    print("not finite")


def check_decoding(case: dict[str, object]) -> None:
    """Decode some rows; entries are exact, planes as close as float32 sums are."""
    layer = make_layer(20, 200, **case)
    out = torch.full((4, 200), torch.nan)
    decode_rows(layer.problem, operand_of(layer), 16, out, interpret=True)
    error = float((out - layer.weight[16:]).abs().max())
    assert error <= (2e-6 if layer.problem.kind == "planes" else 0.0), (case, error)
    print("decoded", case, error)


def main() -> None:
    """Print a line for each case; fail at the first that is wrong."""
    for case, shape, num_tokens in CASES:
        check_product(case, shape, num_tokens)
    check_not_finite()
    for case in DECODED:
        check_decoding(case)


if __name__ == "__main__":
    main()
