# SPDX-License-Identifier: Apache-2.0
"""A packed weight that is ready to be called: its execution, and the launches that calls have recorded."""

from dataclasses import dataclass, field

from torch import Tensor

from quattuor.kernels.dispatch import is_plain_call
from quattuor.kernels.replay import Replays
from quattuor.nn.execution import Execution

__all__ = ["Prepared"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Calls an execution, or replays what an earlier call with as many tokens did.

    Args:
        execution: Prepared with the weight.
        in_features: K.
        out_features: N.
    """

    execution: Execution
    in_features: int
    out_features: int
    _replays: Replays = field(init=False, repr=False, compare=False, default_factory=Replays)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return y in the dtype of x; any number of leading dimensions."""
        if is_plain_call(x) and x.shape[-1] == self.in_features:
            y = self._replays.call(self._rows, x, bias, self.out_features)
            if y is not None:
                return y
        return self._rows(x.reshape(-1, self.in_features), bias).view(*x.shape[:-1], self.out_features)

    def _rows(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return self.execution.linear(rows, bias, rows.dtype)
