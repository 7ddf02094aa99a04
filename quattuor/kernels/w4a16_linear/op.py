# SPDX-License-Identifier: Apache-2.0
"""The public wrapper: checks every input, chooses the implementation, calls the registered operator."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from quattuor.kernels.dispatch import (
    OUTPUT_DTYPES,
    Implementation,
    LinearProblem,
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
from quattuor.kernels.w4a16_linear.float32 import Float32
from quattuor.kernels.w4a16_linear.gluon import Gluon
from quattuor.kernels.w4a16_linear.reference import Reference
from quattuor.kernels.w4a16_linear.triton import Triton

__all__ = ["IMPLEMENTATIONS", "Plan", "plan"]

PLACE = "w4a16_linear"

#: Fastest first; the reference supports every legal problem.
IMPLEMENTATIONS: tuple[Implementation, ...] = (Gluon(), Triton(), Float32(), Reference())
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}

ZERO_POINT_DTYPES = (torch.int8, torch.uint8, torch.int32, torch.float16, torch.float32)


@functools.cache
def known_problem(
    out_features: int,
    in_features: int,
    weight_bits: int,
    group_size: int,
    zero_point: bool,
    device_type: str,
    compute_capability: tuple[int, int] | None,
) -> LinearProblem:
    """Return the problem of a layer that the operator computes; cached, since a call has no time to check it."""
    return LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=weight_bits,
        group_size=group_size or None,
        zero_point=zero_point,
        activation_bits=16,
        device_type=device_type,
        compute_capability=compute_capability,
    )


# `custom_op` would infer the schema, but adds several times the latency of a small layer to each call.
torch.library.define(
    "quattuor::w4a16_linear",
    "(Tensor x, Tensor[] operand, str names, Tensor? bias, ScalarType out_dtype, str implementation, "
    "int out_features, int weight_bits, int group_size) -> Tensor",
)


@torch.library.impl("quattuor::w4a16_linear", "CompositeExplicitAutograd")
def w4a16_linear(
    x: Tensor,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    implementation: str,
    out_features: int,
    weight_bits: int,
    group_size: int,
) -> Tensor:
    """Compute one linear layer with a named implementation; `Plan.linear` checks the arguments.

    `names` holds the comma-separated names of `operand`; `group_size` is 0 for one scale per channel.
    """
    tensors = dict(zip(names.split(","), operand, strict=True))
    problem = known_problem(
        out_features,
        x.shape[1],
        weight_bits,
        group_size,
        not tensors.keys().isdisjoint(("zero_point", "offset")),
        **describe_device(x.device),
    )
    return BY_NAME[implementation].linear(problem, (x,), tensors, bias, out_dtype)


@torch.library.register_fake("quattuor::w4a16_linear")
def fake_w4a16_linear(x, operand, names, bias, out_dtype, implementation, out_features, weight_bits, group_size):
    return x.new_empty((x.shape[0], out_features), dtype=out_dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen implementations of one layer; made by `plan`, once, when the layer is built."""

    problem: LinearProblem
    schedule: Schedule

    def explain(self) -> list[Row]:
        """Return a row for each range of token counts and implementation: chosen or not, and why."""
        return list(self.schedule.rows)

    def implementation(self, num_tokens: int) -> str:
        """Return the name of the implementation that computes this number of tokens."""
        return self.schedule.implementation(num_tokens).name

    def prepare(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Operand:
        """Lay the weight out as the chosen implementations need it.

        Args:
            codes: [N, K], int8 codes in [-2^(b-1), 2^(b-1) - 1] or uint8 codes in [0, 2^b - 1].
            scale: float32 or float16 [N, G]; G = 1 for one scale per channel.
            zero_point: [N, G], integer or floating point, or None.

        Raises:
            InputError: A tensor has the wrong dtype, shape or device, or values outside its range.
        """
        check_weight(self.problem, codes, scale, zero_point)
        return prepare_layouts(self.schedule, self.problem, codes, scale, zero_point)

    def linear(
        self, x: Tensor, operand: Operand, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return y = x @ W.T (+ bias) with W = scale * (codes - zero_point), accumulated in float32.

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
        return torch.ops.quattuor.w4a16_linear(
            x,
            list(tensors.values()),
            ",".join(tensors),
            bias,
            out_dtype,
            chosen.name,
            problem.out_features,
            problem.weight_bits,
            problem.group_size or 0,
        )


def plan(problem: LinearProblem, force: str | None = None) -> Plan:
    """Choose implementations for a layer with floating-point activations.

    Args:
        problem: What the layer computes.
        force: Name of the one implementation to use, or None to choose.

    Raises:
        InputError: The problem has 8-bit activations, or `force` names no implementation.
        UnsupportedError: The forced implementation refuses the problem; the message holds its reason.
    """
    check(
        problem.activation_bits == 16,
        "activation_bits",
        problem.activation_bits,
        "is not 16",
        PLACE,
        "use w4a8_linear",
    )
    return Plan(problem, choose(PLACE, IMPLEMENTATIONS, problem, force))


def check_weight(problem: LinearProblem, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
    """Raise `InputError` unless the weight tensors match the problem in dtype, shape, device and range."""
    place = f"{PLACE}.prepare"
    device = codes.device
    shape = (problem.out_features, problem.in_features)
    check_tensor("codes", codes, shape, (torch.int8, torch.uint8), device, place)
    shape = (problem.out_features, problem.num_groups)
    check_tensor("scale", scale, shape, (torch.float32, torch.float16), device, place)
    low, high = (int(bound) for bound in codes.aminmax())
    least = -problem.max_code if codes.dtype == torch.int8 else 0
    check(
        least <= low and high < least + 2**problem.weight_bits,
        "codes",
        f"{low} .. {high}",
        f"exceed {least} .. {least + 2**problem.weight_bits - 1}, the range of {problem.weight_bits} bits",
        place,
        "pass int8 for signed or uint8 for unsigned codes, and the right weight_bits",
    )
    check(
        bool(scale.isfinite().all()),
        "scale",
        "NaN or infinite",
        "is not finite",
        place,
        "check how it was made",
    )
    check(
        (zero_point is not None) == problem.zero_point,
        "zero_point",
        "None" if zero_point is None else "a tensor",
        f"does not fit zero_point={problem.zero_point} of the problem",
        place,
        "pass zero points exactly when the problem has them",
    )
    if zero_point is not None:
        check_tensor("zero_point", zero_point, shape, ZERO_POINT_DTYPES, device, place)


def check_inputs(problem: LinearProblem, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    """Raise `InputError` unless the inputs match the problem in dtype, shape and device."""
    place = f"{PLACE}.linear"
    check(x.dim() == 2, "x.dim()", x.dim(), "is not 2", place, "flatten tokens to [M, K]")
    check_tensor("x", x, (x.shape[0], problem.in_features), OUTPUT_DTYPES, x.device, place)
    check_call(problem, "x", x, bias, out_dtype, place)
