# SPDX-License-Identifier: Apache-2.0
"""Time tiles of the table kernels against each other and write the fastest to `lut_linear/measured.json`.

    python -m benchmarks.kernels.weight_only_tables_tune [--seconds S] [--workers W] [--json FILE] [--samples FILE]

Worker processes first compile every candidate and check it on a small layer: close to float64, and the same bits
twice. Then the candidates of a case are captured in graphs over cold copies of the weight and replayed.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.kernels.timing import num_copies
from benchmarks.kernels.weight_only_tables import FORMATS, SPARSE_SHARE, Table, problem_of
from quattuor.kernels.lut_linear import measured
from quattuor.kernels.lut_linear.layout import block_k, prepare_tiles
from quattuor.kernels.lut_linear.reference import decoded_weight
from quattuor.kernels.lut_linear.triton_kernel import launch
from quattuor.kernels.w4a8_linear.planes import Tile

__all__ = ["candidates", "main"]

#: Layers and token counts that are tuned; a token count stands for its size of tile.
CASES = (((28672, 8192), (1, 16, 64)), ((11008, 4096), (1, 16)), ((4096, 4096), (1, 16)))
#: Rows, warps and stages that are tried by the tokens of a tile.
SIZES = {
    8: ((64, 4, 3), (64, 4, 5), (32, 2, 3), (128, 8, 3)),
    16: ((64, 4, 2), (64, 4, 3), (32, 2, 3)),
    64: ((64, 4, 2), (32, 2, 2), (128, 8, 2)),
}
SPLITS = (2, 3, 4, 8)
CHECK_SHAPE = (400, 2048)
LARGEST_ERROR = 1.5e-3
REPLAYS = 5

Sample = dict[str, str | int | float | bool]


def candidates(tokens: int) -> Iterator[Tile]:
    """Return one tile, cut in two or not, for everything that is compiled."""
    for (rows, num_warps, num_stages), overlap in itertools.product(SIZES[tokens], ("none", "early")):
        if overlap == "none" or (rows, tokens) == (64, 8):
            yield Tile(
                rows=rows, tokens=tokens, split=2, num_warps=num_warps, num_stages=num_stages, overlap=overlap
            )
    rows, num_warps, num_stages = SIZES[tokens][0]
    yield Tile(rows=rows, tokens=tokens, split=1, num_warps=num_warps, num_stages=num_stages)


def random_operand(shape: tuple[int, int], kind: Table) -> tuple[dict[str, Tensor], Tensor]:
    """Return a random layer as the kernel takes it, and its weight in float32."""
    problem = problem_of(shape, kind)
    codes = torch.randint(2**kind.bits, shape, device="cuda", dtype=torch.uint8)
    table = torch.randn(shape[0], problem.num_groups, problem.table_size, device="cuda").half()
    offset = torch.randn(shape[0], problem.num_groups, device="cuda").half() if kind.offset else None
    weight = decoded_weight(problem, codes, table, offset)
    entries: tuple[Tensor | None, ...] = (None, None, None)
    if kind.sparse:
        mask = torch.rand(shape, device="cuda") < SPARSE_SHARE
        row_offsets = torch.zeros(shape[0] + 1, dtype=torch.int32, device="cuda")
        row_offsets[1:] = mask.sum(dim=1).cumsum(0)
        columns = mask.nonzero()[:, 1].to(torch.int16)
        values = torch.randn(columns.shape, device="cuda").half()
        weight[mask] += values.float()
        entries = (row_offsets, columns, values)
    return prepare_tiles(problem, codes, table, offset, *entries), weight


def check(job: tuple[Table, Tile]) -> tuple[tuple[Table, Tile], str | None]:
    """Compile one candidate; return what is wrong with its result, or None."""
    kind, tile = job
    torch.manual_seed(0)
    operand, weight = random_operand(CHECK_SHAPE, kind)
    x = torch.randn(1 if tile.tokens == 8 else tile.tokens, CHECK_SHAPE[1], device="cuda").half()
    start, results = time.monotonic(), []
    for _ in range(2):
        out = torch.full((len(x), CHECK_SHAPE[0]), torch.nan, dtype=torch.float16, device="cuda")
        try:
            run(kind, CHECK_SHAPE, x, operand, out, tile)
        except OutOfResources as error:
            return job, str(error)
        results.append(out)
    torch.cuda.synchronize()
    seconds = time.monotonic() - start
    exact = x.double() @ weight.double().T
    error = float((results[0] - exact).norm() / exact.norm())
    if not error < LARGEST_ERROR:
        return job, f"relative error {error:.5f}"
    if not torch.equal(*results):
        return job, "a second run gives other bits"
    if seconds > 8:
        print(f"{seconds:.1f} s to compile {kind} {tile}", file=sys.stderr)
    return job, None


def run(
    kind: Table, shape: tuple[int, int], x: Tensor, operand: dict[str, Tensor], out: Tensor, tile: Tile
) -> None:
    """Launch one candidate."""
    launch(problem_of(shape, kind), x, operand, None, out, tile=tile, is_masked=kind.kind == "planes")


def latency_us(launches: int, call) -> float:
    """Return the median latency of `call(i)` in a replayed graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i)
    found = []
    for replay in range(REPLAYS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if replay:
            found.append(start.elapsed_time(stop) * 1e3 / launches)
    return sorted(found)[len(found) // 2]


def time_case(
    kind: Table, shape: tuple[int, int], num_tokens: int, tiles: list[Tile], operands: list[dict[str, Tensor]]
) -> list[Sample]:
    """Time every tile with every cut of K."""
    problem, copies = problem_of(shape, kind), len(operands)
    x = torch.randn(num_tokens, shape[1], device="cuda").half()
    out = torch.empty(num_tokens, shape[0], dtype=torch.float16, device="cuda")
    launches = copies * max(1, round(12 / copies))
    samples: list[Sample] = []
    for tile in tiles:
        for split in SPLITS if tile.split > 1 else (1,):
            if split > shape[1] // block_k(problem):
                continue
            cut = dataclasses.replace(tile, split=split)
            taken = latency_us(launches, lambda i, cut=cut: run(kind, shape, x, operands[i % copies], out, cut))
            samples.append(
                {
                    "kind": kind.kind,
                    "bits": kind.bits,
                    "grouped": kind.group_size is not None,
                    "n": shape[0],
                    "k": shape[1],
                    **{name: value for name, value in dataclasses.asdict(cut).items() if name != "fetch"},
                    "latency_us": round(taken, 2),
                }
            )
    return sorted(samples, key=lambda sample: sample["latency_us"])


def tune(options: argparse.Namespace) -> None:
    """Compile, time, and write the choices after each layer."""
    start = time.monotonic()
    jobs = [(kind, tile) for kind in FORMATS for tokens in SIZES for tile in candidates(tokens)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        found = list(pool.imap_unordered(check, jobs))
    good = {job for job, reason in found if reason is None}
    for (kind, tile), reason in found:
        if reason:
            print(f"left out: {kind} {tile}: {reason}", flush=True)
    print(f"{len(good)} of {len(jobs)} compiled in {time.monotonic() - start:.0f} s", flush=True)
    choices: list[Sample] = []
    samples: list[Sample] = []
    for (shape, token_counts), kind in itertools.product(CASES, FORMATS):
        operand, _ = random_operand(shape, kind)
        operands = [operand]
        for _ in range(num_copies(operand["packed"].nbytes) - 1):
            fresh = {name: tensor.clone() for name, tensor in operand.items()}
            operands.append(fresh | {"packed": torch.randint_like(operand["packed"], -(2**15), 2**15)})
        for num_tokens in token_counts:
            if time.monotonic() - start > options.seconds:
                print("time is up", flush=True)
                return
            tokens = max(8, num_tokens)
            tiles = [tile for tile in candidates(tokens) if (kind, tile) in good]
            timed = time_case(kind, shape, num_tokens, tiles, operands)
            samples += timed
            choices += timed[:1]
            options.json.write_text(json.dumps(choices, indent=1) + "\n")
            options.samples.write_text(json.dumps(samples) + "\n")
            print(shape, kind.name, kind.bits, kind.group_size, num_tokens, describe(timed), flush=True)


def describe(samples: list[Sample]) -> str:
    """Return the fastest four and the slowest tile of a case on one line."""
    names = ("latency_us", "rows", "split", "num_warps", "num_stages", "overlap")
    return " | ".join("/".join(str(sample[name]) for name in names) for sample in [*samples[:4], *samples[-1:]])


def main(arguments: list[str] | None = None) -> None:
    """Tune within a time limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="start no case after this time")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--json", type=Path, default=measured.FILE, help="where the choices go")
    parser.add_argument("--samples", type=Path, default=Path("samples.json"), help="where every timing goes")
    tune(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
