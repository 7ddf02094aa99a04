# SPDX-License-Identifier: Apache-2.0
"""Compiles packed models and linears; run by test_compiled.py in a process of its own, without instrumented code.

Prints, as JSON, of each model whether a compiled decoding step with a static cache gives the tokens of the plain
model, the number of graphs and of their calls, our operators in them, and the linears whose weight a CUDA graph
would copy; of each linear the error of the compiled call; and what changes of a compiled linear do to it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import test_linear
import torch
from packed import pack_
from tiny_models import tiny_model
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from quattuor.activations import DynamicQuantizer
from quattuor.formats import BinaryCoding, Codebook
from quattuor.granularity import PerChannel, PerGroup
from quattuor.nn import QuantizedLinear
from quattuor.nn import linear as linear_file
from quattuor.nn.gated_mlp import join_gates
from quattuor.nn.sharing import share_inputs
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales import Alternating, WeightedKMeans
from quattuor.solvers import WeightQuantizer

TOKENS = torch.arange(24).reshape(2, 12)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CODEBOOK = WeightQuantizer(number_format=Codebook(3), granularity=PerChannel(), scales=WeightedKMeans())
PLANES = WeightQuantizer(number_format=BinaryCoding(2), granularity=PerGroup(16), scales=Alternating(rounds=2))

CASES: dict[str, Callable[[], PreTrainedModel]] = {
    "w4a8 group": lambda: pack_(_llama(), "int4 group 32 two levels, int8 tokens"),
    "w4a8 channel, biases": lambda: pack_(tiny_model("opt", num_hidden_layers=1), "int4 channel, int8 tokens"),
    "w4a8 channel, joined": lambda: joined(pack_(_llama(), "int4 channel, int8 tokens")),
    "w3a16 group": lambda: pack_(_llama(), "uint3 group 32"),
}
LINEARS: dict[str, Callable[[torch.Generator], QuantizedTensor]] = {
    **test_linear.TENSORS,
    "codebook": lambda generator: test_linear.packed(CODEBOOK, generator),
    "planes": lambda generator: test_linear.packed(PLANES, generator),
    "columns beside integers": lambda generator: replace(
        test_linear.packed(test_linear.CHANNEL, generator), delta=test_linear.with_columns(generator).delta
    ),
    "elements beside integers": lambda generator: replace(
        test_linear.packed(test_linear.CHANNEL, generator), delta=test_linear.with_elements(generator).delta
    ),
}


def _llama(seed: int = 0) -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1, seed=seed)


def joined(model: PreTrainedModel) -> PreTrainedModel:
    """Join the products of a model, as when a checkpoint is loaded."""
    share_inputs(model)
    assert set(join_gates(model).values()) == {None}
    return model


def generate(model: PreTrainedModel, backend: Any = None) -> Tensor:
    """Continue the tokens greedily; with a backend the step is compiled as transformers does it on a GPU."""
    settings = dict(GREEDY)
    if backend is not None:
        compiling = CompileConfig(fullgraph=True, backend=backend, mode=None)
        compiling._compile_all_devices = True
        settings |= {"cache_implementation": "static", "compile_config": compiling}
    return model.generate(TOKENS, GenerationConfig(**settings), attention_mask=torch.ones_like(TOKENS))


def measure(model: PreTrainedModel) -> dict[str, Any]:
    """Generate with and without a compiler, which lowers the graph to the operators that kernels implement."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    torch._dynamo.reset()
    operators: list[list[str]] = []
    calls: list[int] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        operators.append(sorted({str(node.target) for node in graph.graph.nodes if node.op == "call_function"}))
        run = aot_eager(graph, inputs)
        return lambda *inputs: (calls.append(1), run(*inputs))[1]

    expected = generate(model)
    equal = torch.equal(expected, generate(model, keep))
    return {
        "equal": equal,
        "graphs": len(operators),
        "calls": len(calls),
        "operators": [name for name in operators[0] if name.startswith("quattuor.")],
        "copied": [linear.name for linear in linears if not all(map(is_static, tensors_of(linear)))],
    }


def tensors_of(linear: QuantizedLinear) -> list[Tensor]:
    """Return the tensors of the weight as the kernel reads them."""
    operand = getattr(linear._prepared.execution, "operand", None)
    return [] if operand is None else list(operand.entries.values())


def is_static(tensor: Tensor) -> bool:
    """Return whether the compiler knows that a tensor stays where it is; a CUDA graph copies every other one."""
    return getattr(tensor, "_dynamo_static_input_type", None) is not None


def error_of(make: Callable[[torch.Generator], QuantizedTensor], name: str, force: str | None) -> float:
    """Compile one linear, which has not been called before, and compare it with itself."""
    tensor = make(torch.Generator().manual_seed(0))
    activations = DynamicQuantizer() if "beside integers" in name else None
    linear = QuantizedLinear.from_tensor(tensor, torch.ones(24), activations, dtype=torch.float32, name=name)
    linear.use_kernel(force)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    return float((compiled(x) - linear(x)).abs().max())


def changes() -> dict[str, list[float | int]]:
    """Return the error of a compiled linear after each change of it, and the number of graphs so far."""
    model, other = (pack_(_llama(seed=seed), "int4 channel, int8 tokens") for seed in (0, 1))
    linear, another = model.model.layers[0].mlp.up_proj, other.model.layers[0].mlp.up_proj
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    graphs: list[int] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(1)
        return graph

    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=keep)
    results: dict[str, list[float | int]] = {"first call": [float((compiled(x) - linear(x)).abs().max()), 1]}

    def note(name: str, inputs: Tensor, expected: Tensor) -> None:
        results[name] = [float((compiled(inputs) - expected).abs().max()), len(graphs)]

    note("other number of tokens", x[:3], linear(x[:3]))
    note("number of tokens of another kernel", x.repeat(40, 1), linear(x.repeat(40, 1)))
    linear.load_state_dict(another.state_dict())
    note("other weights", x, another(x))
    linear.use_kernel("reference")
    note("other kernel", x, another(x))
    return results


def on_gpu() -> dict[str, bool | int]:
    """Let transformers compile and record the step as it does by default on a GPU."""
    model = joined(pack_(_llama(), "int4 channel, int8 tokens")).to("cuda")
    tokens = TOKENS.to("cuda")
    mask = torch.ones_like(tokens)
    expected = model.generate(tokens, GenerationConfig(**GREEDY), attention_mask=mask)
    settings = GenerationConfig(
        **GREEDY, cache_implementation="static", compile_config=CompileConfig(fullgraph=True)
    )
    equal = all(torch.equal(expected, model.generate(tokens, settings, attention_mask=mask)) for _ in range(3))
    counters = torch._dynamo.utils.counters
    skips = counters["inductor"]["cudagraph_skips"]
    return {"equal": equal, "graphs": counters["stats"]["unique_graphs"], "skips": skips}


def main() -> None:
    """Run every case, or with an argument what needs a GPU."""
    if len(sys.argv) > 1:
        json.dump(on_gpu(), sys.stdout)
        return
    linear_file.has_own_memory = lambda device: True  # as on a GPU, stored tensors go when a graph is traced
    results = {
        "models": {name: measure(make()) for name, make in CASES.items()},
        "linears": {
            f"{name}, {force or 'chosen'}": error_of(make, name, force)
            for name, make in LINEARS.items()
            for force in (None, "reference")
        },
        "changes": changes(),
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    with torch.no_grad():
        main()
