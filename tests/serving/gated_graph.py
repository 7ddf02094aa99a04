# SPDX-License-Identifier: Apache-2.0
"""Compiles products whose outputs are gated and quantized; run by test_fusion.py in a process of its own.

Prints, as JSON, how many were joined, the operators left in the graph, and whether results are equal.
"""

import json
import sys

import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from quattuor.nn.operators import plan_of
from quattuor.serving import fusion

FEATURES, INNER = 64, 48
PLAN = plan_of(torch.device("cpu"), torch.float16, 8, 2 * INNER, FEATURES, 4, 0, False)


def layer(seed: int) -> tuple[list[Tensor], str]:
    """Return a random operand and the names of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (2 * INNER, FEATURES), dtype=torch.int8, generator=generator)
    operand = PLAN.prepare(codes, torch.rand(2 * INNER, generator=generator) * 0.01)
    return list(operand.entries.values()), ",".join(operand.entries)


def products(x: Tensor, first: list[Tensor], second: list[Tensor], names: str) -> tuple[Tensor, ...]:
    """A product that only a gate reads, one that is returned as well, and one whose halves change places."""
    quantize, multiply = torch.ops.quattuor.token_quantize, torch.ops.quattuor.packed_w4a8
    sizes = (names, None, torch.float16, 2 * INNER, 4, 0, False)
    codes, scale = quantize(x)
    only, shared, swapped = (multiply(codes, scale, operand, *sizes) for operand in (first, second, first))
    gated = torch.nn.functional.silu(only[..., :INNER]) * only[..., INNER:]
    gated_too = torch.nn.functional.silu(shared[..., :INNER]) * shared[..., INNER:]
    up_first = torch.ops.quattuor.silu_mul_quantize(swapped[..., INNER:], swapped[..., :INNER])
    return *quantize(gated), *quantize(gated_too), *up_first, shared


class Fusion(CustomGraphPass):
    """Runs the fusions and keeps what they did."""

    def __call__(self, graph: fx.Graph) -> None:
        """Fuse, and check that the graph is still one."""
        self.gates = fusion.fuse_gates(graph)
        self.joined = fusion.fuse_gated_products(graph)
        graph.lint()
        self.operators = [str(node.target) for node in graph.nodes if node.op == "call_function"]

    def uuid(self) -> None:
        """Keep the graph out of caches."""


@torch.no_grad()
def main() -> None:
    """Compile the products."""
    first, names = layer(0)
    second, _ = layer(1)
    x = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(2)).half()
    torch._dynamo.mark_dynamic(x, 0)
    done = Fusion()
    with config.patch(post_grad_custom_post_pass=done, fx_graph_cache=False):
        found = torch.compile(products, fullgraph=True)(x, first, second, names)
    expected = products(x, first, second, names)
    result = {
        "gates": done.gates,
        "joined": done.joined,
        "operators": done.operators,
        "equal": [torch.equal(a, b) for a, b in zip(found, expected, strict=True)],
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
