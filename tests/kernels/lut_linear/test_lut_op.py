# SPDX-License-Identifier: Apache-2.0
"""The table linear: definition, implementations against it, errors, operator check."""

import pytest
import torch
from lut_layers import Layer, make_layer
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError
from quattuor.kernels import lut_linear
from quattuor.kernels.lut_linear import LutProblem
from quattuor.kernels.lut_linear.tables import sign_sums

PLANES = [
    {"bits": bits, "group_size": size, "offset": offset}
    for bits in range(1, 9)
    for size, offset in ((32, False), (96, True), (None, True))
]


def run(layer: Layer, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
    plan = lut_linear.plan(layer.problem, force=name)
    return plan.linear(x, plan.prepare(*layer.tensors), bias, torch.float32)


def check_product(layer: Layer, names: tuple[str, ...], num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_tokens, layer.problem.in_features, generator=generator)
    bias = torch.randn(layer.problem.out_features, generator=generator)
    expected = x.double() @ layer.weight.T + bias.double()
    # Sums of K products, planes and single entries in float32: each rounding is at most 2^-24 of the magnitudes.
    size = x.double().abs() @ (layer.weight.abs() + layer.table.double().abs().sum(dim=2).amax(dim=1)[:, None]).T
    bound = 2**-24 * layer.problem.in_features * (size + bias.double().abs())
    for name in names:
        found = run(layer, name, x, bias)
        assert found.shape == expected.shape
        assert ((found - expected).abs() <= bound).all(), name


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("sparse", [False, True])
def test_codebook_and_single_entries(bits: int, group_size: int | None, sparse: bool) -> None:
    layer = make_layer(9, 50, bits=bits, kind="codebook", group_size=group_size, sparse=sparse)
    for num_tokens in (0, 1, 7):
        check_product(layer, ("float32", "reference"), num_tokens)


@pytest.mark.parametrize("options", PLANES, ids=str)
def test_look_up_of_bytes_equals_the_decoded_planes(options: dict[str, object]) -> None:
    layer = make_layer(9, 192, kind="planes", **options)
    for num_tokens in (0, 1, 3):
        check_product(layer, ("tables", "float32", "reference"), num_tokens)


def test_look_up_with_single_entries_and_a_ragged_end() -> None:
    check_product(make_layer(9, 45, kind="planes", bits=3, offset=True, sparse=True), ("tables", "reference"), 3)


def test_sums_of_signs_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]])
    sums = sign_sums(x)
    assert sums.shape == (1, 1, 256)
    # bit i of the index is the sign of x_i, so the sum of powers of two is 2 p - 255
    assert sums[0, 0].tolist() == [2 * pattern - 255 for pattern in range(256)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    layer = make_layer(9, 64, bits=4, kind="codebook", sparse=True)
    x = torch.randn(5, 64).to(dtype)[:, :].T.contiguous().T  # columns first
    plan = lut_linear.plan(layer.problem)
    operand = plan.prepare(*layer.tensors)
    exact = plan.linear(x.float(), operand, out_dtype=torch.float32)
    assert torch.equal(plan.linear(x, operand, out_dtype=dtype), exact.to(dtype))


def test_plan_says_why() -> None:
    cuda = {"device_type": "cuda", "compute_capability": (9, 0)}
    fields = {"out_features": 64, "in_features": 256, "weight_bits": 4, "kind": "codebook"}
    plan = lut_linear.plan(LutProblem(**fields))
    assert plan.implementation(1) == "float32"
    reasons = {row.implementation: row.reason for row in plan.explain()}
    assert "CUDA" in reasons["lanes"]
    assert "planes" in reasons["tables"]
    assert lut_linear.plan(LutProblem(**fields, **cuda), force="lanes").implementation(1) == "lanes"
    with pytest.raises(UnsupportedError, match="more memory than the layer"):
        lut_linear.plan(LutProblem(**fields, **cuda), force="float32")
    with pytest.raises(UnsupportedError, match="multiple of 8, not 12"):
        lut_linear.plan(LutProblem(**fields | {"kind": "planes"}, group_size=12), force="tables")


def test_wrong_problems_are_refused() -> None:
    fields = {"out_features": 8, "in_features": 8, "weight_bits": 4, "kind": "codebook"}
    for match, change in {
        "out_features=0": {"out_features": 0},
        "weight_bits=9": {"weight_bits": 9},
        "kind=grid": {"kind": "grid"},
        "group_size=0": {"group_size": 0},
        "offset=True": {"offset": True},
        "table_dtype": {"table_dtype": torch.float64},
        "output_dtype": {"output_dtype": torch.int8},
    }.items():
        with pytest.raises(InputError, match=match):
            LutProblem(**fields | change)


def test_wrong_arguments_are_refused() -> None:
    layer = make_layer(8, 64, bits=3, kind="planes", offset=True, sparse=True)
    codes, table, offset, (rows, columns, values) = layer.tensors
    plan = lut_linear.plan(layer.problem)
    entries = (rows, columns, values)
    for match, arguments in {
        "codes.dtype": (codes.int(), table, offset, entries),
        "codes.shape": (codes[:4], table, offset, entries),
        "codes=largest": (codes + 8, table, offset, entries),
        "table.shape": (codes, table.repeat(1, 2, 1), offset, entries),
        "table.dtype": (codes, table.float(), offset, entries),
        "table=": (codes, table / 0, offset, entries),
        "offset=None": (codes, table, None, entries),
        "offset.shape": (codes, table, offset[:4], entries),
        "sparse=None": (codes, table, offset, None),
        "row_offsets.dtype": (codes, table, offset, (rows.long(), columns, values)),
        "row_offsets.shape": (codes, table, offset, (rows[1:], columns, values)),
        "columns.dtype": (codes, table, offset, (rows, columns.long(), values)),
        "values.shape": (codes, table, offset, (rows, columns, values[1:])),
        "sparse=": (codes, table, offset, (rows, columns + 32, values)),
    }.items():
        with pytest.raises(InputError, match=match):
            plan.prepare(*arguments)
    with pytest.raises(InputError, match="not compressed rows"):
        plan.prepare(codes, table, offset, (rows.flip(0), columns, values))
    operand = plan.prepare(*layer.tensors)
    x = torch.randn(2, 64)
    for match, arguments in {
        "x.dim": (x[0], operand),
        "x.shape": (x[:, :32], operand),
        "x.dtype": (x.double(), operand),
        "bias.shape": (x, operand, torch.zeros(7)),
        "out_dtype": (x, operand, None, torch.int8),
        "x.device": (x.to("meta"), operand),
        "operand": (x, type(operand)({})),
    }.items():
        with pytest.raises(InputError, match=match):
            plan.linear(*arguments)


def test_framework_operator_check() -> None:
    layer = make_layer(6, 40, bits=3, kind="planes", group_size=8, offset=True, sparse=True)
    plan = lut_linear.plan(layer.problem, force="reference")
    operand = plan.prepare(*layer.tensors).layout("codes")
    arguments = (torch.randn(3, 40), list(operand.values()), ",".join(operand), torch.randn(6))
    results = torch.library.opcheck(
        torch.ops.quattuor.lut_linear, (*arguments, torch.float16, "reference", 6, 3, "planes", 8)
    )
    assert set(results.values()) == {"SUCCESS"}
