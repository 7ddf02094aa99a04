# SPDX-License-Identifier: Apache-2.0
"""Time linear layers with weights of other widths than 4 bits against 4 bits: the record kernels_widths.

    python -m benchmarks.kernels.widths [--shapes NxK,...] [--tokens M,...] [--bits B,...] [--processes P]
        [--json FILE]

Each width is compared with the reference first, then timed as in `benchmarks.kernels.w4a8`: cold weights, CUDA
graphs of all widths replayed in turn, medians. Activations are int8 already.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.kernels.timing import BANDWIDTH, RATE, Batch, Contender, median_latencies, num_copies
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.token_quantize import token_quantize

__all__ = ["BITS", "floor_us", "main", "rows_of"]

RECORD = "kernels_widths"
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = {"channel": None, "group128": 128}

Row = dict[str, str | int | float | bool | None]


def floor_us(bits: int, num_tokens: int, out_features: int, in_features: int) -> float:
    """Return the time below which no kernel can compute the layer: its bytes or its operations at full rate."""
    weight_bytes = out_features * in_features * bits / 8 + 4 * out_features
    token_bytes = num_tokens * (in_features + 2 * out_features + 4)
    operations = 2 * num_tokens * out_features * in_features
    return 1e6 * max((weight_bytes + token_bytes) / BANDWIDTH, operations / RATE)


def random_layer(problem: LinearProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return uniform codes, channel scales, and integer group scales when there are groups."""
    half = problem.max_code
    shape = (problem.out_features, problem.in_features)
    codes = torch.randint(-half, half, shape, dtype=torch.int8, device="cuda")
    scale = torch.rand(problem.out_features, device="cuda") * 0.01
    if problem.group_size is None:
        return codes, scale, None
    groups = (problem.out_features, problem.num_groups)
    group_scale = torch.randint(1, 2 ** (8 - problem.weight_bits) + 1, groups, device="cuda")
    return codes, scale, group_scale.half()


def make_contender(shape: tuple[int, int], bits: int, granularity: str, cold: bool = True) -> Contender:
    """Return the layer at one width, named by its bits, as a model computes it."""
    group_size = GROUPS[granularity]
    problem = LinearProblem(
        out_features=shape[0],
        in_features=shape[1],
        weight_bits=bits,
        group_size=group_size,
        integer_group_scale=group_size is not None,
        **describe_device("cuda"),
    )
    plan = w4a8_linear.plan(problem)
    exact_plan = w4a8_linear.plan(problem, force="reference")
    layer = random_layer(problem)
    exact_operand = exact_plan.prepare(*layer)
    operands = [plan.prepare(*layer)]
    copies = num_copies(operands[0].nbytes) if cold else 1
    operands += [plan.prepare(*random_layer(problem)) for _ in range(copies - 1)]

    def gate(batch: Batch) -> str | None:
        expected = exact_plan.linear(batch.x_codes, batch.x_scale, exact_operand)
        found = plan.linear(batch.x_codes, batch.x_scale, operands[0])
        return None if torch.equal(found, expected) else "outputs differ from the reference"

    return Contender(
        name=str(bits),
        granularity=granularity,
        includes_activation_quantization=False,
        copies=copies,
        gate=gate,
        describe=plan.implementation,
        run=lambda batch, i: plan.linear(batch.x_codes, batch.x_scale, operands[i % copies]),
    )


def make_batch(num_tokens: int, in_features: int) -> Batch:
    """Gaussian activations."""
    x = torch.randn(num_tokens, in_features, dtype=torch.float16, device="cuda")
    x_codes, x_scale = token_quantize(x)
    return Batch(x=x, x_codes=x_codes, x_scale=x_scale, x_narrow=x)


def rows_of(
    contenders: Sequence[Contender], latencies: Sequence[float], num_tokens: int, shape: tuple[int, int]
) -> list[Row]:
    """Return a flat row for each width; `over_4bit` is the latency of 4 bits, equally grouped, over its own."""
    four = {item.granularity: us for item, us in zip(contenders, latencies, strict=True) if item.name == "4"}
    rows: list[Row] = []
    for item, latency_us in zip(contenders, latencies, strict=True):
        lowest_us = floor_us(int(item.name), num_tokens, *shape)
        rows.append(
            {
                "bits": int(item.name),
                "n": shape[0],
                "k": shape[1],
                "m": num_tokens,
                "granularity": item.granularity,
                "implementation": item.describe(num_tokens),
                "latency_us": round(latency_us, 2),
                "floor_us": round(lowest_us, 2),
                "fraction_of_floor": round(lowest_us / latency_us, 3),
                "over_4bit": round(four[item.granularity] / latency_us, 3),
            }
        )
    return rows


def compile_one(job: tuple[tuple[int, int], int, str, tuple[int, ...]]) -> None:
    """Compute a layer once for each token count, so that its kernels lie in the cache on disk."""
    shape, bits, granularity, token_counts = job
    contender = make_contender(shape, bits, granularity, cold=False)
    for num_tokens in token_counts:
        contender.run(make_batch(num_tokens, shape[1]), 0)
    torch.cuda.synchronize()


def measure(shapes: Sequence[tuple[int, int]], token_counts: tuple[int, ...], widths: Sequence[int]) -> list[Row]:
    """Time every width of every layer; a wrong result stops the run."""
    rows: list[Row] = []
    for shape in shapes:
        contenders = [make_contender(shape, bits, name) for name, bits in itertools.product(GROUPS, widths)]
        for num_tokens in token_counts:
            batch = make_batch(num_tokens, shape[1])
            for item in contenders:
                reason = item.gate(batch)
                if reason:
                    raise RuntimeError(
                        f"{shape}, {num_tokens} tokens, {item.name} bits {item.granularity}: {reason}"
                    )
            latencies = median_latencies(contenders, batch, floor_us(2, num_tokens, *shape))
            found = rows_of(contenders, latencies, num_tokens, shape)
            rows += found
            figures = (f"{row['bits']} {row['granularity']} {row['latency_us']}" for row in found)
            print(f"{shape[0]}x{shape[1]} {num_tokens}: {' | '.join(figures)}", flush=True)
        del contenders
        torch.cuda.empty_cache()
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Time the widths and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="28672x8192,8192x8192")
    parser.add_argument("--tokens", default="1,8,16,64")
    parser.add_argument("--bits", default=",".join(map(str, BITS)), help="has to hold 4")
    parser.add_argument("--processes", type=int, default=0, help="compile beforehand with this many")
    parser.add_argument("--json", type=Path, help="write the record here instead of benchmarks/results")
    options = parser.parse_args(arguments)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    token_counts = tuple(map(int, options.tokens.split(",")))
    widths = tuple(map(int, options.bits.split(",")))
    if 4 not in widths:
        parser.error(f"--bits {options.bits} does not hold 4, which the others are compared with; add it")
    if options.processes:
        jobs = [(*job, token_counts) for job in itertools.product(shapes, widths, GROUPS)]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            pool.map(compile_one, jobs, chunksize=1)
    rows = measure(shapes, token_counts, widths)
    record.write(RECORD, rows, to=options.json)


if __name__ == "__main__":
    main()
