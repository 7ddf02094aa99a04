# SPDX-License-Identifier: Apache-2.0
"""Time weight-only linear layers from their packed form against cuBLAS float16, on one GPU in one run.

    python -m benchmarks.kernels.weight_only [--seconds S] [--shapes NxK,...] [--tokens M,...]
        [--families NAME,...] [--json FILE]

Each contender first passes a correctness gate, which asks for the same bits in two runs as well. Then every
contender of a case is captured in a CUDA graph that walks over enough copies of its weight to keep the weight
cold, and the graphs are replayed in turn; a latency is the median over replays, divided by the launches.

The record is written again after each shape, so that a run cut short leaves what it measured. To add formats,
write a function from a shape to an iterator of `Packed` in a file of its own and name it in `FAMILIES`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.kernels.timing import BANDWIDTH, RATE, Batch, median_latencies
from benchmarks.kernels.weight_only_tables import tables
from benchmarks.kernels.weight_only_uniform import Packed, cublas_fp16, humming, uniform

__all__ = ["FAMILIES", "floor_us", "main", "measure"]

RECORD = "kernels_weight_only"
SHAPES = ((28672, 8192), (11008, 4096), (4096, 4096))
TOKENS = (1, 4, 16, 64, 1024)

#: Contenders by the name of their family.
FAMILIES: dict[str, Callable[[tuple[int, int]], Iterator[Packed]]] = {"uniform": uniform, "tables": tables}

Row = dict[str, str | int | float | bool | None]


def floor_us(weight_bytes: float, num_tokens: int, out_features: int, in_features: int) -> float:
    """Return the time below which no kernel can compute the layer with 16-bit activations.

    The larger of its bytes over `BANDWIDTH` and its operations over half of `RATE`, the rate of 8-bit products.
    """
    token_bytes = 2 * num_tokens * (in_features + out_features)
    operations = 2 * num_tokens * out_features * in_features
    return 1e6 * max((weight_bytes + token_bytes) / BANDWIDTH, operations / (RATE / 2))


def make_batch(num_tokens: int, in_features: int) -> Batch:
    """Gaussian activations; nothing here takes them quantized."""
    x = torch.randn(num_tokens, in_features, dtype=torch.float16, device="cuda")
    return Batch(x=x, x_codes=x, x_scale=x, x_narrow=x)


def passes(packed: Packed, batch: Batch) -> bool:
    """Return whether the gate of a contender lets it through; say on standard error why not."""
    contender = packed.contender
    reason = contender.gate(batch) if contender.gate else None
    if reason:
        kind = f"{contender.name} {packed.format} {packed.bits} bits {contender.granularity}"
        print(f"left out: {kind}, {batch.x.shape[0]} tokens: {reason}", file=sys.stderr)
    return not reason


def measure(candidates: list[Packed], num_tokens: int, shape: tuple[int, int]) -> list[Row]:
    """Time every contender that takes the token count; cuBLAS float16 is one of them."""
    batch = make_batch(num_tokens, shape[1])
    present = [packed for packed in candidates if packed.contender.takes(num_tokens) and passes(packed, batch)]
    floors = [floor_us(packed.weight_bytes, num_tokens, *shape) for packed in present]
    latencies = median_latencies([packed.contender for packed in present], batch, min(floors))
    names = [packed.contender.name for packed in present]
    fp16_us = latencies[names.index("cublas_fp16")]
    return [
        {
            "contender": packed.contender.name,
            "format": packed.format,
            "bits": packed.bits,
            "group_size": packed.group_size,
            "n": shape[0],
            "k": shape[1],
            "m": num_tokens,
            "implementation": packed.contender.describe(num_tokens),
            "latency_us": round(latency_us, 2),
            "floor_us": round(lowest_us, 2),
            "fraction_of_floor": round(lowest_us / latency_us, 3),
            "over_cublas_fp16": round(fp16_us / latency_us, 3),
        }
        for packed, latency_us, lowest_us in zip(present, latencies, floors, strict=True)
    ]


def run(options: argparse.Namespace) -> list[Row]:
    """Measure case after case until the time is up; the record is written after each shape."""
    start = time.monotonic()
    token_counts = tuple(map(int, options.tokens.split(",")))
    rows: list[Row] = []
    for shape in (tuple(map(int, text.split("x"))) for text in options.shapes.split(",")):
        candidates = [cublas_fp16(shape), *humming(shape, token_counts)]
        for family in options.families.split(","):
            candidates += FAMILIES[family](shape)
        for num_tokens in token_counts:
            if time.monotonic() - start > options.seconds:
                print(f"time is up before {shape}, {num_tokens} tokens", file=sys.stderr)
                return rows
            rows += measure(candidates, num_tokens, shape)
            print(describe(rows, shape, num_tokens, time.monotonic() - start), flush=True)
        record.write(RECORD, rows, to=options.json)
        del candidates
        torch.cuda.empty_cache()
    return rows


def describe(rows: list[Row], shape: tuple[int, int], num_tokens: int, elapsed_s: float) -> str:
    """Return one line for a case: every contender with its latency."""
    case = [row for row in rows if (row["n"], row["k"], row["m"]) == (*shape, num_tokens)]
    figures = [
        f"{row['contender']}.{row['format']}{row['bits']}g{row['group_size']} {row['latency_us']:.1f}"
        for row in case
    ]
    return " | ".join([f"{shape[0]}x{shape[1]} {num_tokens}", f"{elapsed_s:.0f} s", *figures])


def main(arguments: list[str] | None = None) -> None:
    """Run the cases within a time limit and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200.0, help="start no case after this time")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--families", default=",".join(FAMILIES), help="formats to time")
    parser.add_argument("--json", type=Path, help="write the record here instead of benchmarks/results")
    options = parser.parse_args(arguments)
    record.write(RECORD, run(options), to=options.json)


if __name__ == "__main__":
    main()
