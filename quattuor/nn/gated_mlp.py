# SPDX-License-Identifier: Apache-2.0
"""Feed-forward modules of packed linears: the gate is computed where the inputs of `down` are quantized.

    y = down(silu(gate(x)) * up(x))

With gate and up computed by one product, what `down` reads need not be written: one kernel gates and quantizes it,
and the launches of the whole module are recorded as one. The modules, their state and their outputs stay as they
are, bit for bit; calls that anything watches or changes take the module's own path.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from quattuor.activations import DynamicQuantizer
from quattuor.kernels.dispatch import is_plain_call
from quattuor.kernels.token_quantize import silu_mul_quantize
from quattuor.models import DESCRIPTIONS
from quattuor.models.description import Mlp
from quattuor.nn.execution import IntegerExecution, Product
from quattuor.nn.linear import QuantizedLinear
from quattuor.nn.prepared import Prepared
from quattuor.nn.shared_product import SharedProduct

__all__ = ["GatedMlp", "join_gates"]

_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class GatedMlp(nn.Module):
    """Comes before the class of a feed-forward module in a class made of both; see `join_gates`."""

    _gated: "_Gated"
    _original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return y from two products, or as the module's own class does."""
        if len(args) == 1 and not kwargs and is_plain_call(args[0]):
            y = self._gated.output(self._modules, args[0])
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Name the original class: the one made of both cannot be imported."""
        return _rebuild, (type(self)._original,), self.__dict__


_classes: dict[type[nn.Module], type[GatedMlp]] = {}


def _class_of_both(original: type[nn.Module]) -> type[GatedMlp]:
    if original not in _classes:
        fields = {"__module__": __name__, "_original": original}
        _classes[original] = type(f"Gated{original.__name__}", (GatedMlp, original), fields)
    return _classes[original]


def _rebuild(original: type[nn.Module]) -> GatedMlp:
    both = _class_of_both(original)
    return both.__new__(both)


@dataclass(frozen=True, slots=True)
class _GatedProducts(Product):
    """Both products of a module, and what lies between them.

    Args:
        gate_up: Computes gate and up side by side.
        bias: Of gate and up.
        down: Computes the output.
    """

    gate_up: Product
    bias: Tensor | None
    down: IntegerExecution

    def linear(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Multiply, gate and quantize, multiply."""
        assert self.down.operand is not None, "prepared comes first"
        if isinstance(self.gate_up, IntegerExecution):
            codes, scale = self.gate_up.gated(x, self.bias, out_dtype)
        else:
            both = self.gate_up.linear(x, self.bias, out_dtype)
            half = both.shape[1] // 2
            codes, scale = silu_mul_quantize(both[:, :half], both[:, half:])
        return self.down.plan.linear(codes, scale, self.down.operand, bias, out_dtype)


class _Gated:
    """The children of a feed-forward module, and its recorded calls, which copies and pickles leave behind.

    Args:
        children: All children of the module by name.
        sources: Gate and up, or the one linear whose rows are gate, then up.
        down: The linear that reads their product.
    """

    def __init__(
        self, children: dict[str, nn.Module], sources: tuple[QuantizedLinear, ...], down: QuantizedLinear
    ) -> None:
        """Begin without recordings."""
        self.children, self.sources, self.down = children, sources, down
        self._made: tuple[Prepared, Prepared, Prepared] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        return {**self.__dict__, "_made": None}

    def output(self, children: Mapping[str, nn.Module | None], x: Tensor) -> Tensor | None:
        """Return the output of a module with these children, or None when it must compute as its class does."""
        for name, child in self.children.items():
            if children.get(name) is not child or _is_watched(child):
                return None
        source = _gate_up_of(self.sources)
        if source is None or _has_any_global_hook():
            return None
        gate_up, down = source.ready(x.device, x.dtype), self.down.ready(x.device, x.dtype)
        if gate_up is None or down is None:
            return None
        made = self._made  # another thread may make it anew
        if made is None or made[1] is not gate_up[0] or made[2] is not down[0]:
            execution = down[0].execution
            assert isinstance(execution, IntegerExecution), "the inputs of down are quantized"
            products = _GatedProducts(gate_up[0].execution, gate_up[1], execution)
            made = Prepared(products, self.sources[0].in_features, self.down.out_features), gate_up[0], down[0]
            self._made = made
        return made[0](x, down[1])


def _gate_up_of(sources: Sequence[QuantizedLinear]) -> SharedProduct | QuantizedLinear | None:
    """Return what computes gate and up side by side, or None."""
    first = sources[0]
    if len(sources) == 1:
        return first
    product = first.shared
    if not isinstance(product, SharedProduct) or product.members != tuple(sources):
        return None
    return product if all(source.shared is product for source in sources) else None


def _is_watched(module: nn.Module) -> bool:
    """Return whether calling a module does more than its class says: hooks, or a forward of its own."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def join_gates(model: PreTrainedModel) -> dict[str, str | None]:
    """Compute the gate where the inputs of `down` are quantized, in every decoder block where that changes no bit.

    Call it after `share_inputs`. Joining twice changes nothing.

    Args:
        model: A model with packed linears; changed in place.

    Returns:
        For each block, by its path, None or the reason why it stays as it is. Empty for an architecture without a
        description: what its linears read is unknown.
    """
    description = DESCRIPTIONS.get(getattr(model.config, "model_type", ""))
    if description is None or description.mlp is None:
        return {}
    blocks = model.get_submodule(description.blocks).named_children()
    return {f"{description.blocks}.{index}": _join(block, description.mlp) for index, block in blocks}


def _join(block: nn.Module, mlp: Mlp) -> str | None:
    """Join the products of a block, or return why not."""
    if mlp.gate is None or mlp.module is None:
        return "the network has no gate"
    module = block.get_submodule(mlp.module)
    if isinstance(module, GatedMlp):
        return None
    names = [path.removeprefix(f"{mlp.module}.") for path in dict.fromkeys((mlp.gate, mlp.up, mlp.down))]
    linears = [module.get_submodule(name) for name in names]
    packed = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    if len(packed) < len(linears):
        return "not all of them are packed"
    *sources, down = packed
    reason = _reason_against_gating(sources, down)
    if reason is None and not _multiplies_gate(module, names):
        reason = "the module computes something else than down(silu(gate(x)) * up(x))"
    if reason is None:
        module._gated = _Gated(dict(module.named_children()), tuple(sources), down)  # type: ignore[assignment]
        module.__class__ = _class_of_both(type(module))
    return reason


def _reason_against_gating(sources: Sequence[QuantizedLinear], down: QuantizedLinear) -> str | None:
    """Return why no kernel gates and quantizes the outputs of `sources` for `down`, or None."""
    if not isinstance(down.layout.activations, DynamicQuantizer):
        return "the inputs of down are not quantized to int8 per token"
    if any(linear.layout.extras for linear in (*sources, down)):
        return "a delta or an online map belongs to the whole weight"
    if _gate_up_of(sources) is None:
        return "gate and up are not computed by one product"
    return None


class _Stub(nn.Module):
    """Returns what it is told, and notes what it got."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the same for any input."""
        self.inputs.append(x)
        return self.output


def _multiplies_gate(module: nn.Module, names: Sequence[str]) -> bool:
    """Return whether a module computes what this file does.

    Its class is called with children that note what they get: code that comes with a checkpoint may do more than
    the architecture that it names.

    Args:
        module: A feed-forward module.
        names: Of its linears: gate, up and down, or gate_up and down.
    """
    children = dict(module.named_children())
    others = [child for name, child in children.items() if name not in names]
    has_silu = len(others) == 1 and type(others[0]) in _SILU
    takes_tokens = len(inspect.signature(type(module).forward).parameters) == 2
    if not has_silu or not takes_tokens or "forward" in module.__dict__:
        return False
    x, gate, up, y = torch.randn(4, 3, 8, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    outputs = (gate, up, y) if len(names) == 3 else (torch.cat((gate, up), dim=1), y)
    for is_training in (False, True):
        stubs = {name: _Stub(output) for name, output in zip(names, outputs, strict=True)}
        probe = copy.copy(module)
        probe.training = is_training
        probe._modules = {**children, **stubs}
        with torch.no_grad():
            result = type(module).forward(probe, x)
        *sources, down = stubs.values()
        if result is not y or any([id(x)] != [id(tokens) for tokens in source.inputs] for source in sources):
            return False
        if len(down.inputs) != 1 or not torch.equal(down.inputs[0], nn.functional.silu(gate) * up):
            return False
    return True
