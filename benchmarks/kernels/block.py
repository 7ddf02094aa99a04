# SPDX-License-Identifier: Apache-2.0
"""What the linears of a decoder block take together with the quantization of their inputs: record `kernels_block`.

    python -m benchmarks.kernels.block [--tokens 1,16,64,256,1024,16384] [--json FILE]

A block is query-key-value, attention output, gate and up, and down; before each the input is quantized as a model
needs it: norm and residual, plain, norm and residual, gated activation. `part` is "products" (inputs quantized
beforehand), "quantization" (nothing multiplied), "block" (both, as a chain in which each waits for the one before)
or "cublas_fp16" (the four products of float16, nothing else). Blocks follow each other in one CUDA graph, with
weights of their own, so that they are cold.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.kernels.timing import Batch, Contender, median_latencies
from quattuor.kernels import token_quantize, w4a8_linear
from quattuor.kernels.dispatch import LinearProblem, Operand, describe_device

__all__ = ["RECORD", "main"]

RECORD = "kernels_block"
#: Hidden and intermediate sizes.
MODELS = {"llama-2-13b": (5120, 13824), "llama-2-7b": (4096, 11008)}
#: Blocks in a graph: more weight than the cache holds.
NUM_BLOCKS = 8
Codes = tuple[Tensor, Tensor]
Linear = tuple[w4a8_linear.Plan, Operand]


@dataclass(frozen=True, kw_only=True)
class Block:
    """The four linears of one block; sizes are those of the model."""

    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the kernels of a block read where the kernel before them did not run."""

    hidden: Tensor
    residual: Tensor
    attention: Tensor
    gate_up: Tensor
    gain: Tensor

    @classmethod
    def random(cls, num_tokens: int, hidden: int, inner: int) -> "Inputs":
        """Return tokens of normal numbers."""
        sizes = {"hidden": hidden, "residual": hidden, "attention": hidden, "gate_up": 2 * inner}
        tokens = {name: torch.randn(num_tokens, size, device="cuda").half() for name, size in sizes.items()}
        return cls(**tokens, gain=torch.ones(hidden, device="cuda", dtype=torch.float16))


def linear(out_features: int, in_features: int) -> Linear:
    """Return a layer of random codes, one scale per channel."""
    problem = LinearProblem(
        out_features=out_features, in_features=in_features, weight_bits=4, **describe_device(torch.device("cuda"))
    )
    plan = w4a8_linear.plan(problem)
    codes = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8, device="cuda")
    return plan, plan.prepare(codes, torch.full((out_features,), 2e-3, device="cuda"))


def block(hidden: int, inner: int) -> Block:
    """Return a block of a model."""
    return Block(
        qkv=linear(3 * hidden, hidden),
        output=linear(hidden, hidden),
        gate_up=linear(2 * inner, hidden),
        down=linear(hidden, inner),
    )


def gated(gate_up: Tensor) -> Codes:
    """Quantize the gated activation of joined outputs."""
    inner = gate_up.shape[1] // 2
    codes, scale = token_quantize.silu_mul_quantize(gate_up[:, :inner], gate_up[:, inner:])
    return codes, scale


def run_chain(layers: Block, x: Inputs) -> None:
    """Run the kernels of a block in their order, each on the output of the one before."""
    multiply = w4a8_linear.Plan.linear
    codes, scale, residual = token_quantize.rms_norm_quantize(x.hidden, x.gain, 1e-5, x.residual)
    attention = multiply(layers.qkv[0], codes, scale, layers.qkv[1])[:, : x.hidden.shape[1]]
    hidden = multiply(layers.output[0], *token_quantize.token_quantize(attention), layers.output[1])
    codes, scale, _ = token_quantize.rms_norm_quantize(hidden, x.gain, 1e-5, residual)
    codes, scale = w4a8_linear.gated_linear(layers.gate_up[0], codes, scale, layers.gate_up[1])
    multiply(layers.down[0], codes, scale, layers.down[1])


def run_quantization(layers: Block, x: Inputs) -> None:
    """Quantize the four inputs of a block."""
    token_quantize.rms_norm_quantize(x.hidden, x.gain, 1e-5, x.residual)
    token_quantize.token_quantize(x.attention)
    token_quantize.rms_norm_quantize(x.hidden, x.gain, 1e-5, x.residual)
    gated(x.gate_up)


def run_products(codes: Codes, inner_codes: Codes) -> Callable[[Block, Inputs], None]:
    """Return the four products of a block on inputs that are quantized."""

    def run(layers: Block, x: Inputs) -> None:
        for plan, operand in (layers.qkv, layers.output, layers.gate_up):
            plan.linear(*codes, operand)
        layers.down[0].linear(*inner_codes, layers.down[1])

    return run


def measure(model: str, token_counts: list[int]) -> list[dict[str, record.Scalar]]:
    """Return the rows of a model; float16 weights are made once the packed ones are gone."""
    hidden, inner = MODELS[model]
    blocks = [block(hidden, inner) for _ in range(NUM_BLOCKS)]
    dense = [
        [torch.randn(n, k, device="cuda").half() for n, k in sizes]
        for sizes in [((3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))] * NUM_BLOCKS
    ]
    rows: list[dict[str, record.Scalar]] = []
    for num_tokens in token_counts:
        x = Inputs.random(num_tokens, hidden, inner)
        codes = token_quantize.token_quantize(x.hidden)
        products = run_products(codes, gated(x.gate_up))
        wide = torch.randn(num_tokens, inner, device="cuda").half()

        def run_dense(_: Batch, i: int, x: Inputs = x, wide: Tensor = wide) -> None:
            for weight in dense[i % NUM_BLOCKS]:
                torch.nn.functional.linear(x.hidden if weight.shape[1] == hidden else wide, weight)

        def of(run: Callable[[Block, Inputs], None], x: Inputs = x) -> Callable[[Batch, int], None]:
            return lambda _, i: run(blocks[i % NUM_BLOCKS], x)

        runs = {
            "block": of(run_chain),
            "products": of(products),
            "quantization": of(run_quantization),
            "cublas_fp16": run_dense,
        }
        contenders = [
            Contender(
                name=name, granularity="channel", includes_activation_quantization=True, copies=NUM_BLOCKS, run=run
            )
            for name, run in runs.items()
        ]
        batch = Batch(x=x.hidden, x_codes=codes[0], x_scale=codes[1], x_narrow=codes[0])
        for name, latency in zip(runs, median_latencies(contenders, batch, lowest_us=150.0), strict=True):
            rows.append({"model": model, "m": num_tokens, "part": name, "latency_us": round(latency, 2)})
            print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure every model and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default="1,16,64,256,1024,16384")
    parser.add_argument("--json", type=Path, help="write the record here instead of benchmarks/results")
    options = parser.parse_args(arguments)
    rows = []
    for model in options.models.split(","):
        rows += measure(model, [int(count) for count in options.tokens.split(",")])
        record.write(RECORD, rows, to=options.json)


if __name__ == "__main__":
    main()
