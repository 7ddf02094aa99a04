# SPDX-License-Identifier: Apache-2.0
"""Run every GPU kernel on small layers under the memory, race and synchronization checkers of compute-sanitizer.

    python -m benchmarks.kernels.sanitize [--cases NAME,...] [--tools NAME,...] [--processes P] [--append]
        [--json FILE]

Each case first runs without a checker, which compiles its kernels and compares them with the reference on the CPU,
bit for bit where the sums are integers. Then it runs under each checker, with one allocation per tensor so that an
access beyond a tensor is seen. The record has a row for each case and checker; the case `planted` writes beyond
its tensor on purpose and shows that the memory checker looks, and `specialized_warps` is a kernel whose warps
share nothing, so that what is reported of it lies in what the compiler adds for specialized warps.

`--append` keeps the rows of other cases.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from quattuor.kernels import lut_linear, sparse_product, token_quantize, w4a8_linear, w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.token_quantize import reference

__all__ = ["CASES", "main", "summary"]

RECORD = "kernels_sanitize"
TOOLS = ("memcheck", "racecheck", "synccheck")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
OUT_FEATURES, IN_FEATURES = 200, 528
#: Bits, group size, and whether group scales are integers.
Layout = tuple[int, int | None, bool]
Row = dict[str, str | int | float | bool | None]


def integer_products(
    implementation: str, layouts: tuple[Layout, ...], zero_point: bool = False, in_features: int = IN_FEATURES
) -> None:
    """Compare W4A8 and W8A8 layers with the reference, with odd numbers of tokens and a bias."""
    for bits, group_size, is_integer in layouts:
        problem = LinearProblem(
            out_features=OUT_FEATURES,
            in_features=in_features,
            weight_bits=bits,
            group_size=group_size,
            integer_group_scale=is_integer,
            activation_zero_point=zero_point,
        )
        half = 2 ** (bits - 1)
        codes = torch.randint(-half, half, (OUT_FEATURES, in_features), dtype=torch.int8)
        scale, group_scale = torch.randn(OUT_FEATURES) * 0.01, None
        if group_size is not None:
            largest = 127 // half
            group_scale = torch.randint(1, largest + 1, (OUT_FEATURES, problem.num_groups)).half()
        bias = torch.randn(OUT_FEATURES).half()
        exact = w4a8_linear.plan(problem, force="reference")
        plan = w4a8_linear.plan(replace(problem, **describe_device("cuda")), force=implementation)
        exact_operand = exact.prepare(codes, scale, group_scale)
        operand = plan.prepare(*(None if t is None else t.cuda() for t in (codes, scale, group_scale)))
        for num_tokens in (3, 40, 130):
            inputs = [
                torch.randint(-127, 128, (num_tokens, in_features), dtype=torch.int8),
                torch.rand(num_tokens),
            ]
            zeros = torch.randint(-128, 128, (num_tokens,), dtype=torch.int8) if zero_point else None
            expected = exact.linear(*inputs, exact_operand, bias, x_zero_point=zeros)
            found = plan.linear(
                *(tensor.cuda() for tensor in inputs),
                operand,
                bias.cuda(),
                x_zero_point=None if zeros is None else zeros.cuda(),
            )
            assert torch.equal(found.cpu(), expected), f"{problem}, {num_tokens} tokens"


def assert_close(found: torch.Tensor, expected: torch.Tensor, case: object) -> None:
    """Raise AssertionError unless the relative error is that of another order of sums."""
    error = float((found.cpu().float() - expected.float()).norm() / expected.float().norm())
    assert error < 2e-3, f"{case}: relative error {error:.4f}"


FLOAT_FORMATS = ((4, 128, True), (4, 32, False), (3, 64, False), (8, None, True))


def float_products(
    dtype: torch.dtype, token_counts: tuple[int, ...], implementation: str = "triton", formats=FLOAT_FORMATS
) -> None:
    """Compare W4A16 layers with the reference; activations of 4 bytes take the kernels for few tokens.

    A format is its bits, its group size and whether it has zero points, real ones for triton.
    """
    for bits, group_size, has_zero_point in formats:
        problem = LinearProblem(
            out_features=OUT_FEATURES,
            in_features=IN_FEATURES,
            weight_bits=bits,
            group_size=group_size,
            zero_point=has_zero_point,
            activation_bits=16,
        )
        codes = torch.randint(0, 2**bits, (OUT_FEATURES, IN_FEATURES), dtype=torch.uint8)
        codes = codes if has_zero_point else (codes.int() - 2 ** (bits - 1)).to(torch.int8)
        scale = torch.randn(OUT_FEATURES, problem.num_groups)
        zero_point = torch.rand(OUT_FEATURES, problem.num_groups) * 2**bits if has_zero_point else None
        if has_zero_point and implementation == "gluon":
            zero_point = zero_point.floor()
        exact = w4a16_linear.plan(problem, force="reference")
        plan = w4a16_linear.plan(replace(problem, **describe_device("cuda")), force=implementation)
        exact_operand = exact.prepare(codes, scale, zero_point)
        operand = plan.prepare(*(None if t is None else t.cuda() for t in (codes, scale, zero_point)))
        for num_tokens in token_counts:
            x = torch.randn(num_tokens, IN_FEATURES).to(dtype)
            assert_close(plan.linear(x.cuda(), operand), exact.linear(x, exact_operand), problem)


def table_products() -> None:
    """Compare layers with look-up tables with the reference; an entry in every row is kept apart."""
    for kind, bits, group_size in (
        ("codebook", 4, None),
        ("codebook", 3, 64),
        ("planes", 3, 128),
        ("planes", 2, None),
    ):
        is_whole = group_size is None
        problem = LutProblem(
            out_features=OUT_FEATURES,
            in_features=IN_FEATURES,
            weight_bits=bits,
            kind=kind,
            group_size=group_size,
            offset=kind == "planes",
            sparse=is_whole,
        )
        codes = torch.randint(0, 2**bits, (OUT_FEATURES, IN_FEATURES), dtype=torch.uint8)
        table = torch.randn(OUT_FEATURES, problem.num_groups, problem.table_size).half()
        offset = torch.randn(OUT_FEATURES, problem.num_groups).half() if problem.offset else None
        columns = torch.randint(IN_FEATURES, (OUT_FEATURES,), dtype=torch.int16)
        entries = torch.arange(OUT_FEATURES + 1, dtype=torch.int32), columns, torch.randn(OUT_FEATURES).half()
        exact = lut_linear.plan(problem, force="reference")
        plan = lut_linear.plan(replace(problem, **describe_device("cuda")), force="lanes")
        exact_operand = exact.prepare(codes, table, offset, entries if is_whole else None)
        operand = plan.prepare(
            codes.cuda(),
            table.cuda(),
            None if offset is None else offset.cuda(),
            tuple(tensor.cuda() for tensor in entries) if is_whole else None,
        )
        for num_tokens in (1, 3, 40, 130):
            x = torch.randn(num_tokens, IN_FEATURES).half()
            assert_close(plan.linear(x.cuda(), operand), exact.linear(x, exact_operand), problem)


def quantizations() -> None:
    """Compare token quantization, alone and fused, with the reference; one row is longer than a block."""
    for shape in ((3, 127), (5, 1040), (2, 20000)):
        x, other, gain = torch.randn(shape).half(), torch.randn(shape).half(), torch.randn(shape[1])
        on_gpu = [tensor.cuda() for tensor in (x, other, gain)]
        codes, scale = token_quantize.token_quantize(on_gpu[0])
        expected = reference.quantize_tokens(x)
        assert torch.equal(codes.cpu(), expected[0])
        assert torch.equal(scale.cpu(), expected[1])
        norm = token_quantize.rms_norm_quantize(on_gpu[0], on_gpu[2], 1e-6, on_gpu[1])
        gate = token_quantize.silu_mul_quantize(on_gpu[0], on_gpu[1])
        assert_close(norm[1], reference.rms_norm_quantize_tokens(x, gain, 1e-6, other)[1], shape)
        assert_close(gate[1], reference.silu_mul_quantize_tokens(x, other)[1], shape)


def sparse_products() -> None:
    """Compare products with single entries with the reference; one row has none, one is full."""
    mask = torch.rand(OUT_FEATURES, IN_FEATURES) < 0.02
    mask[0], mask[1] = False, True
    offsets = torch.zeros(OUT_FEATURES + 1, dtype=torch.int32)
    offsets[1:] = mask.sum(dim=1).cumsum(0)
    columns = mask.nonzero()[:, 1].to(torch.int16)
    entries = offsets, columns, torch.randn(columns.numel()).half()
    for num_tokens in (1, 3, 40, 130):
        x = torch.randn(num_tokens, IN_FEATURES).half()
        found = sparse_product.sparse_product(x.cuda(), *(tensor.cuda() for tensor in entries))
        assert_close(found, sparse_product.sparse_product(x, *entries), num_tokens)


def planted() -> None:
    """Write one block beyond the end of a tensor."""
    from quattuor.kernels.token_quantize.triton_kernel import token_quantize_kernel

    x = torch.randn(2, 256, device="cuda")
    codes = torch.empty(1, 256, dtype=torch.int8, device="cuda")  # a row too few
    options = {"STEP": 256, "STEPS": 1, "IS_WHOLE": True, "OVERLAP": False, "DEVICE": True, "num_warps": 1}
    token_quantize_kernel[(2,)](x, codes, torch.empty(2, device="cuda"), 256, x.stride(0), **options)


def specialized_warps() -> None:
    """Run the least kernel with specialized warps."""
    from benchmarks.kernels.specialized import specialized_sum

    assert specialized_sum() == 2 * 128 * (1 + 2 + 3)


FOUR_BITS = ((4, None, False), (4, 128, True), (4, 128, False))
OTHER_BITS = ((2, None, False), (3, None, False), (2, 128, True), (3, 64, False), (6, None, False))
CASES: dict[str, Callable[[], None]] = {
    "w4a8_gluon": partial(integer_products, "gluon", FOUR_BITS),
    "w4a8_lanes": partial(integer_products, "lanes", (*FOUR_BITS, (4, 32, True)), in_features=768),
    "w4a8_triton": partial(integer_products, "triton", FOUR_BITS),
    "w4a8_triton_other_bits": partial(integer_products, "triton", OTHER_BITS),
    "w8a8_triton": partial(integer_products, "triton", ((8, None, False),)),
    "w8a8_triton_zero_point": partial(integer_products, "triton", ((8, None, False), (4, 128, True)), True),
    "w4a16_triton": partial(float_products, torch.float16, (3, 40, 130)),
    "w4a16_gluon": partial(
        float_products,
        torch.float16,
        (3, 40, 130, 600),
        "gluon",
        ((4, 128, True), (4, 32, False), (8, None, True)),
    ),
    "w4a16_few_tokens": partial(float_products, torch.float32, (1, 2, 3)),
    "lut_lanes": table_products,
    "token_quantize_triton": quantizations,
    "sparse_product_triton": sparse_products,
    "specialized_warps": specialized_warps,
    "planted": planted,
}


def summary(output: str) -> int | None:
    """Return how many errors a checker reported, None when it did not reach its summary."""
    found = SUMMARY.findall(output)
    return int("".join(found[-1])) if found else None


def check(case: str, tool: str | None, timeout_s: float) -> tuple[int, str]:
    """Run a case in a process of its own, under a checker or without; return its exit status and output."""
    checker = [] if tool is None else ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
    command = [*checker, sys.executable, "-m", "benchmarks.kernels.sanitize", "--run", case]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        return 124, (expired.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def measure(options: argparse.Namespace) -> list[Row]:
    """Run the cases, each without a checker first; print what a checker says and return a row for each run."""
    cases, tools = options.cases.split(","), options.tools.split(",")
    with ThreadPoolExecutor(options.processes) as pool:
        plain = dict(zip(cases, pool.map(lambda case: check(case, None, options.timeout), cases), strict=True))
        jobs = []
        for case, (status, output) in plain.items():
            if status and case != "planted":
                print(f"{case} fails without a checker, exit status {status}\n{output[-3000:]}", file=sys.stderr)
                continue
            jobs += [(case, tool) for tool in tools if case != "planted" or tool == "memcheck"]
        results = pool.map(lambda job: check(*job, options.timeout), jobs)
        rows: list[Row] = []
        for (case, tool), (status, output) in zip(jobs, results, strict=True):
            errors = summary(output)
            row: Row = {"case": case, "tool": tool, "errors": errors, "finished": status != 124, "status": status}
            rows.append(row)
            print(row, flush=True)
            if status or errors:
                print(output[-6000:], file=sys.stderr, flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the cases under the checkers and write the record; one case alone with --run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--processes", type=int, default=14, help="run so many at the same time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one case under one checker")
    parser.add_argument("--append", action="store_true", help="keep the rows of other cases")
    parser.add_argument("--json", type=Path, help="write the record here instead of benchmarks/results")
    parser.add_argument("--run", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        torch.manual_seed(0)
        CASES[options.run]()
        torch.cuda.synchronize()
        return
    from benchmarks import record  # here: a case alone, under a checker, need not wait for what these import
    from benchmarks.kernels.appending import existing_rows

    kept = existing_rows(options.json or record.RESULTS / f"{RECORD}.json") if options.append else []
    found = measure(options)
    measured = {(row["case"], row["tool"]) for row in found}
    kept = [row for row in kept if row["case"] in CASES and (row["case"], row["tool"]) not in measured]
    rows = [*kept, *found]
    rows.sort(key=lambda row: (list(CASES).index(row["case"]), TOOLS.index(row["tool"])))
    record.write(RECORD, rows, to=options.json)


if __name__ == "__main__":
    main()
