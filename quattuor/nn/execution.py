# SPDX-License-Identifier: Apache-2.0
"""Which operation computes a packed linear: one of integers, one of floating point, or the decoded weight."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import quattuor.nn.operators  # noqa: F401  (registers what compiled graphs call)
from quattuor.activations.base import ActivationQuantizer
from quattuor.deltas import ElementDelta
from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.formats.base import Format
from quattuor.formats.bilevel import BilevelInteger
from quattuor.formats.binary import BinaryCoding
from quattuor.formats.codebook import Codebook
from quattuor.formats.integer import Integer
from quattuor.formats.mid_rise import MidRise
from quattuor.formats.two_level import TwoLevelInteger
from quattuor.granularity import Granularity, PerChannel, PerGroup, PerTensor
from quattuor.kernels import lut_linear, w4a8_linear, w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, Operand, Row, describe_device
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["Execution", "IntegerExecution", "Product", "make_execution", "reason_against_execution"]

#: Uniform codes whose zero points are real numbers.
_REAL_ZERO_POINTS = BilevelInteger | MidRise


def reason_against_execution(
    number_format: Format, granularity: Granularity, activations: ActivationQuantizer | None
) -> str | None:
    """Return why no kernel computes a linear with these choices, or None when one does."""
    if activations is None:
        return None
    if isinstance(number_format, TwoLevelInteger) and isinstance(granularity, PerGroup):
        return None
    is_one_scale_per_row = isinstance(granularity, PerChannel | PerTensor)
    if isinstance(number_format, Integer) and number_format.symmetric and is_one_scale_per_row:
        return None
    return "an integer product needs symmetric Integer per channel or tensor, or TwoLevelInteger per group"


class Product(ABC):
    """Computes outputs from tokens."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Return [M, N] for x [M, K]."""

    def traced_linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Return what `linear` does, in few steps for the compiler that traces them."""
        return self.linear(x, bias, out_dtype)


class Execution(Product):
    """Computes x @ (decoded codes).T (+ bias), once `prepared`; maps are the module's, and mostly deltas."""

    @property
    def adds_delta(self) -> bool:
        """Whether the product holds the weight's delta already."""
        return False

    @property
    def reads_stored(self) -> bool:
        """Whether the stored tensors themselves are what is multiplied by."""
        return False

    @abstractmethod
    def prepared(self, tensor: QuantizedTensor) -> "Execution":
        """Return the same choice with the weight laid out for it."""

    @abstractmethod
    def explain(self) -> list[Row]:
        """Return which implementation computes which token counts, and why not the others."""


@dataclass(frozen=True, slots=True)
class IntegerExecution(Execution):
    """Codes of activations times codes of weights.

    Args:
        plan: Which kernel computes which token counts.
        activations: Quantizer of the inputs.
        is_forced: Whether the caller named the kernel.
        operand: The weight, once prepared.
    """

    plan: w4a8_linear.Plan
    activations: ActivationQuantizer
    is_forced: bool = False
    operand: Operand | None = None

    def prepared(self, tensor: QuantizedTensor) -> "IntegerExecution":
        """Lay out codes and scales."""
        codes, parameters = tensor.codes, tensor.parameters
        if isinstance(tensor.number_format, TwoLevelInteger):
            group_scale: Tensor | None = parameters["group_scale"].to(torch.float16)
            scale_N = parameters["channel_scale"].squeeze(1).float()
        else:
            group_scale, scale_N = None, parameters["scale"].expand(len(codes), 1).squeeze(1).float()
        return replace(self, operand=self.plan.prepare(codes, scale_N, group_scale))

    def linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Quantize the rows, multiply integers."""
        assert self.operand is not None, "prepared comes first"
        codes, scale = self.activations.encode(x)
        return self.plan.linear(codes, scale, self.operand, bias, out_dtype)

    def gated(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Quantize the rows, multiply integers, and quantize the second half of each, times silu of the first."""
        assert self.operand is not None, "prepared comes first"
        codes, scale = self.activations.encode(x)
        return w4a8_linear.gated_linear(self.plan, codes, scale, self.operand, bias, out_dtype)

    def traced_linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Quantize the rows, multiply integers in one operator."""
        problem = self.plan.problem
        if self.is_forced or out_dtype != problem.output_dtype:
            return self.linear(x, bias, out_dtype)
        assert self.operand is not None, "prepared comes first"
        codes, scale = self.activations.encode(x)
        y: Tensor = torch.ops.quattuor.packed_w4a8(
            codes,
            scale,
            list(self.operand.entries.values()),
            ",".join(self.operand.entries),
            bias,
            out_dtype,
            problem.out_features,
            problem.weight_bits,
            problem.group_size or 0,
            problem.integer_group_scale,
        )
        return y

    def explain(self) -> list[Row]:
        """Return the plan's table."""
        return self.plan.explain()


@dataclass(frozen=True, slots=True)
class FloatExecution(Execution):
    """Floating-point activations times uniform codes.

    Args:
        plan: Which kernel computes which token counts.
        is_forced: Whether the caller named the kernel.
        operand: The weight, once prepared.
    """

    plan: w4a16_linear.Plan
    is_forced: bool = False
    operand: Operand | None = None

    def prepared(self, tensor: QuantizedTensor) -> "FloatExecution":
        """Lay out codes, scales and zero points; those of two levels or between codes are real numbers."""
        codes, parameters = tensor.codes, tensor.parameters
        if isinstance(tensor.number_format, BilevelInteger):
            parameters = tensor.number_format.resolved(parameters)
        scale = parameters["scale"].expand(len(codes), -1)
        zero_point = parameters["zero_point"].expand(len(codes), -1) if "zero_point" in parameters else None
        if isinstance(tensor.number_format, MidRise):
            zero_point = torch.full_like(scale, -0.5)
        return replace(self, operand=self.plan.prepare(codes, scale, zero_point))

    def linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Multiply in floating point."""
        assert self.operand is not None, "prepared comes first"
        return self.plan.linear(x, self.operand, bias, out_dtype)

    def traced_linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Multiply in floating point in one operator."""
        problem = self.plan.problem
        if self.is_forced or out_dtype != x.dtype or out_dtype != problem.output_dtype:
            return self.linear(x, bias, out_dtype)
        assert self.operand is not None, "prepared comes first"
        y: Tensor = torch.ops.quattuor.packed_w4a16(
            x,
            list(self.operand.entries.values()),
            ",".join(self.operand.entries),
            bias,
            problem.out_features,
            problem.weight_bits,
            problem.group_size or 0,
            problem.zero_point,
        )
        return y

    def explain(self) -> list[Row]:
        """Return the plan's table."""
        return self.plan.explain()


@dataclass(frozen=True, slots=True)
class TableExecution(Execution):
    """Floating-point activations times table entries or signed planes, single entries included."""

    plan: lut_linear.Plan
    operand: Operand | None = None

    @property
    def adds_delta(self) -> bool:
        """Single entries are part of the operation."""
        return self.plan.problem.sparse

    def prepared(self, tensor: QuantizedTensor) -> "TableExecution":
        """Lay out codes, tables and single entries."""
        codes, parameters, delta = tensor.codes, tensor.parameters, tensor.delta
        table = parameters["codebook" if isinstance(tensor.number_format, Codebook) else "alpha"]
        offset = parameters["offset"].expand(len(codes), -1) if "offset" in parameters else None
        sparse = None
        if isinstance(delta, ElementDelta):
            sparse = (delta.row_offsets, delta.columns, delta.values)
        return replace(self, operand=self.plan.prepare(codes, table.expand(len(codes), -1, -1), offset, sparse))

    def linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Multiply in floating point."""
        assert self.operand is not None, "prepared comes first"
        return self.plan.linear(x, self.operand, bias, out_dtype)

    def explain(self) -> list[Row]:
        """Return the plan's table."""
        return self.plan.explain()


@dataclass(frozen=True, slots=True)
class DecodedExecution(Execution):
    """Any format: the weight is decoded, on each call or once.

    Args:
        keeps: Whether the decoded codes stay in memory as float32.
        is_forced: Whether the caller named the implementation.
        tensor: The packed weight, once prepared, when it is decoded on each call.
        weight: Its decoded codes and delta, when they are kept.
    """

    keeps: bool
    is_forced: bool
    tensor: QuantizedTensor | None = None
    weight: Tensor | None = None

    @property
    def adds_delta(self) -> bool:
        """The delta is part of the decoded weight."""
        return True

    @property
    def reads_stored(self) -> bool:
        """The packed weight is decoded on each call, unless that is kept."""
        return not self.keeps

    def prepared(self, tensor: QuantizedTensor) -> "DecodedExecution":
        """Keep the packed weight, and its decoded form if that is the choice."""
        return replace(self, weight=_with_delta(tensor)) if self.keeps else replace(self, tensor=tensor)

    def linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Multiply in float32, round once."""
        weight_NK = self.weight
        if weight_NK is None:
            assert self.tensor is not None, "prepared comes first"
            weight_NK = _with_delta(self.tensor)
        y = x.float() @ weight_NK.T
        return (y if bias is None else y + bias.float()).to(out_dtype)

    def explain(self) -> list[Row]:
        """Return one row per implementation."""
        kept, decoded = "decoded once, 32 bits per weight in memory", "decodes the packed weight on each call"
        if self.keeps:
            decoded = "float32 is forced" if self.is_forced else "ranked after float32"
        else:
            kept = "reference is forced" if self.is_forced else "takes more memory than the original layer"
        return [Row("0+", "float32", self.keeps, kept), Row("0+", "reference", not self.keeps, decoded)]


def _with_delta(tensor: QuantizedTensor) -> Tensor:
    """Return the weight between the maps, [N, K] float32."""
    weight_NK = tensor.decode_codes()
    return weight_NK if tensor.delta is None else weight_NK + tensor.delta.dense(tensor.shape)


def make_execution(
    tensor: QuantizedTensor,
    activations: ActivationQuantizer | None,
    *,
    force: str | None,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> Execution:
    """Choose how a packed linear computes on a device.

    Args:
        tensor: The packed weight; its numbers are not looked at.
        activations: Quantizer of its inputs; None for floating point.
        force: Name of the one implementation to use, or None to choose.
        dtype: Of its inputs and outputs.
        device: Where it runs.
        name: Of the layer, for messages.

    Raises:
        UnsupportedError: Nothing computes these choices, or the forced implementation cannot.
    """
    reason = reason_against_execution(tensor.number_format, tensor.granularity, activations)
    if reason is not None:
        raise UnsupportedError(
            compose(
                subject="weights",
                value=f"{tensor.number_format} {tensor.granularity}",
                constraint="have no kernel",
                place=name,
                remedy=reason,
            )
        )
    if activations is None and isinstance(tensor.number_format, Codebook | BinaryCoding):
        return TableExecution(lut_linear.plan(_table_problem(tensor, dtype, device), force))
    # On a CPU the decoded weight is kept anyway, and one dense product is faster than a second, sparse one.
    is_delta_on_cpu = tensor.delta is not None and device.type == "cpu"
    uniform = Integer if device.type == "cpu" else Integer | _REAL_ZERO_POINTS
    if activations is None and (is_delta_on_cpu or not isinstance(tensor.number_format, uniform)):
        return _decoded(tensor.number_format, force, device, name)
    problem = _problem(tensor, activations, dtype, device)
    if activations is None:
        return FloatExecution(w4a16_linear.plan(problem, force), force is not None)
    return IntegerExecution(w4a8_linear.plan(problem, force), activations, force is not None)


def _table_problem(tensor: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> lut_linear.LutProblem:
    is_codebook = isinstance(tensor.number_format, Codebook)
    return lut_linear.LutProblem(
        out_features=tensor.shape[0],
        in_features=tensor.shape[1],
        weight_bits=tensor.number_format.bits,
        kind="codebook" if is_codebook else "planes",
        group_size=tensor.granularity.group_size if isinstance(tensor.granularity, PerGroup) else None,
        offset="offset" in tensor.parameters,
        sparse=isinstance(tensor.delta, ElementDelta),
        table_dtype=tensor.parameters["codebook" if is_codebook else "alpha"].dtype,
        output_dtype=dtype,
        **describe_device(device),
    )


def _decoded(number_format: Format, force: str | None, device: torch.device, name: str) -> DecodedExecution:
    if force not in (None, "float32", "reference"):
        raise InputError(
            compose(
                subject="force",
                value=force,
                constraint=f"names no implementation for {number_format}",
                place=name,
                remedy='use "float32" or "reference"',
            )
        )
    keeps = force == "float32" or (force is None and device.type == "cpu")
    return DecodedExecution(keeps=keeps, is_forced=force is not None)


def _problem(
    tensor: QuantizedTensor, activations: ActivationQuantizer | None, dtype: torch.dtype, device: torch.device
) -> LinearProblem:
    parameters, granularity = tensor.parameters, tensor.granularity
    return LinearProblem(
        out_features=tensor.shape[0],
        in_features=tensor.shape[1],
        weight_bits=tensor.number_format.bits,
        group_size=granularity.group_size if isinstance(granularity, PerGroup) else None,
        integer_group_scale="group_scale" in parameters and parameters["group_scale"].dtype == torch.int8,
        zero_point="zero_point" in parameters or isinstance(tensor.number_format, _REAL_ZERO_POINTS),
        activation_bits=16 if activations is None else activations.bits,
        output_dtype=dtype,
        **describe_device(device),
    )
