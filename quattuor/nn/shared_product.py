# SPDX-License-Identifier: Apache-2.0
"""Packed linears that read one activation: quantized once, multiplied at once by the weights of all.

The modules, their state and their outputs stay as they are. The first of them to be called computes all outputs,
and each later one takes its own while the tokens are the same object, unchanged.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quattuor.formats.base import Parameters
from quattuor.granularity import PerChannel, PerGroup
from quattuor.kernels.dispatch import Row
from quattuor.nn.execution import make_execution
from quattuor.nn.linear import OutputSource, QuantizedLinear
from quattuor.nn.prepared import Prepared
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["SharedProduct", "reason_against_sharing"]

#: Sets of outputs that may go to waste before the members compute for themselves again.
MOST_WASTED = 16


def reason_against_sharing(members: Sequence[QuantizedLinear]) -> str | None:
    """Return why linears are not computed by one product, or None when that changes no bit of their outputs."""
    first = members[0]
    if len(members) < 2:
        return "there is only one linear"
    if any(member.in_features != first.in_features for member in members):
        return "the numbers of input features differ"
    if any(member.layout != first.layout for member in members):
        return "formats, granularities or activation quantizers differ"
    if any((member.bias is None) != (first.bias is None) for member in members):
        return "some have a bias and some have none"
    layout = first.layout
    if layout.activations is None:
        return "sums of floating-point products depend on how a layer is cut"
    if layout.extras:
        return "a delta or an online map belongs to the whole weight"
    if not isinstance(layout.granularity, PerChannel | PerGroup) or any(
        item.row_group != 1 for item in layout.parameters
    ):
        return "rows share parameters"
    scales = {item.name: item.dtype for item in layout.parameters}
    if scales.get("group_scale", "int8") != "int8":
        return "sums with floating-point group scales depend on how a layer is cut"
    return None


class _Outputs:
    """The outputs of one call: for which tokens they are, and those that no member has taken yet."""

    __slots__ = ("parts", "tokens", "when")

    def __init__(self, tokens: Any, when: tuple[object, ...], parts: list[Tensor | None]) -> None:
        self.tokens, self.when, self.parts = tokens, when, parts


class SharedProduct(OutputSource):
    """One product for several packed linears; copies and pickles of it hold the members alone.

    Args:
        members: Linears for which `reason_against_sharing` is None, in the order of their rows.
    """

    def __init__(self, members: Sequence[QuantizedLinear]) -> None:
        """Join the members."""
        assert reason_against_sharing(members) is None, "checked by the caller"
        self.members = tuple(members)
        self._places = {id(member): place for place, member in enumerate(self.members)}
        self.forget()
        for member in members:
            member.share(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Prepare anew when called."""
        self.members = state["members"]
        self._places = {id(member): place for place, member in enumerate(self.members)}
        self.forget()

    def forget(self) -> None:
        """Drop what was prepared, because a member has changed."""
        self._prepared: tuple[Prepared, Tensor | None] | None = None
        self._prepared_for: tuple[object, ...] | None = None
        self._outputs: _Outputs | None = None
        self._num_wasted = 0

    def dissolve(self) -> None:
        """Let the members compute for themselves from now on."""
        self.forget()
        for member in self.members:
            member.share(None)

    def output(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """Return what a member gives for tokens, or None when it must compute for itself."""
        place = self._places.get(id(member))
        if place is None:  # a shallow copy, such as one of each device in a data-parallel model
            return None
        outputs, when = self._outputs, _moment(x)
        if outputs is not None and outputs.tokens() is x and outputs.when == when:
            part = outputs.parts[place]
            if part is not None:
                outputs.parts[place] = None
                if not any(other is not None for other in outputs.parts):
                    self._outputs = None
                return part
        y = self._compute(x)
        if y is None:
            return None
        parts: list[Tensor | None] = list(y.split([other.out_features for other in self.members], dim=-1))
        part, parts[place] = parts[place], None
        if self._outputs is not None:
            self._waste()
        if any(other.shared is self for other in self.members):
            self._outputs = _Outputs(weakref.ref(x, self._drop), when, parts)
        return part

    def _drop(self, tokens: Any) -> None:
        """Release outputs whose tokens are gone."""
        if self._outputs is not None and self._outputs.tokens is tokens:
            self._waste()

    def _waste(self) -> None:
        self._outputs = None
        self._num_wasted += 1
        if self._num_wasted > MOST_WASTED:
            self.dissolve()

    def _compute(self, x: Tensor) -> Tensor | None:
        """Return the outputs of all members side by side."""
        ready = self.ready(x.device, x.dtype)
        return None if ready is None else ready[0](x, ready[1])

    def ready(self, device: torch.device, dtype: torch.dtype) -> tuple[Prepared, Tensor | None] | None:
        """Return the joined weight, laid out, and bias, or None where the members must compute for themselves."""
        ready = self._prepared  # another thread may prepare anew
        if self._prepared_for != self._key(device, dtype):
            self._prepared = ready = self._prepare(device, dtype)
            self._prepared_for = self._key(device, dtype)
        return ready

    def _key(self, device: torch.device, dtype: torch.dtype) -> tuple[object, ...]:
        return device, dtype, *[member.stamp() for member in self.members]

    def _prepare(self, device: torch.device, dtype: torch.dtype) -> tuple[Prepared, Tensor | None] | None:
        """Return the joined weight, laid out, and bias; None where members are forced or elsewhere."""
        if any(member.force is not None for member in self.members):
            return None
        if any(not member.serves(device) for member in self.members):
            return None
        tensor = self._tensor_on(device)
        execution = make_execution(
            tensor,
            self.members[0].layout.activations,
            force=None,
            dtype=dtype,
            device=device,
            name=self.name,
        )
        biases = [bias for member in self.members if (bias := member._buffers["bias"]) is not None]
        prepared = Prepared(execution.prepared(tensor), tensor.shape[1], tensor.shape[0])
        for member in self.members:
            member.release(device)
        return prepared, torch.cat(biases) if biases else None

    @property
    def name(self) -> str:
        """Names of the members."""
        return ", ".join(member.name for member in self.members)

    def _tensor_on(self, device: torch.device) -> QuantizedTensor:
        """Return the joined weight, in memory of its own."""
        tensors = [member.tensor_on(device) for member in self.members]
        first = tensors[0]
        return QuantizedTensor(
            packed=torch.cat([tensor.packed for tensor in tensors]),
            parameters=Parameters(
                **{name: torch.cat([tensor.parameters[name] for tensor in tensors]) for name in first.parameters}
            ),
            number_format=first.number_format,
            granularity=first.granularity,
            shape=(sum(tensor.shape[0] for tensor in tensors), first.shape[1]),
        )

    def explain(self, device: torch.device) -> list[Row]:
        """Return which kernel computes the product."""
        layout, in_features = self.members[0].layout, self.members[0].in_features
        rows = sum(member.out_features for member in self.members)
        tensor = layout.read(layout.empty_state(rows, in_features, "meta"), rows, in_features, name=self.name)
        return make_execution(
            tensor, layout.activations, force=None, dtype=torch.float32, device=device, name=self.name
        ).explain()


def _moment(x: Tensor) -> tuple[object, ...]:
    """Return what must not have changed for an output to be that of the same tokens, computed where it is used."""
    version = None if x.is_inference() else x._version
    if not x.is_cuda:
        return (version,)
    return version, torch._C._cuda_getCurrentRawStream(x.get_device()), torch.cuda.is_current_stream_capturing()
