# SPDX-License-Identifier: Apache-2.0
"""A packed weight that is ready to be called: its execution, and the launches that calls have recorded."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quattuor.kernels.dispatch import is_plain_call
from quattuor.kernels.replay import Replays
from quattuor.nn.execution import Product
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["Prepared"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Calls an execution, or replays what an earlier call with as many tokens did.

    Args:
        execution: Prepared with the weight.
        in_features: K.
        out_features: N.
        extras: Holds the delta and the maps beside the codes; None when there are none.
    """

    execution: Product
    in_features: int
    out_features: int
    extras: QuantizedTensor | None = None
    _replays: Replays = field(init=False, repr=False, compare=False, default_factory=Replays)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return y in the dtype of x; any number of leading dimensions."""
        if self.extras is None and is_plain_call(x) and x.shape[-1] == self.in_features:
            y = self._replays.call(self._rows, x, bias, self.out_features)
            if y is not None:
                return y
        return self._rows(x.reshape(-1, self.in_features), bias).view(*x.shape[:-1], self.out_features)

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return what a call does, in few steps for the compiler that traces them."""
        rows = x.reshape(-1, self.in_features)
        if self.extras is None:
            y = self.execution.traced_linear(rows, bias, x.dtype)
        else:
            y = self._with_extras(self.extras, rows, bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _rows(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        if self.extras is None:
            return self.execution.linear(rows, bias, rows.dtype)
        return self._with_extras(self.extras, rows, bias)

    def _with_extras(self, extras: QuantizedTensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """Return y of a weight with a delta or maps, summed in float32 and rounded once."""
        inputs = rows if extras.input_map is None else extras.input_map.apply(rows)
        y = self.execution.linear(inputs, None, torch.float32)
        if extras.delta is not None:
            y = y + extras.delta.matmul(inputs)
        if extras.output_map is not None:
            y = extras.output_map.apply(y)
        return (y if bias is None else y + bias.float()).to(rows.dtype)
