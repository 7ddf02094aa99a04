# SPDX-License-Identifier: Apache-2.0
"""Compiles a decoder block through vLLM's passes and ours, on the CPU; run by test_vllm_fusion.py.

Prints, as JSON, the operators left in the graph, and whether the results are those of the uncompiled block.
"""

import json
import os
import sys
from typing import Any

os.environ.pop("QUATTUOR_FUSE", None)

import torch
import torch._inductor.config
from served import channel
from torch import Tensor
from vllm.compilation.passes.inductor_pass import pass_context
from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.utils import Range
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

from quattuor.activations import DynamicQuantizer
from quattuor.serving import packed_linear
from quattuor.serving.vllm import graph_pass

HIDDEN, INNER = 64, 96


class Passes(PostGradPassManager):
    """vLLM's passes, and what they leave."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run the passes and keep the operators."""
        super().__call__(graph)
        self.operators = [str(node.target) for node in graph.nodes if node.op == "call_function"]


def make_block(config: Any) -> Any:
    """Return what a decoder block computes from its attention's output to the next attention's inputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER), (3 * HIDDEN, HIDDEN))
    linears = [
        packed_linear.prepare(channel(*size, generator), DynamicQuantizer(), torch.float32, is_traced=False)
        for size in sizes
    ]
    with set_current_vllm_config(config):
        norms, gate = (RMSNorm(HIDDEN), RMSNorm(HIDDEN)), SiluAndMul()

    def linear(index: int, x: Tensor) -> Tensor:
        facts, operand = linears[index]
        return packed_linear.linear(facts, list(operand.values()), x, None)

    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = norms[0].forward_native(linear(0, x), residual)
        x = linear(2, gate.forward_native(linear(1, x)))
        x, residual = norms[1].forward_native(x, residual)
        return linear(3, x), residual

    return block


def main() -> None:
    """Compile the block."""
    config = VllmConfig()
    installed = graph_pass.install(config) and graph_pass.install(config)
    passes = Passes()
    passes.configure(config)
    passes.add(config.compilation_config.inductor_compile_config[current_platform.pass_key])
    passes.fix_functionalization = lambda graph: None  # asks for operators that only a build for CUDA has
    block = make_block(config)
    x, residual = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    for tokens in (x, residual):
        torch._dynamo.mark_dynamic(tokens, 0)
    before = VllmIRInplaceFunctionalizationPass(config)
    hooks = {"post_grad_custom_post_pass": passes, "pre_grad_custom_pass": before, "force_disable_caches": True}
    with (
        torch.inference_mode(),
        set_current_vllm_config(config),
        pass_context(Range(1, 64)),
        torch._inductor.config.patch(hooks),
    ):
        expected = block(x.clone(), residual.clone())
        found = torch.compile(block, fullgraph=True)(x, residual)
    equal = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    json.dump({"installed": installed, "operators": passes.operators, "equal": equal}, sys.stdout)


if __name__ == "__main__":
    main()
