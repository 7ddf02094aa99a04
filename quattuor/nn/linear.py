# SPDX-License-Identifier: Apache-2.0
"""The module that replaces a linear: packed weight, activation quantizer, kernel plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from quattuor.activations.base import ActivationQuantizer
from quattuor.errors import UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.integer import Integer
from quattuor.formats.packing import packed_row_bytes
from quattuor.formats.two_level import TwoLevelInteger
from quattuor.granularity import Granularity, PerChannel, PerGroup, PerTensor
from quattuor.kernels import w4a8_linear, w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, Operand, Row, describe_device
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["LinearLayout", "ParameterLayout", "QuantizedLinear", "reason_against_execution"]


def reason_against_execution(
    number_format: Format, granularity: Granularity, activations: ActivationQuantizer | None
) -> str | None:
    """Return why no kernel computes a linear with these choices, or None when one does."""
    if activations is None:
        if isinstance(number_format, Integer):
            return None
        return "weights without activation quantization need Integer"
    if isinstance(number_format, TwoLevelInteger) and isinstance(granularity, PerGroup):
        return None
    is_one_scale_per_row = isinstance(granularity, PerChannel | PerTensor)
    if isinstance(number_format, Integer) and number_format.symmetric and is_one_scale_per_row:
        return None
    return "an integer product needs symmetric Integer per channel or tensor, or TwoLevelInteger per group"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterLayout:
    """One stored parameter: its name, its dtype ("float32"), and whether each group has its own."""

    name: str
    dtype: str
    per_group: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayout:
    """Everything about a packed linear but its sizes and its numbers; what a checkpoint's config stores."""

    number_format: Format
    granularity: Granularity
    activations: ActivationQuantizer | None
    parameters: tuple[ParameterLayout, ...]

    @classmethod
    def of(cls, tensor: QuantizedTensor, activations: ActivationQuantizer | None) -> "LinearLayout":
        """Describe a packed weight."""
        num_groups = tensor.granularity.num_groups(tensor.shape[1])
        return cls(
            number_format=tensor.number_format,
            granularity=tensor.granularity,
            activations=activations,
            parameters=tuple(
                ParameterLayout(
                    name=name,
                    dtype=str(value.dtype).removeprefix("torch."),
                    per_group=num_groups > 1 and value.shape[1] == num_groups,
                )
                for name, value in tensor.parameters.items()
            ),
        )

    def empty_state(self, out_features: int, in_features: int, device: torch.device | str) -> dict[str, Tensor]:
        """Return uninitialised tensors of the right shapes and dtypes, as `QuantizedTensor.state` names them."""
        num_groups = self.granularity.num_groups(in_features)
        rows = self.granularity.split(torch.empty(out_features, in_features, device="meta")).shape[0]
        row_bytes = packed_row_bytes(in_features, self.number_format.bits)
        state = {"packed": torch.empty(out_features, row_bytes, dtype=torch.uint8, device=device)}
        for item in self.parameters:
            shape = (rows, num_groups if item.per_group else 1)
            state[item.name] = torch.empty(shape, dtype=getattr(torch, item.dtype), device=device)
        return state


class QuantizedLinear(nn.Module):
    """y = x @ W.T + bias, computed from the packed weight.

    With an activation quantizer x becomes int8 per token and the product is one of integers; without one the
    decoded weight meets x in floating point. The kernels are chosen once per device (`explain` says which and
    why); their own weight layout is made on the first call and is not part of the state.

    Buffers: `packed` and the parameters of the format, as in `QuantizedTensor.state`; `bias` when there is one.
    """

    def __init__(
        self,
        layout: LinearLayout,
        *,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        name: str = "linear",
    ) -> None:
        """Allocate uninitialised buffers; `from_tensor` fills them, or a checkpoint does."""
        super().__init__()
        self.layout = layout
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        for key, tensor in layout.empty_state(out_features, in_features, device).items():
            self.register_buffer(key, tensor)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self.force: str | None = None
        self._plan: w4a8_linear.Plan | w4a16_linear.Plan | None = None
        self._operand: Operand | None = None
        self._prepared_for: tuple[object, ...] | None = None

    @classmethod
    def from_tensor(
        cls,
        tensor: QuantizedTensor,
        bias: Tensor | None,
        activations: ActivationQuantizer | None,
        *,
        dtype: torch.dtype,
        name: str,
    ) -> "QuantizedLinear":
        """Wrap a packed weight; the bias is stored in `dtype`."""
        module = cls(
            LinearLayout.of(tensor, activations),
            in_features=tensor.shape[1],
            out_features=tensor.shape[0],
            bias=bias is not None,
            dtype=dtype,
            device=tensor.packed.device,
            name=name,
        )
        for key, value in tensor.state().items():
            setattr(module, key, value)
        if bias is not None:
            module.bias = bias.detach().to(dtype)
        return module

    @property
    def tensor(self) -> QuantizedTensor:
        """The packed weight, sharing this module's buffers."""
        return QuantizedTensor(
            packed=self.get_buffer("packed"),
            parameters=Parameters(**{item.name: self.get_buffer(item.name) for item in self.layout.parameters}),
            number_format=self.layout.number_format,
            granularity=self.layout.granularity,
            shape=(self.out_features, self.in_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return y in the dtype of x; any number of leading dimensions."""
        plan, operand = self._prepared(x.device, x.dtype)
        rows = x.reshape(-1, self.in_features)
        bias = cast(Tensor | None, self.bias)
        if isinstance(plan, w4a8_linear.Plan):
            assert self.layout.activations is not None, "an integer plan is only made with an activation quantizer"
            codes, scale = self.layout.activations.encode(rows)
            y = plan.linear(codes, scale, operand, bias, x.dtype)
        else:
            y = plan.linear(rows, operand, bias, x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move and cast like any module, but never cast the packed weight: a rounded scale is another weight."""
        stored = {key: self.get_buffer(key) for key in ("packed", *(item.name for item in self.layout.parameters))}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, before in stored.items():
            after = self.get_buffer(key)
            if after.dtype != before.dtype:
                self._buffers[key] = before.to(after.device)
        self._plan, self._operand, self._prepared_for = None, None, None
        return self

    def explain(self) -> list[Row]:
        """Return which kernel computes which token counts on this module's device, and why not the others."""
        packed = self.get_buffer("packed")
        return self._make_plan(packed.device, torch.float32).explain()

    def use_kernel(self, name: str | None) -> None:
        """Force one kernel by name, or choose again with None. Raises UnsupportedError when it cannot run."""
        self.force = name
        self._prepared_for = None
        self._make_plan(self.get_buffer("packed").device, torch.float32)

    def extra_repr(self) -> str:
        """Show sizes, format and granularity."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.layout.number_format}, {self.layout.granularity}, activations={self.layout.activations}"
        )

    def _prepared(
        self, device: torch.device, dtype: torch.dtype
    ) -> tuple[w4a8_linear.Plan | w4a16_linear.Plan, Operand]:
        """Return the plan and its operand, made again when the device, the dtype or the weight changed."""
        packed = self.get_buffer("packed")
        key = (device, dtype, self.force, packed.data_ptr(), packed._version)
        if self._prepared_for != key or self._plan is None or self._operand is None:
            self._plan = self._make_plan(device, dtype)
            self._operand = self._make_operand(self._plan)
            self._prepared_for = key
        return self._plan, self._operand

    def _make_plan(self, device: torch.device, dtype: torch.dtype) -> w4a8_linear.Plan | w4a16_linear.Plan:
        layout, granularity = self.layout, self.layout.granularity
        reason = reason_against_execution(layout.number_format, granularity, layout.activations)
        if reason is not None:
            raise UnsupportedError(
                compose(
                    subject="weights",
                    value=f"{layout.number_format} {granularity}",
                    constraint="have no kernel",
                    place=self.name,
                    remedy=reason,
                )
            )
        names = {item.name: item for item in layout.parameters}
        problem = LinearProblem(
            out_features=self.out_features,
            in_features=self.in_features,
            weight_bits=layout.number_format.bits,
            group_size=granularity.group_size if isinstance(granularity, PerGroup) else None,
            integer_group_scale="group_scale" in names and names["group_scale"].dtype == "int8",
            zero_point="zero_point" in names,
            activation_bits=16 if layout.activations is None else layout.activations.bits,
            output_dtype=dtype,
            **describe_device(device),
        )
        if layout.activations is None:
            return w4a16_linear.plan(problem, self.force)
        return w4a8_linear.plan(problem, self.force)

    def _make_operand(self, plan: w4a8_linear.Plan | w4a16_linear.Plan) -> Operand:
        tensor = self.tensor
        codes, parameters = tensor.codes, tensor.parameters
        if isinstance(plan, w4a16_linear.Plan):
            zero_point = parameters["zero_point"].expand(len(codes), -1) if "zero_point" in parameters else None
            return plan.prepare(codes, parameters["scale"].expand(len(codes), -1), zero_point)
        if isinstance(tensor.number_format, TwoLevelInteger):
            group_scale = parameters["group_scale"].to(torch.float16)
            return plan.prepare(codes, parameters["channel_scale"].squeeze(1).float(), group_scale)
        return plan.prepare(codes, parameters["scale"].expand(len(codes), 1).squeeze(1).float(), None)
