# SPDX-License-Identifier: Apache-2.0
"""The module that replaces a linear: packed weight, activation quantizer, kernel plan."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from quattuor.activations.base import ActivationQuantizer
from quattuor.errors import InputError, UnsupportedError
from quattuor.formats.base import Parameters
from quattuor.kernels.dispatch import Row, is_plain_call
from quattuor.nn.execution import Execution, make_execution
from quattuor.nn.layout import LinearLayout
from quattuor.nn.prepared import Prepared
from quattuor.nn.residence import has_own_memory, host_copies, is_brought, is_present, moved
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["OutputSource", "QuantizedLinear"]


class OutputSource(ABC):
    """What computes the outputs of a linear together with those of others."""

    @abstractmethod
    def output(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """Return what a member gives for tokens, or None when it must compute for itself."""

    @abstractmethod
    def explain(self, device: torch.device) -> list[Row]:
        """Return which kernel computes which token counts, and why not the others."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was prepared, because a member has changed."""

    @abstractmethod
    def dissolve(self) -> None:
        """Let the members compute for themselves from now on."""


class QuantizedLinear(nn.Module):
    """y = x @ W.T + bias, computed from the packed weight.

    y = output_map(codes(input_map(x)) + delta(input_map(x))) + bias

    With an activation quantizer x becomes int8 per token and the product with the codes is one of integers;
    without one the decoded codes meet x in floating point. A delta always does. The kernels are chosen once per
    device (`explain` says which and why); their own weight layout is made on the first call and is not part of the
    state. On a device with memory of its own the stored tensors go to host memory then, where `state_dict` finds
    them, unless `keeps_stored` is set. `torch.compile(fullgraph=True)` traces the call without a break.

    Buffers: `packed`, parameters and extras, as in `QuantizedTensor.state`; `bias` when there is one.
    """

    _prepared: Prepared | None
    _prepared_for: tuple[object, ...] | None

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
        self.keeps_stored = False
        self._home: torch.device | None = None
        self.shared: OutputSource | None = None
        self._forget()

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
        """The packed weight where it is stored, in this module's buffers where its parameters are not packed."""
        return self.layout.read(self._stored(), self.out_features, self.in_features, name=self.name)

    @property
    def device(self) -> torch.device:
        """Where the module runs: where its weight is stored, unless that waits in host memory."""
        return self._home or self.get_buffer("packed").device

    def tensor_on(self, device: torch.device) -> QuantizedTensor:
        """Return the packed weight; what lies in host memory is copied to the device."""
        stored = self._stored().items()
        state = {key: value.to(device) if value.device.type == "cpu" else value for key, value in stored}
        return self.layout.read(state, self.out_features, self.in_features, name=self.name)

    def serves(self, device: torch.device) -> bool:
        """Return whether bias and weight lie on a device, or the weight waits in host memory."""
        bias, places = self._buffers["bias"], (device, torch.device("cpu"))
        is_near = all(tensor.device in places for tensor in self._stored().values())
        return is_near and (bias is None or bias.device == device)

    def release(self, device: torch.device) -> None:
        """Move the stored tensors to host memory: a kernel has laid them out on a device that has its own."""
        self._home = device if has_own_memory(device) else None
        if self._home is not None and not self.keeps_stored and not is_brought(self):
            self._buffers.update(host_copies(self._stored(), device))

    def _stored(self) -> dict[str, Tensor]:
        return {key: self.get_buffer(key) for key in self.layout.tensor_names}

    def forward(self, x: Tensor) -> Tensor:
        """Return y in the dtype of x; any number of leading dimensions."""
        if torch.compiler.is_compiling():
            return self._traced(x)
        if self.shared is not None and is_plain_call(x):
            y = self.shared.output(self, x)
            if y is not None:
                return y
        self._prepare(x.device, x.dtype)
        prepared = self._prepared
        assert prepared is not None, "prepared above"
        y = prepared(x, self._buffers["bias"])  # an attribute of a module takes longer to find
        if self._prepared_for is None:
            self._prepared = None
        return y

    def _traced(self, x: Tensor) -> Tensor:
        """Do what `forward` does, in few steps for the compiler that traces them."""
        self._prepare_while_tracing(x.device, x.dtype)
        assert self._prepared is not None, "prepared above"
        return self._prepared.traced(x, cast(Tensor | None, self.bias))

    def stamp(self) -> tuple[object, ...]:
        """Return what tells whether weight, bias or forced kernel have changed."""
        packed, bias = self._buffers["packed"], self._buffers["bias"]
        assert packed is not None, "a packed weight has codes"
        if bias is None:
            return self.force, packed.data_ptr(), packed._version
        return self.force, packed.data_ptr(), packed._version, bias.data_ptr(), bias._version

    def share(self, product: OutputSource | None) -> None:
        """Take outputs from a product with other linears, or with None compute them alone."""
        self.shared = product
        self._forget()

    def ready(self, device: torch.device, dtype: torch.dtype) -> tuple[Prepared, Tensor | None] | None:
        """Return the weight, laid out, and bias, or None when a delta or a map is beside it."""
        if self.layout.extras:
            return None
        self._prepare(device, dtype)
        assert self._prepared is not None, "prepared above"
        return self._prepared, self._buffers["bias"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move and cast like any module, but never cast the packed weight: a rounded scale is another weight."""
        stored = self._stored()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, before in stored.items():
            after = self.get_buffer(key)
            if after.dtype != before.dtype:
                self._buffers[key] = before.to(after.device)
        if self._home is not None:
            home = moved(self._home, fn)
            self._home = None if home == self.get_buffer("packed").device else home
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        return {**self.__dict__, "_prepared": None, "_prepared_for": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare anew when called, maybe on a machine with other devices."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._home is not None and not is_present(self._home):
            self._home = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load like any module, and lay the weight out again on the next call."""
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def explain(self) -> list[Row]:
        """Return which kernel computes which token counts on this module's device, and why not the others.

        Where the module takes its outputs from a product with others, the rows are those of the product.
        """
        if self.shared is not None and self.force is None:
            return self.shared.explain(self.device)
        return self._make_execution(self.device, torch.float32).explain()

    def use_kernel(self, name: str | None) -> None:
        """Force one kernel by name, or choose again with None.

        Raises:
            InputError, UnsupportedError: No kernel has this name, or it cannot run; the choice stays as it was.
        """
        before, self.force = self.force, name
        try:
            self._make_execution(self.device, torch.float32)
        except (InputError, UnsupportedError):
            self.force = before
            raise
        self._forget()

    def extra_repr(self) -> str:
        """Show sizes, format and granularity."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.layout.number_format}, {self.layout.granularity}, activations={self.layout.activations}"
        )

    def _forget(self) -> None:
        """Drop what `_prepare` made; a compiled graph that holds it is traced again."""
        if self.shared is not None:
            self.shared.forget()
        self._prepared = None
        self._prepared_for = None

    def _prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose the execution and lay the weight out for it, anew when something changed."""
        if self._prepared_for == self._key(device, dtype) and self._prepared is not None:
            return
        tensor = self.tensor_on(device)
        execution = self._make_execution(device, dtype).prepared(tensor)
        if not execution.reads_stored:
            self.release(device)
        extras = None
        if self.layout.extras:
            delta = None if execution.adds_delta else tensor.delta
            extras = replace(tensor, packed=self.get_buffer("packed"), parameters=Parameters(), delta=delta)
        self._prepared = Prepared(execution, self.in_features, self.out_features, extras)
        self._prepared_for = None if is_brought(self) else self._key(device, dtype)

    def _key(self, device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
        """Return what must not have changed for a prepared weight to be this one."""
        packed = self._buffers["packed"]
        assert packed is not None, "a packed weight has codes"
        return device, dtype, self.force, packed.data_ptr(), packed._version

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _prepare_while_tracing(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Run `_prepare` when a graph is traced, not in the graph; what it made is guarded like any attribute.

        A graph holds one weight for each linear. A product of several would be a second copy of them.
        """
        if self.shared is not None:
            self.shared.dissolve()
        self._prepare(device, dtype)
        return True

    def _make_execution(self, device: torch.device, dtype: torch.dtype) -> Execution:
        return make_execution(
            self.tensor, self.layout.activations, force=self.force, dtype=dtype, device=device, name=self.name
        )
