# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the kernels of the operation, interpreted, against the reference, one line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch
from lut_layers import Layer, make_layer

from quattuor.kernels import lut_linear
from quattuor.kernels.lut_linear import decode_kernel
from quattuor.kernels.lut_linear.lanes import batch_kernel, token_kernel
from quattuor.kernels.lut_linear.lanes.decode_kernel import decode_rows
from quattuor.kernels.lut_linear.lanes.layout import LARGEST_ENTRY, prepare_lanes
from quattuor.kernels.lut_linear.lanes.token_kernel import Ahead

#: Layer, shape, warps and what is loaded ahead.
TOKEN = [
    ({"kind": "codebook", "bits": 4, "sparse": True}, (9, 200), 1, Ahead()),
    ({"kind": "codebook", "bits": 3, "group_size": 96}, (9, 200), 1, Ahead()),
    ({"kind": "planes", "bits": 2, "group_size": 128, "offset": True}, (9, 900), 2, Ahead(holds=True)),
    (
        {"kind": "planes", "bits": 1, "offset": True, "sparse": True, "table_dtype": torch.float32},
        (20, 264),
        1,
        Ahead(early=True, holds=True),
    ),
]
#: Layer, shape, tokens and their dtype, warps for rows and for blocks.
BATCH = [
    ({"kind": "codebook", "bits": 4, "sparse": True}, (9, 300), 9, torch.float16, 1, 2),
    ({"kind": "codebook", "bits": 3, "group_size": 48}, (9, 200), 3, torch.float16, 1, 1),
    ({"kind": "codebook", "bits": 2}, (9, 100), 17, torch.bfloat16, 1, 1),
    ({"kind": "planes", "bits": 2, "group_size": 128, "offset": True}, (40, 200), 2, torch.bfloat16, 2, 1),
    (
        {"kind": "planes", "bits": 1, "sparse": True, "table_dtype": torch.float32},
        (9, 64),
        9,
        torch.float16,
        1,
        1,
    ),
]
DECODED = [
    {"kind": "codebook", "bits": 4, "group_size": 32, "sparse": True},
    {"kind": "planes", "bits": 2, "group_size": 16, "offset": True},
]
BYTES = [
    {"kind": "codebook", "bits": 6, "group_size": 24, "sparse": True},
    {"kind": "planes", "bits": 2, "group_size": 8, "offset": True, "table_dtype": torch.float32},
]


def operand_of(layer: Layer) -> dict[str, torch.Tensor]:
    """Prepare the layer as the kernels need it."""
    return prepare_lanes(layer.problem, *layer.tensors[:3], *(layer.sparse or (None, None, None)))


def tokens_of(num_tokens: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return every other row of random tokens of different sizes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * num_tokens, in_features, generator=generator)
    return (x * torch.logspace(-1, 1, 2 * num_tokens)[:, None]).to(dtype)[::2]


def check_token(case: dict[str, object], shape: tuple[int, int], num_warps: int, schedule: Ahead) -> None:
    """Compare with float64: as close as the reference, but for what the integers that entries become are off."""
    layer = make_layer(*shape, **case)
    x = tokens_of(1, shape[1], torch.float16)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2))
    plan = lut_linear.plan(layer.problem, force="reference")
    plain = plan.linear(x, plan.prepare(*layer.tensors), bias, torch.float32)
    exact = x.double() @ layer.weight.T + bias.double()
    out = torch.full((1, shape[0]), torch.nan)
    token_kernel.launch(
        layer.problem, x, operand_of(layer), bias, out, num_warps=num_warps, schedule=schedule, interpret=True
    )
    error, plain_error = ((result - exact).abs() for result in (out, plain))
    bound = 4 * plain_error.max()
    if layer.problem.kind == "codebook":
        unit = 1.5 * layer.table.double().abs().amax(dim=2) / LARGEST_ENTRY
        group = torch.arange(shape[1]) // (layer.problem.group_size or shape[1])
        bound = bound + x.double().abs() @ unit[:, group].T
    assert (error <= bound).all(), (case, error.max(), plain_error.max())
    print("close", case, float(error.max()), float(plain_error.max()))


def check_batch(
    case: dict[str, object],
    shape: tuple[int, int],
    num_tokens: int,
    dtype: torch.dtype,
    row_warps: int,
    k_warps: int,
) -> None:
    """Compare with float64: entries are exact, sums of scales are rounded to float16."""
    layer = make_layer(*shape, **case)
    x = tokens_of(num_tokens, shape[1], dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2))
    exact = x.double() @ layer.weight.T
    out = torch.full((num_tokens, shape[0]), torch.nan)
    warps = {"row_warps": row_warps, "k_warps": k_warps}
    batch_kernel.launch(layer.problem, x, operand_of(layer), bias, out, **warps, interpret=True)
    error = (out - bias - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error <= (1e-3 if layer.problem.kind == "planes" else 1e-6)).all(), (case, error)
    print("batch", case, num_tokens, float(error.max()))


def check_not_finite() -> None:
    """A token with an infinite element is not finite anywhere, and its neighbour is."""
    layer = make_layer(16, 256, kind="planes", bits=1, sparse=True)
    x = torch.randn(2, 256).half()
    x[1, 7] = torch.inf
    out = torch.zeros(2, 16)
    batch_kernel.launch(layer.problem, x, operand_of(layer), None, out, row_warps=1, k_warps=1, interpret=True)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()
    token_kernel.launch(layer.problem, x[1:], operand_of(layer), None, out[:1], num_warps=1, interpret=True)
    assert out[0].isnan().all()
    print("not finite")


def check_decoding(case: dict[str, object], is_lanes: bool) -> None:
    """Decode some rows; entries are exact, planes as close as float32 sums are."""
    layer = make_layer(20, 200, **case)
    out = torch.full((4, 200), torch.nan)
    if is_lanes:
        decode_rows(layer.problem, operand_of(layer), 16, out, interpret=True)
    else:
        plan = lut_linear.plan(layer.problem, force="reference")
        decode_kernel.decode_rows(layer.problem, plan.prepare(*layer.tensors).layout("codes"), 16, out)
    error = float((out - layer.weight[16:]).abs().max())
    assert error <= (2e-6 if layer.problem.kind == "planes" else 0.0), (case, error)
    print("decoded", case, error)


def main() -> None:
    """Print a line for each case; fail at the first that is wrong."""
    for case in TOKEN:
        check_token(*case)
    for case in BATCH:
        check_batch(*case)
    check_not_finite()
    for case in DECODED:
        check_decoding(case, True)
    for case in BYTES:
        check_decoding(case, False)


if __name__ == "__main__":
    main()
