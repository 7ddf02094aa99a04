# SPDX-License-Identifier: Apache-2.0
"""Compiles served linears; run by test_packed_linear.py in a process of its own, whose code is not instrumented.

Prints, as JSON, the largest difference to the uncompiled linear, the number of graphs, and the operators in them.
"""

import json
import sys

import torch
from served import CASES, Served
from torch import Tensor


@torch.no_grad()
def main() -> None:
    """Compile each case, with the quantization in the graph and outside."""
    results = {}
    for case in CASES:
        for is_traced in (True, False):
            torch._dynamo.reset()
            graphs: list[list[str]] = []

            def keep(module: torch.fx.GraphModule, _: list[Tensor], graphs: list[list[str]] = graphs) -> object:
                graphs.append([str(node.target) for node in module.graph.nodes])
                return module

            served = Served(case, torch.Generator().manual_seed(0), is_traced=is_traced)
            compiled = torch.compile(served, fullgraph=True, dynamic=True, backend=keep)
            difference = 0.0
            for num_tokens in (5, 3, 200):
                x = torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(num_tokens))
                difference = max(difference, float((compiled(x) - served(x)).abs().max()))
            results[f"{case}, {'fused' if is_traced else 'apart'}"] = {
                "difference": difference,
                "graphs": len(graphs),
                "operators": sorted(set(graphs[0])),
            }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
