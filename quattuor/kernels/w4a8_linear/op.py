# SPDX-License-Identifier: Apache-2.0
"""The public wrapper: checks every input, chooses the implementation, calls the registered operator."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quattuor.kernels.dispatch import (
    Implementation,
    LinearProblem,
    Operand,
    Row,
    Schedule,
    check,
    choose,
    describe_device,
    is_plain_call,
)
from quattuor.kernels.layer import prepare_layouts, select
from quattuor.kernels.w4a8_linear.checks import PLACE, check_inputs, check_weight
from quattuor.kernels.w4a8_linear.float32 import Float32
from quattuor.kernels.w4a8_linear.gluon import Gluon
from quattuor.kernels.w4a8_linear.lanes import Lanes
from quattuor.kernels.w4a8_linear.planes import group_scale_of
from quattuor.kernels.w4a8_linear.reference import Reference
from quattuor.kernels.w4a8_linear.triton import Triton

__all__ = ["IMPLEMENTATIONS", "Plan", "plan"]

#: Fastest first; the reference supports every legal problem.
IMPLEMENTATIONS: tuple[Implementation, ...] = (Lanes(), Gluon(), Triton(), Float32(), Reference())
#: What `explain` adds for a prepared weight, by the mode of the kernels that need not clamp.
CLAMPING = {
    "half": "; this weight has one, so they are clamped",
    "unclamped": "; this weight has none, so they are not clamped",
}
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}


@functools.cache
def known_problem(
    out_features: int,
    in_features: int,
    weight_bits: int,
    group_size: int,
    integer_group_scale: bool,
    activation_zero_point: bool,
    device: torch.device,
) -> LinearProblem:
    """Return the problem of a layer that the operator computes; cached, since a call has no time to check it."""
    return LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=weight_bits,
        group_size=group_size or None,
        integer_group_scale=integer_group_scale,
        activation_zero_point=activation_zero_point,
        **describe_device(device),
    )


# `custom_op` would infer the schema, but adds several times the latency of a small layer to each call.
torch.library.define(
    "quattuor::w4a8_linear",
    "(Tensor x_codes, Tensor x_scale, Tensor? x_zero_point, Tensor[] operand, str names, Tensor? bias, "
    "ScalarType out_dtype, str implementation, int out_features, int weight_bits, int group_size, "
    "bool integer_group_scale) -> Tensor",
)


@torch.library.impl("quattuor::w4a8_linear", "CompositeExplicitAutograd")
def w4a8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    implementation: str,
    out_features: int,
    weight_bits: int,
    group_size: int,
    integer_group_scale: bool,
) -> Tensor:
    """Compute one linear layer with a named implementation; `Plan.linear` checks the arguments.

    `names` holds the comma-separated names of `operand`; `group_size` is 0 for one scale per channel.
    """
    problem = known_problem(
        out_features,
        x_codes.shape[1],
        weight_bits,
        group_size,
        integer_group_scale,
        x_zero_point is not None,
        x_codes.device,
    )
    tensors = dict(zip(names.split(","), operand, strict=True))
    return BY_NAME[implementation].linear(problem, (x_codes, x_scale, x_zero_point), tensors, bias, out_dtype)


@torch.library.register_fake("quattuor::w4a8_linear")
def fake_w4a8_linear(
    x_codes,
    x_scale,
    x_zero_point,
    operand,
    names,
    bias,
    out_dtype,
    implementation,
    out_features,
    weight_bits,
    group_size,
    integer_group_scale,
):
    return x_codes.new_empty((x_codes.shape[0], out_features), dtype=out_dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen implementations of one layer; made by `plan`, once, when the layer is built."""

    problem: LinearProblem
    schedule: Schedule

    def explain(self, operand: Operand | None = None) -> list[Row]:
        """Return a row for each range of token counts and implementation: chosen or not, and why.

        Args:
            operand: What `prepare` returned; then rows also say whether its products with scales are clamped.
        """
        if operand is None:
            return list(self.schedule.rows)
        remark = CLAMPING.get(group_scale_of(self.problem, operand.layout(Gluon.layout))[0], "")
        return [
            replace(row, reason=row.reason + remark)
            if row.is_chosen and row.implementation in (Gluon.name, Lanes.name)
            else row
            for row in self.schedule.rows
        ]

    def implementation(self, num_tokens: int) -> str:
        """Return the name of the implementation that computes this number of tokens."""
        return self.schedule.implementation(num_tokens).name

    def prepare(self, codes: Tensor, scale: Tensor, group_scale: Tensor | None = None) -> Operand:
        """Lay the weight out as the chosen implementations need it.

        Args:
            codes: int8 [N, K], signed codes in [-2^(b-1), 2^(b-1) - 1].
            scale: float32 [N], per channel; may be negative.
            group_scale: float16 [N, G] when the problem has groups, else None; may be negative unless the
                problem promises integer group scales.

        Raises:
            InputError: A tensor has the wrong dtype, shape or device, or values outside its range.
        """
        check_weight(self.problem, codes, scale, group_scale)
        return prepare_layouts(self.schedule, self.problem, codes, scale, group_scale)

    def linear(
        self,
        x_codes: Tensor,
        x_scale: Tensor,
        operand: Operand,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        x_zero_point: Tensor | None = None,
    ) -> Tensor:
        """Return y[m, n] = float32(sum_k (x_codes[m, k] - z[m]) w8[n, k]) * scale[n] * x_scale[m] (+ bias[n]).

        Args:
            x_codes: int8 [M, K]; M may be 0; any strides.
            x_scale: float32 [M].
            operand: What `prepare` of this plan returned, or the same tensors on the inputs' device.
            bias: Floating point [N] or None; added in float32.
            out_dtype: float16, bfloat16 or float32; None for the problem's output dtype.
            x_zero_point: z, int8 [M], exactly when the problem has `activation_zero_point`.

        Returns:
            [M, N], rounded once from float32.

        Raises:
            InputError: A tensor has the wrong dtype, shape or device.
        """
        problem = self.problem
        out_dtype = problem.output_dtype if out_dtype is None else out_dtype
        check_inputs(problem, x_codes, x_scale, x_zero_point, bias, out_dtype)
        chosen, tensors = select(self.schedule, operand, x_codes, PLACE)
        if is_plain_call(x_codes) and is_plain_call(x_scale):
            return chosen.linear(problem, (x_codes, x_scale, x_zero_point), tensors, bias, out_dtype)
        return torch.ops.quattuor.w4a8_linear(
            x_codes,
            x_scale,
            x_zero_point,
            list(tensors.values()),
            ",".join(tensors),
            bias,
            out_dtype,
            chosen.name,
            problem.out_features,
            problem.weight_bits,
            problem.group_size or 0,
            problem.integer_group_scale,
        )


def plan(problem: LinearProblem, force: str | None = None) -> Plan:
    """Choose implementations for a layer with 8-bit activations.

    Args:
        problem: What the layer computes.
        force: Name of the one implementation to use, or None to choose.

    Raises:
        InputError: The problem has 16-bit activations, or `force` names no implementation.
        UnsupportedError: The forced implementation refuses the problem; the message holds its reason.
    """
    check(
        problem.activation_bits == 8,
        "activation_bits",
        problem.activation_bits,
        "is not 8",
        PLACE,
        "use w4a16_linear",
    )
    return Plan(problem, choose(PLACE, IMPLEMENTATIONS, problem, force))
