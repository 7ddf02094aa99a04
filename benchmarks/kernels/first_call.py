# SPDX-License-Identifier: Apache-2.0
"""Time the first call of a layer: with an empty cache of compiled kernels, and with what it leaves on disk.

    python -m benchmarks.kernels.first_call [--cases NAME,...] [--processes P] [--append] [--json FILE]

Every measurement is a process of its own, forked before the device is touched. Its clock starts when the device is
ready and the weight laid out, and stops when the result of the first call is there: compiling, loading and
computing count, importing does not. The record has a row for each case: seconds of both first calls, and what the
compiler took for each kernel. `--append` keeps the rows of other cases.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import record
from benchmarks.kernels.appending import existing_rows
from quattuor.kernels import lut_linear, token_quantize, w4a8_linear, w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = ["CASES", "main"]

RECORD = "kernels_first_call"
OUT_FEATURES = IN_FEATURES = 4096
Row = dict[str, str | int | float | bool | None]
Call = Callable[[], object]


def integer_layer(num_tokens: int, bits: int, group_size: int | None, force: str | None) -> Call:
    """Return the first call of a layer with 8-bit activations, their quantization included."""
    problem = LinearProblem(
        out_features=OUT_FEATURES,
        in_features=IN_FEATURES,
        weight_bits=bits,
        group_size=group_size,
        integer_group_scale=group_size is not None,
        **describe_device("cuda"),
    )
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (OUT_FEATURES, IN_FEATURES), dtype=torch.int8, device="cuda")
    group_scale = None
    if group_size is not None:
        group_scale = torch.ones(OUT_FEATURES, problem.num_groups, dtype=torch.float16, device="cuda")
    plan = w4a8_linear.plan(problem, force=force)
    operand = plan.prepare(codes, torch.rand(OUT_FEATURES, device="cuda"), group_scale)
    x = torch.randn(num_tokens, IN_FEATURES, dtype=torch.float16, device="cuda")
    return lambda: plan.linear(*token_quantize.token_quantize(x), operand)


def float_layer(num_tokens: int, group_size: int, force: str) -> Call:
    """Return the first call of a layer with float16 activations."""
    problem = LinearProblem(
        out_features=OUT_FEATURES,
        in_features=IN_FEATURES,
        group_size=group_size,
        activation_bits=16,
        **describe_device("cuda"),
    )
    codes = torch.randint(-8, 8, (OUT_FEATURES, IN_FEATURES), dtype=torch.int8, device="cuda")
    plan = w4a16_linear.plan(problem, force=force)
    operand = plan.prepare(codes, torch.rand(OUT_FEATURES, problem.num_groups, device="cuda").half())
    x = torch.randn(num_tokens, IN_FEATURES, dtype=torch.float16, device="cuda")
    return lambda: plan.linear(x, operand)


def table_layer(num_tokens: int) -> Call:
    """Return the first call of a layer with a codebook of 16 entries per row."""
    problem = LutProblem(
        out_features=OUT_FEATURES,
        in_features=IN_FEATURES,
        weight_bits=4,
        kind="codebook",
        **describe_device("cuda"),
    )
    codes = torch.randint(0, 16, (OUT_FEATURES, IN_FEATURES), dtype=torch.uint8, device="cuda")
    plan = lut_linear.plan(problem, force="lanes")
    operand = plan.prepare(codes, torch.rand(OUT_FEATURES, 1, 16, device="cuda").half())
    x = torch.randn(num_tokens, IN_FEATURES, dtype=torch.float16, device="cuda")
    return lambda: plan.linear(x, operand)


#: Case by name; 4-bit layers of 4096 x 4096 unless the name says otherwise.
CASES: dict[str, Callable[[], Call]] = {
    "w4a8_triton_1_token": partial(integer_layer, 1, 4, None, "triton"),
    "w4a8_triton_group128_1_token": partial(integer_layer, 1, 4, 128, "triton"),
    "w4a8_lanes_1_token": partial(integer_layer, 1, 4, None, "lanes"),
    "w4a8_lanes_group128_1_token": partial(integer_layer, 1, 4, 128, "lanes"),
    "w4a8_gluon_16_tokens": partial(integer_layer, 16, 4, None, "gluon"),
    "w4a8_gluon_1024_tokens": partial(integer_layer, 1024, 4, None, "gluon"),
    "w4a8_gluon_group128_16_tokens": partial(integer_layer, 16, 4, 128, "gluon"),
    "w4a8_gluon_group128_1024_tokens": partial(integer_layer, 1024, 4, 128, "gluon"),
    "w4a8_triton_3_bits_1_token": partial(integer_layer, 1, 3, None, "triton"),
    "w8a8_triton_1_token": partial(integer_layer, 1, 8, None, "triton"),
    "w8a8_triton_1024_tokens": partial(integer_layer, 1024, 8, None, "triton"),
    "w4a16_triton_group128_1_token": partial(float_layer, 1, 128, "triton"),
    "w4a16_triton_group128_1024_tokens": partial(float_layer, 1024, 128, "triton"),
    "w4a16_gluon_group128_128_tokens": partial(float_layer, 128, 128, "gluon"),
    "w4a16_gluon_group128_1024_tokens": partial(float_layer, 1024, 128, "gluon"),
    "lut_lanes_1_token": partial(table_layer, 1),
}


def run(job: tuple[str, str]) -> tuple[float, dict[str, float]]:
    """Return the seconds of a case's first call in this process, and those of the compiler for each kernel."""
    case, folder = job
    os.environ["TRITON_CACHE_DIR"] = folder
    torch.zeros(1, device="cuda")
    call = CASES[case]()
    torch.cuda.synchronize()
    kernels: dict[str, float] = {}

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            kernels[src.name] = kernels.get(src.name, 0.0) + times.total * 1e-6

    triton.knobs.compilation.listener = listen
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, kernels


def measure(cases: list[str], processes: int) -> list[Row]:
    """Run each case in two processes that share a cache on disk, which is empty for the first."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(case, os.path.join(folder, case)) for case in cases]
        found = []
        for _ in range(2):
            with context.Pool(processes, maxtasksperchild=1) as pool:
                found.append(pool.map(run, jobs, chunksize=1))
    rows: list[Row] = []
    for case, (first_s, kernels), (again_s, _) in zip(cases, *found, strict=True):
        rows.append(
            {
                "case": case,
                "first_call_seconds": round(first_s, 3),
                "first_call_with_cache_seconds": round(again_s, 3),
                "compile_seconds": round(sum(kernels.values()), 3),
                "compile_seconds_by_kernel": ", ".join(f"{name} {took:.2f}" for name, took in kernels.items()),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure the cases and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--processes", type=int, default=3, help="measure so many cases at the same time")
    parser.add_argument("--append", action="store_true", help="keep the rows of other cases")
    parser.add_argument("--json", type=Path, help="write the record here instead of benchmarks/results")
    options = parser.parse_args(arguments)
    kept = existing_rows(options.json or record.RESULTS / f"{RECORD}.json") if options.append else []
    cases = options.cases.split(",")
    kept = [row for row in kept if row["case"] in CASES and row["case"] not in cases]
    rows = [*kept, *measure(cases, options.processes)]
    rows.sort(key=lambda row: list(CASES).index(row["case"]))
    record.write(RECORD, rows, to=options.json)


if __name__ == "__main__":
    main()
