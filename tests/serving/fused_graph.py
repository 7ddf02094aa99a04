# SPDX-License-Identifier: Apache-2.0
"""Compiles norms, gates and quantizations; run by test_fusion.py in a process of its own.

Prints, as JSON, for each dtype how much was fused, the operators left in the graph, and whether results are equal.
"""

import json
import sys

import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from quattuor.serving import fusion

torch.library.define(
    "fusion_test::add_norm",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, int? size=None) -> (Tensor, Tensor)",
)
torch.library.define("fusion_test::norm", "(Tensor x, Tensor? weight, float eps, int? size=None) -> Tensor")


def norm(x: Tensor, weight: Tensor | None, eps: float, size: int | None = None) -> Tensor:
    """Normalize as an engine's operator does."""
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    y = (x.float() * inverse).to(x.dtype)
    return y if weight is None else y * weight


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Add, then normalize."""
    hidden = x + residual
    return norm(hidden, weight, eps), hidden


torch.library.impl("fusion_test::norm", "CompositeExplicitAutograd", norm)
torch.library.impl("fusion_test::add_norm", "CompositeExplicitAutograd", add_norm)
torch.library.register_fake("fusion_test::norm", lambda x, weight, eps, size=None: torch.empty_like(x))
torch.library.register_fake(
    "fusion_test::add_norm",
    lambda x, residual, weight, eps, size=None: (torch.empty_like(x), torch.empty_like(x)),
)
OPERATORS = torch.ops.fusion_test


def block(x: Tensor, residual: Tensor, weight: Tensor, both: Tensor) -> tuple[Tensor, ...]:
    """What an engine's decoder block quantizes, and two norms that must stay."""
    quantize = torch.ops.quattuor.token_quantize
    first, hidden = OPERATORS.add_norm(x, residual, weight, 1e-5)
    second = OPERATORS.norm(hidden, weight, 1e-5)
    shared = OPERATORS.norm(x, weight, 1e-5)
    bare = OPERATORS.norm(x, None, 1e-5)
    half = both.shape[-1] // 2
    gated = torch.nn.functional.silu(both[..., :half]) * both[..., half:]
    quantized = [item for y in (first, second, gated, shared, bare) for item in quantize(y)]
    return *quantized, hidden, shared


class Fusion(CustomGraphPass):
    """Runs the fusions and keeps what they did."""

    def __call__(self, graph: fx.Graph) -> None:
        """Fuse, and check that the graph is still one."""
        self.norms = fusion.fuse_norms(graph, {OPERATORS.norm.default}, {OPERATORS.add_norm.default})
        self.gates = fusion.fuse_gates(graph)
        graph.lint()
        self.operators = [str(node.target) for node in graph.nodes if node.op == "call_function"]

    def uuid(self) -> None:
        """Keep the graph out of caches."""


@torch.no_grad()
def main() -> None:
    """Compile the block in each dtype."""
    results = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        torch._dynamo.reset()
        generator = torch.Generator().manual_seed(0)
        x, residual = (torch.randn(5, 64, generator=generator).to(dtype) for _ in range(2))
        weight, both = (
            torch.randn(64, generator=generator).to(dtype),
            torch.randn(5, 96, generator=generator).to(dtype),
        )
        for tokens in (x, residual, both):
            torch._dynamo.mark_dynamic(tokens, 0)
        done = Fusion()
        with config.patch(post_grad_custom_post_pass=done, fx_graph_cache=False):
            found = torch.compile(block, fullgraph=True)(x, residual, weight, both)
        expected = block(x, residual, weight, both)
        results[str(dtype)] = {
            "norms": done.norms,
            "gates": done.gates,
            "operators": done.operators,
            "equal": [torch.equal(a, b) for a, b in zip(found, expected, strict=True)],
        }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
