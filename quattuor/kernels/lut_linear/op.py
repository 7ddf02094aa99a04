# SPDX-License-Identifier: Apache-2.0
"""The public wrapper: checks every input, chooses the implementation, calls the registered operator."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from quattuor.kernels.dispatch import (
    OUTPUT_DTYPES,
    Implementation,
    Operand,
    Row,
    Schedule,
    check,
    check_tensor,
    choose,
    describe_device,
    is_plain_call,
)
from quattuor.kernels.layer import check_call, prepare_layouts, select
from quattuor.kernels.lut_linear.decoded import Decoded
from quattuor.kernels.lut_linear.lanes import Lanes
from quattuor.kernels.lut_linear.problem import TABLE_DTYPES, LutProblem
from quattuor.kernels.lut_linear.reference import Float32, Reference
from quattuor.kernels.lut_linear.tables import Tables

__all__ = ["IMPLEMENTATIONS", "Plan", "plan"]

PLACE = "lut_linear"

#: Fastest first; the reference supports every legal problem.
IMPLEMENTATIONS: tuple[Implementation, ...] = (Lanes(), Decoded(), Float32(), Tables(), Reference())
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}


@functools.cache
def known_problem(
    shape: tuple[int, int],
    weight_bits: int,
    kind: str,
    group_size: int,
    offset: bool,
    sparse: bool,
    device: torch.device,
) -> LutProblem:
    """Return the problem of a layer that the operator computes; cached, since a call has no time to check it."""
    return LutProblem(
        out_features=shape[0],
        in_features=shape[1],
        weight_bits=weight_bits,
        kind=kind,
        group_size=group_size or None,
        offset=offset,
        sparse=sparse,
        **describe_device(device),
    )


# `custom_op` would infer the schema, but adds several times the latency of a small layer to each call.
torch.library.define(
    "quattuor::lut_linear",
    "(Tensor x, Tensor[] operand, str names, Tensor? bias, ScalarType out_dtype, str implementation, "
    "int out_features, int weight_bits, str kind, int group_size) -> Tensor",
)


@torch.library.impl("quattuor::lut_linear", "CompositeExplicitAutograd")
def lut_linear(
    x: Tensor,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    implementation: str,
    out_features: int,
    weight_bits: int,
    kind: str,
    group_size: int,
) -> Tensor:
    """Compute one linear layer with a named implementation; `Plan.linear` checks the arguments.

    `names` holds the comma-separated names of `operand`; `group_size` is 0 for one table per channel.
    """
    tensors = dict(zip(names.split(","), operand, strict=True))
    problem = known_problem(
        (out_features, x.shape[1]),
        weight_bits,
        kind,
        group_size,
        "offset" in tensors,
        "values" in tensors,
        x.device,
    )
    return BY_NAME[implementation].linear(problem, (x,), tensors, bias, out_dtype)


@torch.library.register_fake("quattuor::lut_linear")
def fake_lut_linear(
    x, operand, names, bias, out_dtype, implementation, out_features, weight_bits, kind, group_size
):
    return x.new_empty((x.shape[0], out_features), dtype=out_dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen implementations of one layer; made by `plan`, once, when the layer is built."""

    problem: LutProblem
    schedule: Schedule

    def explain(self) -> list[Row]:
        """Return a row for each range of token counts and implementation: chosen or not, and why."""
        return list(self.schedule.rows)

    def implementation(self, num_tokens: int) -> str:
        """Return the name of the implementation that computes this number of tokens."""
        return self.schedule.implementation(num_tokens).name

    def prepare(
        self,
        codes: Tensor,
        table: Tensor,
        offset: Tensor | None = None,
        sparse: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Operand:
        """Lay the weight out as the chosen implementations need it.

        Args:
            codes: uint8 [N, K] in [0, 2^b - 1].
            table: [N, G, 2^b] entries of a codebook, or [N, G, b] scales of planes.
            offset: [N, G] for planes, or None.
            sparse: Single entries to add, in compressed rows: int32 [N + 1] offsets, int16 or int32 columns,
                floating-point values; or None.

        Raises:
            InputError: A tensor has the wrong dtype, shape or device, or values outside its range.
        """
        check_weight(self.problem, codes, table, offset, sparse)
        tensors = (codes, table, offset, *(sparse or (None, None, None)))
        return prepare_layouts(self.schedule, self.problem, *tensors)

    def linear(
        self, x: Tensor, operand: Operand, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return y = x @ (W + D).T (+ bias), accumulated in float32.

        Args:
            x: float16, bfloat16 or float32 [M, K]; M may be 0; any strides.
            operand: What `prepare` of this plan returned, or the same tensors on the input's device.
            bias: Floating point [N] or None; added in float32.
            out_dtype: float16, bfloat16 or float32; None for the problem's output dtype.

        Returns:
            [M, N], rounded once from float32.

        Raises:
            InputError: A tensor has the wrong dtype, shape or device.
        """
        problem = self.problem
        out_dtype = problem.output_dtype if out_dtype is None else out_dtype
        check_inputs(problem, x, bias, out_dtype)
        chosen, tensors = select(self.schedule, operand, x, PLACE)
        if is_plain_call(x):
            return chosen.linear(problem, (x,), tensors, bias, out_dtype)
        return torch.ops.quattuor.lut_linear(
            x,
            list(tensors.values()),
            ",".join(tensors),
            bias,
            out_dtype,
            chosen.name,
            problem.out_features,
            problem.weight_bits,
            problem.kind,
            problem.group_size or 0,
        )


def plan(problem: LutProblem, force: str | None = None) -> Plan:
    """Choose implementations for a layer.

    Args:
        problem: What the layer computes.
        force: Name of the one implementation to use, or None to choose.

    Raises:
        InputError: `force` names no implementation.
        UnsupportedError: The forced implementation refuses the problem; the message holds its reason.
    """
    return Plan(problem, choose(PLACE, IMPLEMENTATIONS, problem, force))


def check_weight(
    problem: LutProblem,
    codes: Tensor,
    table: Tensor,
    offset: Tensor | None,
    sparse: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Raise `InputError` unless the weight tensors match the problem in dtype, shape, device and range."""
    place, device = f"{PLACE}.prepare", codes.device
    rows, groups = problem.out_features, problem.num_groups
    check_tensor("codes", codes, (rows, problem.in_features), (torch.uint8,), device, place)
    check(
        int(codes.max()) < 2**problem.weight_bits,
        "codes",
        f"largest {int(codes.max())}",
        f"exceed 0 .. {2**problem.weight_bits - 1}, the range of {problem.weight_bits} bits",
        place,
        "pass the right weight_bits",
    )
    check_tensor("table", table, (rows, groups, problem.table_size), (problem.table_dtype,), device, place)
    check(
        bool(table.isfinite().all()), "table", "NaN or infinite", "is not finite", place, "check how it was made"
    )
    for name, given, wanted in (
        ("offset", offset is not None, problem.offset),
        ("sparse", sparse is not None, problem.sparse),
    ):
        check(
            given == wanted,
            name,
            "given" if given else "None",
            f"does not fit {name}={wanted} of the problem",
            place,
            f"pass {name} exactly when the problem has it",
        )
    if offset is not None:
        check_tensor("offset", offset, (rows, groups), TABLE_DTYPES, device, place)
    if sparse is None:
        return
    row_offsets, columns, values = sparse
    count = columns.numel()
    check_tensor("row_offsets", row_offsets, (rows + 1,), (torch.int32,), device, place)
    check_tensor("columns", columns, (count,), (torch.int16, torch.int32), device, place)
    check_tensor("values", values, (count,), TABLE_DTYPES, device, place)
    is_legal = int(row_offsets[0]) == 0 and int(row_offsets[-1]) == count and bool((row_offsets.diff() >= 0).all())
    if count:
        is_legal = is_legal and int(columns.min()) >= 0 and int(columns.max()) < problem.in_features
    check(
        is_legal,
        "sparse",
        f"{count} entries",
        f"are not compressed rows of a weight [{rows}, {problem.in_features}]",
        place,
        "pass offsets from 0 to the number of entries, and columns inside the weight",
    )


def check_inputs(problem: LutProblem, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    """Raise `InputError` unless the inputs match the problem in dtype, shape and device."""
    place = f"{PLACE}.linear"
    check(x.dim() == 2, "x.dim()", x.dim(), "is not 2", place, "flatten tokens to [M, K]")
    check_tensor("x", x, (x.shape[0], problem.in_features), OUTPUT_DTYPES, x.device, place)
    check_call(problem, "x", x, bias, out_dtype, place)
