# SPDX-License-Identifier: Apache-2.0
"""Time W4A8 linear layers against other kernels on one GPU, in one run.

    python -m benchmarks.kernels.w4a8 [--seconds S] [--shapes NxK,...] [--tokens M,...] [--json FILE]

Each contender first passes a correctness gate. Then every contender of a case is captured in a CUDA graph that
walks over enough copies of its weight to keep the weight cold, and the graphs are replayed in turn; a latency is
the median over replays, divided by the launches. Contenders whose package is not installed are left out; the
original QQQ kernel is timed when `--qqq FOLDER` names its CUDA sources.

The floor of a case is the larger of its bytes over `BANDWIDTH` and its operations over `RATE`.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import LINEAR_SHAPES, TOKEN_COUNTS
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.token_quantize import token_quantize

__all__ = ["floor_us", "main", "measure"]

#: Ceilings of one H200: device-to-device copy in bytes/s, and twice the bf16 rate on random data in operations/s.
BANDWIDTH, RATE = 4.3e12, 1.6e15
#: Weight bytes that a contender cycles through: four times the L2 cache.
COLD_BYTES = 240_000_000
REPLAYS = 9
#: Time that one replay of a graph should take, so that its launch does not count.
REPLAY_US = 1500.0

Row = dict[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Activations of one token count, as they are and quantized to int8 and fp8."""

    x: Tensor
    x_codes: Tensor
    x_scale: Tensor
    x_narrow: Tensor


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One kernel with its prepared weights: `run(batch, i)` computes the layer with the i-th copy of the weight.

    `gate` returns None when the result for a batch is right, else what is wrong; None where the contender was
    given random weights that no other contender has.
    """

    name: str
    granularity: str
    includes_activation_quantization: bool
    copies: int
    run: Callable[[Batch, int], Tensor]
    gate: Callable[[Batch], str | None] | None = None
    takes: Callable[[int], bool] = lambda num_tokens: True


def floor_us(num_tokens: int, out_features: int, in_features: int) -> float:
    """Return the time below which no kernel with 4-bit weights and 8-bit activations can compute the layer."""
    weight_bytes = out_features * in_features / 2 + 4 * out_features
    token_bytes = num_tokens * (in_features + 2 * out_features + 4)
    operations = 2 * num_tokens * out_features * in_features
    return 1e6 * max((weight_bytes + token_bytes) / BANDWIDTH, operations / RATE)


def num_copies(nbytes: int) -> int:
    """Return how many copies of a weight keep each of them out of the cache."""
    return max(2, -(-COLD_BYTES // nbytes))


def quantized_rows(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight to 4 bits: codes, channel scale, and integer group scales when there are groups."""
    out_features, in_features = weight.shape
    if group_size is None:
        scale = weight.float().abs().amax(dim=1) / 7
        codes = torch.round(weight.float() / scale[:, None]).clamp(-8, 7).to(torch.int8)
        return codes, scale, None
    groups = weight.float().view(out_features, -1, group_size)
    step = groups.abs().amax(dim=2) / 7
    scale = step.amax(dim=1) / 16
    group_scale = torch.round(step / scale[:, None]).clamp(1, 16)
    codes = torch.round(groups / (scale[:, None] * group_scale)[:, :, None]).clamp(-8, 7)
    return codes.to(torch.int8).view(out_features, in_features), scale, group_scale.half()


def ours(weight: Tensor, group_size: int | None, float_scales: bool) -> Iterator[Contender]:
    """Quattuor's kernels as a layer uses them, with and without the quantization of activations."""
    out_features, in_features = weight.shape
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        integer_group_scale=group_size is not None and not float_scales,
        **describe_device("cuda"),
    )
    plan = w4a8_linear.plan(problem)
    exact_plan = w4a8_linear.plan(problem, force="reference")
    codes, scale, group_scale = quantized_rows(weight, group_size)
    if float_scales:
        group_scale = group_scale + 0.25
    exact_operand = exact_plan.prepare(codes, scale, group_scale)
    operands = [plan.prepare(codes, scale, group_scale)]
    total = num_copies(operands[0].nbytes)
    for _ in range(total - 1):
        fresh = torch.randint(-8, 8, codes.shape, dtype=torch.int8, device="cuda")
        operands.append(plan.prepare(fresh, scale, group_scale))

    def gate(batch: Batch) -> str | None:
        rows = torch.arange(0, batch.x.shape[0], max(1, batch.x.shape[0] // 8), device="cuda")
        expected = exact_plan.linear(batch.x_codes[rows], batch.x_scale[rows], exact_operand)
        found = plan.linear(batch.x_codes, batch.x_scale, operands[0])[rows]
        return None if torch.equal(found, expected) else "outputs differ from the reference"

    kind = "channel" if group_size is None else f"group{group_size}"
    shared = {"name": "quattuor", "granularity": kind + "_float" * float_scales, "copies": total, "gate": gate}
    yield Contender(
        **shared,
        includes_activation_quantization=False,
        run=lambda batch, i: plan.linear(batch.x_codes, batch.x_scale, operands[i % total]),
    )
    yield Contender(
        **shared,
        includes_activation_quantization=True,
        run=lambda batch, i: plan.linear(*token_quantize(batch.x), operands[i % total]),
    )


def cublas(weight: Tensor) -> Iterator[Contender]:
    """The library products of PyTorch: fp16, int8 sums without scaling, fp8 with scales per row."""
    total = num_copies(2 * weight.numel())
    dense = [weight] + [torch.randn_like(weight) for _ in range(total - 1)]
    yield Contender(
        name="cublas_fp16",
        granularity="none",
        includes_activation_quantization=False,
        copies=total,
        run=lambda batch, i: batch.x @ dense[i % total].T,
    )
    total8 = num_copies(weight.numel())
    codes = [torch.randint(-127, 128, weight.shape, dtype=torch.int8, device="cuda") for _ in range(total8)]
    yield Contender(
        name="cublas_int8",
        granularity="channel",
        includes_activation_quantization=False,
        copies=total8,
        run=lambda batch, i: torch._int_mm(batch.x_codes, codes[i % total8].T),
        takes=lambda num_tokens: num_tokens > 16,
    )
    narrow = [torch.randn_like(weight).to(torch.float8_e4m3fn) for _ in range(total8)]
    row_scale = weight.new_ones((1, weight.shape[0]), dtype=torch.float32)
    yield Contender(
        name="cublas_fp8",
        granularity="channel",
        includes_activation_quantization=False,
        copies=total8,
        run=lambda batch, i: torch._scaled_mm(
            batch.x_narrow,
            narrow[i % total8].T,
            scale_a=batch.x_scale[:, None],
            scale_b=row_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
        takes=lambda num_tokens: num_tokens % 16 == 0,
    )


def humming(weight: Tensor) -> Iterator[Contender]:
    """The package humming-kernels, with int8 and with 16-bit activations."""
    from humming.layer import HummingLayer

    out_features, in_features = weight.shape
    total = num_copies(weight.numel() // 2)
    for name, granularity, weight_config, input_config in (
        ("humming_w4a8", "channel", {"dtype": "int4"}, {"dtype": "int8"}),
        ("humming_w4a8", "group128", {"dtype": "int4", "group_size": 128}, {"dtype": "int8"}),
        ("w4a16_humming", "group128", {"dtype": "int4", "group_size": 128}, None),
    ):
        layers = []
        for i in range(total):
            layer = HummingLayer(
                shape_n=out_features,
                shape_k=in_features,
                weight_config=dict(weight_config),
                input_config=dict(input_config) if input_config else None,
                torch_dtype=torch.float16,
            ).cuda()
            layer.load_from_unquantized(weight if i == 0 else torch.randn_like(weight))
            layer.transform()
            layers.append(layer)

        def gate(batch: Batch, layer: object = layers[0]) -> str | None:
            expected = batch.x[:4].float() @ weight.float().T
            error = float((layer(batch.x)[:4].float() - expected).norm() / expected.norm())
            return None if error < 0.3 else f"relative error {error:.3f}"

        shared = {"name": name, "granularity": granularity, "copies": total, "gate": gate}
        yield Contender(
            **shared,
            includes_activation_quantization=input_config is not None,
            run=lambda batch, i, layers=layers: layers[i % total](batch.x),
        )
        if input_config is not None:
            yield Contender(
                **shared,
                includes_activation_quantization=False,
                run=lambda batch, i, layers=layers: layers[i % total](
                    batch.x_codes, input_scale=batch.x_scale[:, None]
                ),
            )


def original_qqq(weight: Tensor, module: object) -> Iterator[Contender]:
    """The kernel published with QQQ, on random packed weights."""
    out_features, in_features = weight.shape
    total = num_copies(weight.numel() // 2)
    shape = (in_features // 16, out_features * 2)
    packed = [torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda") for _ in range(total)]
    sums = torch.zeros(16 * 64, out_features, dtype=torch.int32, device="cuda")
    channel = torch.rand(1, out_features, device="cuda")
    group = torch.rand(in_features // 128, out_features, device="cuda").half()
    locks = torch.zeros(out_features // 128 * 16, dtype=torch.int32, device="cuda")
    for granularity, scales in (("channel", group.new_empty(0)), ("group128", group)):

        def run(batch: Batch, i: int, scales: Tensor = scales) -> Tensor:
            out = batch.x.new_empty(batch.x.shape[0], out_features)
            arguments = (
                batch.x_codes,
                packed[i % total],
                sums,
                out,
                batch.x_scale[:, None],
                channel,
                scales,
                locks,
            )
            module.qqq_gemm(*arguments, -1, -1, -1, 16)
            return out

        yield Contender(
            name="qqq_original",
            granularity=granularity,
            includes_activation_quantization=False,
            copies=total,
            run=run,
        )


def capture(contender: Contender, batch: Batch) -> tuple[torch.cuda.CUDAGraph, int]:
    """Return a graph of enough launches to take about `REPLAY_US`, over every copy of the weight."""
    for i in range(2):
        contender.run(batch, i)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for i in range(3):
        contender.run(batch, i)
    stop.record()
    torch.cuda.synchronize()
    once_us = max(1.0, start.elapsed_time(stop) / 3 * 1e3)
    launches = contender.copies * max(1, min(20, round(REPLAY_US / once_us / contender.copies)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            contender.run(batch, i)
    return graph, launches


def median_latencies(contenders: list[Contender], batch: Batch) -> list[float]:
    """Return the median latency of each contender in us; the graphs are replayed in turn."""
    graphs = [capture(contender, batch) for contender in contenders]
    samples: list[list[float]] = [[] for _ in graphs]
    for replay in range(REPLAYS + 1):
        for (graph, launches), found in zip(graphs, samples, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            if replay:  # the first warms up
                found.append(start.elapsed_time(stop) / launches * 1e3)
    return [sorted(found)[len(found) // 2] for found in samples]


def make_batch(num_tokens: int, in_features: int) -> Batch:
    """Gaussian activations."""
    x = torch.randn(num_tokens, in_features, dtype=torch.float16, device="cuda")
    x_codes, x_scale = token_quantize(x)
    return Batch(x=x, x_codes=x_codes, x_scale=x_scale, x_narrow=x.to(torch.float8_e4m3fn))


def make_contenders(out_features: int, in_features: int, qqq: object | None) -> list[Contender]:
    """Prepare one Gaussian weight, and cold copies, for every contender that is installed."""
    weight = torch.randn(out_features, in_features, dtype=torch.float16, device="cuda")
    contenders = [*cublas(weight), *ours(weight, None, False), *ours(weight, 128, False), *ours(weight, 128, True)]
    if importlib.util.find_spec("humming") is not None:
        contenders += humming(weight)
    if qqq is not None:
        contenders += original_qqq(weight, qqq)
    return contenders


def measure(contenders: list[Contender], num_tokens: int, out_features: int, in_features: int) -> list[Row]:
    """Time every contender that takes the token count: one flat row each. Raises where a gate fails."""
    batch = make_batch(num_tokens, in_features)
    present = [contender for contender in contenders if contender.takes(num_tokens)]
    for contender in present:
        wrong = contender.gate(batch) if contender.gate else None
        if wrong:
            raise RuntimeError(f"{contender.name} {contender.granularity}, {num_tokens} tokens: {wrong}")
    latencies = median_latencies(present, batch)
    fp16_us = next(us for item, us in zip(present, latencies, strict=True) if item.name == "cublas_fp16")
    lowest_us = floor_us(num_tokens, out_features, in_features)
    return [
        {
            "n": out_features,
            "k": in_features,
            "m": num_tokens,
            "contender": contender.name,
            "granularity": contender.granularity,
            "includes_activation_quantization": contender.includes_activation_quantization,
            "latency_us": round(latency_us, 2),
            "floor_us": round(lowest_us, 2),
            "speedup_over_cublas_fp16": round(fp16_us / latency_us, 3),
            "fraction_of_floor": round(lowest_us / latency_us, 3),
        }
        for contender, latency_us in zip(present, latencies, strict=True)
    ]


def build_qqq(folder: str) -> object:
    """Compile the CUDA sources published with QQQ."""
    from torch.utils.cpp_extension import load

    sources = [f"{folder}/pybind.cpp", f"{folder}/qqq_gemm.cu"]
    return load("qqq_peer", sources, extra_cuda_cflags=["-O3"], verbose=False)


def main(arguments: list[str] | None = None) -> None:
    """Run the cases within a time limit and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after this time")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in LINEAR_SHAPES.values()))
    parser.add_argument("--tokens", default=",".join(map(str, TOKEN_COUNTS)))
    parser.add_argument("--qqq", help="folder with pybind.cpp and qqq_gemm.cu of the original kernel")
    parser.add_argument("--json", type=Path, help="write the rows here instead of the record")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    qqq = build_qqq(options.qqq) if options.qqq else None
    rows: list[Row] = []
    for shape in options.shapes.split(","):
        if time.monotonic() - start > options.seconds:
            break
        out_features, in_features = map(int, shape.split("x"))
        contenders = make_contenders(out_features, in_features, qqq)
        for num_tokens in map(int, options.tokens.split(",")):
            if time.monotonic() - start > options.seconds:
                print(f"time is up before {shape}, {num_tokens} tokens", file=sys.stderr)
                break
            found = measure(contenders, num_tokens, out_features, in_features)
            rows += found
            figures = [
                f"{r['contender']}.{r['granularity']}{'+q' * r['includes_activation_quantization']}"
                f" {r['latency_us']:.1f}"
                for r in found
            ]
            print(
                shape,
                num_tokens,
                f"{time.monotonic() - start:.0f} s",
                f"floor {found[0]['floor_us']:.1f}",
                *figures,
                sep=" | ",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    else:
        from benchmarks.record import write

        write("kernels_w4a8", rows)


if __name__ == "__main__":
    main()
