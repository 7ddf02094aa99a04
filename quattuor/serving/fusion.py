# SPDX-License-Identifier: Apache-2.0
"""Joins norms and gated activations to the quantization of what they return, in a graph of PyTorch's compiler.

The compiler would fuse plain PyTorch as well, but into kernels that read a token several times and start only when
the kernel before them has ended. Those of `kernels.token_quantize` read it once and overlap their neighbours.
"""

import operator
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import pattern_matcher

from quattuor.kernels import token_quantize as token_quantize  # registers the operators
from quattuor.nn import operators as operators  # as well

__all__ = ["fuse_gated_products", "fuse_gates", "fuse_norms"]

Target = Callable[..., Any]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fuse_norms(graph: fx.Graph, norms: Collection[Target], adding_norms: Collection[Target] = ()) -> int:
    """Replace each norm whose only reader quantizes it; return how many.

    Args:
        graph: Functional graph after autograd; changed in place.
        norms: Operators (x, weight, eps, size of the variance or None) -> normalized x.
        adding_norms: Operators (x, residual, weight, eps, size or None) -> normalized sum, and the sum.
    """
    count = 0
    for quantize in list(graph.find_nodes(op="call_function", target=torch.ops.quattuor.token_quantize.default)):
        source = quantize.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1:
            continue
        norm = source
        if source.target is operator.getitem and source.args[1] == 0:
            (norm,) = source.all_input_nodes
        is_adding = norm.target in adding_norms
        if norm.target not in (adding_norms if is_adding else norms):
            continue
        x, *rest = _arguments(norm)
        residual = rest.pop(0) if is_adding else None
        weight, eps, size = rest
        if weight is not None and size is None:
            _replace_norm(graph, norm, quantize, (x, weight, eps, residual))
            count += 1
    return count


def fuse_gates(graph: fx.Graph) -> int:
    """Replace each silu(gate) * up of the halves of one tensor that is then quantized; return how many."""
    return sum(int(patterns.apply(graph)) for patterns in _gate_patterns())


def fuse_gated_products(graph: fx.Graph) -> int:
    """Join each product that only a gate reads to that gate, once `fuse_gates` has been there; return how many."""
    count = 0
    for gate in list(graph.find_nodes(op="call_function", target=torch.ops.quattuor.silu_mul_quantize.default)):
        halves = gate.args
        product = _whole_of(*halves)
        if product is None or product.target is not torch.ops.quattuor.packed_w4a8.default:
            continue
        if set(product.users) != set(halves) or any(len(half.users) != 1 for half in halves):
            continue
        with graph.inserting_before(gate):
            fused = graph.call_function(torch.ops.quattuor.packed_w4a8_gated.default, product.args, product.kwargs)
        fused.meta["val"] = gate.meta["val"]
        gate.replace_all_uses_with(fused)
        for leftover in (gate, *halves, product):
            graph.erase_node(leftover)
        count += 1
    return count


def _whole_of(first: fx.Node, second: fx.Node) -> fx.Node | None:
    """Return the matrix of which two nodes are the left and the right half, or None."""
    found = []
    for half in (first, second):
        if half.target is not torch.ops.aten.slice.Tensor or len(half.args) != 4 or half.kwargs:
            return None
        whole, dim, start, end = half.args
        if not isinstance(whole, fx.Node) or whole.meta["val"].dim() != 2 or dim not in (1, -1):
            return None
        columns = whole.meta["val"].shape[1]
        found.append((whole, start, columns if isinstance(end, int) and end > columns else end))
    (whole, *left), (other, *right) = found
    columns = whole.meta["val"].shape[1]
    is_halved = left == [0, columns // 2] and right == [columns // 2, columns]
    return whole if whole is other and is_halved else None


def _arguments(norm: fx.Node) -> list[Any]:
    """Return the arguments of a norm in the order of its schema, defaults filled in."""
    assert isinstance(norm.target, torch._ops.OpOverload), "norms are operators"
    names = [argument.name for argument in norm.target._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in norm.target._schema.arguments}
    given = dict(zip(names, norm.args, strict=False)) | norm.kwargs
    return [given.get(name, defaults[name]) for name in names]


def _replace_norm(graph: fx.Graph, norm: fx.Node, quantize: fx.Node, arguments: tuple[Any, ...]) -> None:
    """Put the fused operator where the norm is, and hand its outputs to the readers of both."""
    with graph.inserting_before(norm):
        fused = graph.call_function(torch.ops.quattuor.rms_norm_quantize.default, arguments)
    fused.meta["val"] = (*quantize.meta["val"], arguments[0].meta["val"])
    outputs = {(quantize, 0): 0, (quantize, 1): 1, (norm, 1): 2}
    for (producer, index), output in outputs.items():
        for reader in [node for node in producer.users if node.target is operator.getitem]:
            if reader.args[1] != index:
                continue
            with graph.inserting_after(fused):
                item = graph.call_function(operator.getitem, (fused, output))
            item.meta = dict(reader.meta)
            reader.replace_all_uses_with(item)
            graph.erase_node(reader)
    graph.erase_node(quantize)
    for leftover in [*norm.users, norm]:
        graph.erase_node(leftover)


def _gated(both: Tensor) -> tuple[Tensor, Tensor]:
    half = both.shape[-1] // 2
    codes, scale = torch.ops.quattuor.token_quantize(torch.nn.functional.silu(both[..., :half]) * both[..., half:])
    return codes, scale


def _gated_at_once(both: Tensor) -> tuple[Tensor, Tensor]:
    half = both.shape[-1] // 2
    codes, scale = torch.ops.quattuor.silu_mul_quantize(both[..., :half], both[..., half:])
    return codes, scale


@cache
def _gate_patterns() -> tuple[pattern_matcher.PatternMatcherPass, ...]:
    """Return the patterns; each dtype is traced into other conversions."""
    found = []
    for dtype in _DTYPES:
        patterns = pattern_matcher.PatternMatcherPass()
        example = torch.empty(5, 4, dtype=dtype, device="cpu")
        pattern_matcher.register_replacement(_gated, _gated_at_once, [example], pattern_matcher.fwd_only, patterns)
        found.append(patterns)
    return tuple(found)
