# SPDX-License-Identifier: Apache-2.0
"""Time W4A8 linear layers against other kernels on one GPU, in one run.

    python -m benchmarks.kernels.w4a8 [--seconds S] [--shapes NxK,...] [--tokens M,...] [--append [--missing]]
        [--json FILE]

Each contender first passes a correctness gate. Then every contender of a case is captured in a CUDA graph that
walks over enough copies of its weight to keep the weight cold, and the graphs are replayed in turn; a latency is
the median over replays, divided by the launches. A contender whose package is not installed is left out; the
original QQQ kernel, Marlin and CUTLASS are timed when `--qqq`, `--marlin`, `--cutlass` name the folders of their
sources.

The record is written again after each shape, so that a run cut short leaves what it measured. `--append` keeps the
rows of an existing record for the cases (a shape and a token count) that the run does not measure, and refuses a
record of another device or of other versions of what is timed; `--missing` measures none of its cases again.
"""

import argparse
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.kernels import peers
from benchmarks.kernels.appending import existing_rows
from benchmarks.kernels.contenders import cublas, ours, ours_w4a16
from benchmarks.kernels.cutlass import cutlass_int8, load_cutlass
from benchmarks.kernels.timing import Batch, Contender, floor_us, median_latencies
from benchmarks.shapes import LINEAR_SHAPES, TOKEN_COUNTS
from quattuor.kernels.token_quantize import token_quantize

__all__ = ["case_of", "main", "measure", "merged"]

RECORD = "kernels_w4a8"

Folders = dict[str, str | None]
Row = dict[str, str | int | float | bool | None]


def make_batch(num_tokens: int, in_features: int) -> Batch:
    """Gaussian activations."""
    x = torch.randn(num_tokens, in_features, dtype=torch.float16, device="cuda")
    x_codes, x_scale = token_quantize(x)
    return Batch(x=x, x_codes=x_codes, x_scale=x_scale, x_narrow=x.to(torch.float8_e4m3fn))


def make_peers(
    name: str, weight: torch.Tensor, token_counts: tuple[int, ...], folders: Folders
) -> Iterator[Contender]:
    """Prepare the contenders of one publisher."""
    if name == "humming":
        return peers.humming(weight, token_counts)
    if name == "cutlass":
        return cutlass_int8(weight, load_cutlass(folders[name]), token_quantize)
    if name == "marlin":
        return peers.marlin(weight, peers.load_marlin(folders[name]))
    return peers.original_qqq(weight, peers.load_qqq(folders[name]), token_quantize)


def make_contenders(
    shape: tuple[int, int], token_counts: tuple[int, ...], present: list[str], folders: Folders
) -> list[Contender]:
    """Prepare one Gaussian weight, and cold copies, for every contender."""
    weight = torch.randn(shape, dtype=torch.float16, device="cuda")
    contenders = [*cublas(weight), *ours(weight, None, False), *ours(weight, 128, False)]
    contenders += [*ours(weight, 128, True)][:1]  # float16 group scales differ in the product alone
    contenders += ours_w4a16(weight, 128)
    for name in present:
        contenders += make_peers(name, weight, token_counts, folders)
    return contenders


def measure(contenders: list[Contender], num_tokens: int, out_features: int, in_features: int) -> list[Row]:
    """Time every contender that takes the token count: one flat row each; one whose gate fails has none."""
    batch = make_batch(num_tokens, in_features)
    present = [contender for contender in contenders if contender.takes(num_tokens)]
    wrong = {contender: contender.gate(batch) for contender in present if contender.gate}
    for contender, reason in wrong.items():
        if reason:
            print(
                f"left out: {contender.name} {contender.granularity}, {num_tokens} tokens: {reason}",
                file=sys.stderr,
            )
            present.remove(contender)
    lowest_us = floor_us(num_tokens, out_features, in_features)
    latencies = median_latencies(present, batch, lowest_us)
    fp16_us = next(us for item, us in zip(present, latencies, strict=True) if item.name == "cublas_fp16")
    return [
        {
            "n": out_features,
            "k": in_features,
            "m": num_tokens,
            "contender": contender.name,
            "granularity": contender.granularity,
            "includes_activation_quantization": contender.includes_activation_quantization,
            "implementation": contender.describe(num_tokens),
            "latency_us": round(latency_us, 2),
            "floor_us": round(lowest_us, 2),
            "speedup_over_cublas_fp16": round(fp16_us / latency_us, 3),
            "fraction_of_floor": round(lowest_us / latency_us, 3),
        }
        for contender, latency_us in zip(present, latencies, strict=True)
    ]


def compile_ours(job: tuple[tuple[int, int], tuple[int, ...]]) -> None:
    """Run Quattuor's contenders once on a shape, so that their kernels lie in the cache on disk."""
    shape, token_counts = job
    weight = torch.randn(shape, dtype=torch.float16, device="cuda")
    for contenders in (ours(weight, None, False), ours(weight, 128, False), ours(weight, 128, True)):
        for contender in contenders:
            for num_tokens in token_counts:
                contender.run(make_batch(num_tokens, shape[1]), 0)
    torch.cuda.synchronize()


def try_peers(name: str, folders: Folders) -> None:
    """Run the contenders of one publisher on a small layer."""
    weight = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")
    for contender in make_peers(name, weight, (1, 64), folders):
        for num_tokens in (1, 64):
            contender.run(make_batch(num_tokens, 4096), 0)
            torch.cuda.synchronize()


def peers_that_run(folders: Folders) -> list[str]:
    """Return the publishers whose kernels run here; a crash would take this process's device with it."""
    wanted = (["humming"] if importlib.util.find_spec("humming") else []) + [
        name for name in folders if folders[name]
    ]
    context = multiprocessing.get_context("spawn")
    processes = {name: context.Process(target=try_peers, args=(name, folders)) for name in wanted}
    for process in processes.values():
        process.start()
    for name, process in processes.items():
        process.join()
        if process.exitcode:
            print(f"left out: {name}, which fails with exit status {process.exitcode}", file=sys.stderr)
    return [name for name, process in processes.items() if process.exitcode == 0]


def case_of(row: Row) -> tuple[int, int, int]:
    """Return N, K and the token count of a row; a run measures every contender of a case."""
    return int(row["n"]), int(row["k"]), int(row["m"])


def merged(rows: Sequence[Row], found: Sequence[Row]) -> list[Row]:
    """Return the rows with those of new cases, which replace older ones, by benchmarked shape and token count."""
    measured = {case_of(row) for row in found}
    order = {shape: place for place, shape in enumerate(LINEAR_SHAPES.values())}

    def place(row: Row) -> tuple[int, int, int, int]:
        n, k, m = case_of(row)
        return order.get((n, k), len(order)), n, k, m

    return sorted([*(row for row in rows if case_of(row) not in measured), *found], key=place)


def run(options: argparse.Namespace) -> list[Row]:
    """Measure case after case until the time is up; the record is written after each shape."""
    start = time.monotonic()
    kept = existing_rows(options.json or record.RESULTS / f"{RECORD}.json") if options.append else []
    left_out = {case_of(row) for row in kept} if options.missing else set()
    token_counts = tuple(map(int, options.tokens.split(",")))
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    shapes = [shape for shape in shapes if any((*shape, m) not in left_out for m in token_counts)]
    folders = {"qqq": options.qqq, "marlin": options.marlin, "cutlass": options.cutlass}
    present = peers_that_run(folders)
    if options.processes:
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            pool.map(compile_ours, [(shape, token_counts) for shape in shapes], chunksize=1)
    print(f"prepared after {time.monotonic() - start:.0f} s", file=sys.stderr)
    rows: list[Row] = []
    for shape in shapes:
        contenders = make_contenders(shape, token_counts, present, folders)
        for num_tokens in token_counts:
            if (*shape, num_tokens) in left_out:
                continue
            if time.monotonic() - start > options.seconds:
                print(f"time is up before {shape}, {num_tokens} tokens", file=sys.stderr)
                return merged(kept, rows)
            found = measure(contenders, num_tokens, *shape)
            rows += found
            print(describe_case(found, time.monotonic() - start), flush=True)
        record.write(RECORD, merged(kept, rows), to=options.json)
        del contenders
        torch.cuda.empty_cache()
    return merged(kept, rows)


def describe_case(rows: list[Row], elapsed_s: float) -> str:
    """Return one line for a case: every contender with its latency."""
    figures = [
        f"{row['contender']}.{row['granularity']}{'+q' * bool(row['includes_activation_quantization'])}"
        f" {row['latency_us']:.1f}"
        for row in rows
    ]
    first = rows[0]
    case = f"{first['n']}x{first['k']} {first['m']}"
    return " | ".join([case, f"{elapsed_s:.0f} s", f"floor {first['floor_us']:.1f}", *figures])


def main(arguments: list[str] | None = None) -> None:
    """Run the cases within a time limit and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200.0, help="start no case after this time")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in LINEAR_SHAPES.values()))
    parser.add_argument("--tokens", default=",".join(map(str, TOKEN_COUNTS)))
    parser.add_argument("--processes", type=int, default=0, help="compile beforehand with this many")
    parser.add_argument("--qqq", help="csrc/ of the repository of QQQ")
    parser.add_argument("--marlin", help="marlin/ of the repository of Marlin")
    parser.add_argument("--cutlass", help="include/ of the repository of CUTLASS, needed until compiled")
    parser.add_argument("--append", action="store_true", help="keep the rows of an existing record")
    parser.add_argument("--missing", action="store_true", help="with --append: measure only cases it lacks")
    parser.add_argument("--json", type=Path, help="write the record here instead of benchmarks/results")
    options = parser.parse_args(arguments)
    if options.missing and not options.append:
        parser.error("--missing needs --append: without it no case is there already")
    record.write(RECORD, run(options), to=options.json)


if __name__ == "__main__":
    main()
