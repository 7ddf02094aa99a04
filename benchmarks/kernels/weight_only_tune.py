# SPDX-License-Identifier: Apache-2.0
"""Find the fastest tile of the weight-only Triton kernels, and write what was found.

    python -m benchmarks.kernels.weight_only_tune [--processes P] [--seconds S] [--shapes NxK,...] [--bits B,...]
        [--groups G,...] [--zero-points 0,1] [--tokens M,...] [--json FILE]

Every candidate is compared with the product with the decoded weight before it is timed, twice, since its bits
must repeat; one that fails stops the run. Timing is that of `benchmarks.kernels.timing`. What the file holds and
the run does not measure stays.
"""

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.kernels.timing import Batch, Contender, median_latencies
from benchmarks.kernels.weight_only import SHAPES, floor_us, make_batch
from benchmarks.kernels.weight_only_uniform import Uniform, gate_of, layers_of, problem_of
from quattuor.kernels.dispatch import Operand, describe_device
from quattuor.kernels.w4a16_linear import measured, triton_kernel
from quattuor.kernels.w4a16_linear.digits import launch_digits
from quattuor.kernels.w4a16_linear.lanes import launch_lanes
from quattuor.kernels.w4a16_linear.pairs import launch_pairs
from quattuor.kernels.w4a16_linear.planes import (
    MIN_BYTES_PLANE,
    DigitTile,
    LaneTile,
    Layout,
    PairTile,
    Tile,
    layout_of,
)
from quattuor.kernels.w4a16_linear.triton import FEW, LARGE

__all__ = ["candidates", "main"]

#: The token count that is timed, by the largest that it stands for.
TIMED = {1: 1, 2: 2, 4: 4, 8: 8, 16: 16, 32: 32, 64: 64, 128: 128, 256: 256}
PROCESSORS = 132
SHARED_BYTES = 227 * 1024

AnyTile = Tile | DigitTile | LaneTile | PairTile
Found = list[tuple[float, AnyTile]]


def candidates(shape: tuple[int, int], max_tokens: int, kind: Uniform) -> Iterator[AnyTile]:
    """Yield the tiles worth timing."""
    layout = layout_of(problem_of(shape, kind))
    num_tokens = TIMED[max_tokens]
    if max_tokens <= FEW and layout.plane_k >= MIN_BYTES_PLANE:
        yield from lane_tiles(shape, max_tokens)
        if max_tokens == 1 and layout.pieces(kind.group_size) > 1:
            yield from pair_tiles(shape, layout)
        if shape[0] * shape[1] >= LARGE:
            yield from digit_tiles(shape, layout, kind)
    for rows, tokens, num_warps, stages, per_processors in tile_sizes(max_tokens):
        splits = dict.fromkeys(
            split_of(shape, layout, -(-shape[0] // rows) * -(-num_tokens // tokens), per_processor)
            for per_processor in per_processors
        )
        for num_stages, split in itertools.product(stages, splits):
            shared = num_stages * 2 * (rows * layout.words * layout.plane_k + tokens * layout.block_k)
            if shared <= SHARED_BYTES:
                yield Tile(rows=rows, tokens=tokens, split=split, num_warps=num_warps, num_stages=num_stages)


def split_of(shape: tuple[int, int], layout: Layout, tiles: int, per_processor: int) -> int:
    """Return the parts of K that make about so many programs for each multiprocessor."""
    num_blocks = -(-shape[1] // layout.block_k)
    return max(1, min(PROCESSORS * per_processor // tiles, num_blocks // 2))


#: By the warps of a program of `lanes`: blocks loaded ahead, whether they are held, turns brought to L2, overlap.
LANE_WAYS = {
    1: ((1, True, 0, "own"), (2, True, 0, "own")),
    2: ((1, True, 0, "own"), (1, False, 0, "own"), (1, True, 0, "late")),
    4: ((1, True, 0, "own"), (1, False, 0, "own"), (1, True, 0, "late"), (1, True, 2, "late")),
    8: ((1, True, 0, "own"), (1, False, 0, "own")),
}
#: Warps and stages of `digits`, whether lanes load scales directly, blocks brought to L2, overlap.
DIGIT_WAYS = (
    (2, 3, True, 0, "own"),
    (2, 4, True, 0, "own"),
    (2, 4, True, 4, "own"),
    (2, 4, True, 0, "late"),
    (2, 4, True, 4, "late"),
    (2, 4, False, 0, "own"),
    (4, 3, False, 0, "own"),
    (4, 3, False, 0, "late"),
    (4, 3, False, 4, "late"),
)


def lane_tiles(shape: tuple[int, int], max_tokens: int) -> Iterator[LaneTile]:
    """Yield tiles of `lanes`: a part of the warps that the device holds at once, or a few times as many."""
    for num_warps, ways in LANE_WAYS.items():
        if 6 <= -(-shape[0] // 16) * num_warps / PROCESSORS <= 64:
            for depth, holds, before, overlap in ways if max_tokens == 1 else ways[:1]:
                yield LaneTile(num_warps=num_warps, depth=depth, holds=holds, before=before, overlap=overlap)


def pair_tiles(shape: tuple[int, int], layout: Layout) -> Iterator[PairTile]:
    """Yield tiles of `pairs`, as those of `lanes`."""
    for num_warps in (1, 2, 4, 8):
        has_blocks = num_warps * layout.block_k <= shape[1]
        if has_blocks and 6 <= -(-shape[0] // 16) * num_warps / PROCESSORS <= 64:
            for is_early, overlap in itertools.product((False, True), ("own", "late")):
                yield PairTile(num_warps=num_warps, is_early=is_early, overlap=overlap)


def digit_tiles(shape: tuple[int, int], layout: Layout, kind: Uniform) -> Iterator[DigitTile]:
    """Yield tiles of `digits`; without groups no scales are loaded in the loop, by whatever way."""
    split = split_of(shape, layout, -(-shape[0] // 64), 4)
    for num_warps, num_stages, is_direct, before, overlap in DIGIT_WAYS:
        if is_direct or kind.group_size or num_warps == 4:
            sizes = {"rows": 64, "tokens": 2, "split": split, "num_warps": num_warps, "num_stages": num_stages}
            yield DigitTile(**sizes, overlap=overlap, before=before, is_direct=is_direct)


def tile_sizes(max_tokens: int) -> Iterator[tuple]:
    """Yield rows, tokens, warps, stages and programs per multiprocessor of the kernel for any number of tokens."""
    if max_tokens <= 8:
        yield 64, 8, 4, (3,), (4,)
    if max_tokens == 16:
        yield 64, 16, 4, (3,), (3,)
    if max_tokens == 32:
        yield 64, 32, 4, (2, 3, 4), (2, 3)
        yield 128, 32, 8, (2, 3), (1, 2)
    if max_tokens in (64, 128):
        yield 64, 64, 4, (2, 3), (1, 2, 3)
    if max_tokens >= 64:
        yield 128, 64, 8, (2, 3), (1, 2)


def launch(kind: Uniform, tile: AnyTile, batch: Batch, operand: Operand) -> torch.Tensor:
    """Compute the layer with a tile."""
    tensors = operand.layout("fields")
    shape = (tensors["packed"].shape[0] * 128, batch.x.shape[1])
    out = torch.empty(batch.x.shape[0], shape[0], dtype=torch.float16, device="cuda")
    weight = (tensors["packed"], tensors["scale"], tensors.get("zero_point"))
    options = {"layout": layout_of(problem_of(shape, kind)), "group_size": kind.group_size, "tile": tile}
    if isinstance(tile, LaneTile):
        launch_lanes(batch.x, *weight, None, out, **options)
    elif isinstance(tile, PairTile):
        launch_pairs(batch.x, *weight, None, out, **options)
    else:
        start = launch_digits if isinstance(tile, DigitTile) else triton_kernel.launch
        start(batch.x, *weight, tensors["arrivals"], None, out, **options)
    return out


def time_case(
    shape: tuple[int, int], kind: Uniform, max_tokens: int, decoded: torch.Tensor, layers: list[Operand]
) -> Found:
    """Return (latency in us, tile) of every candidate, fastest first."""
    batch = make_batch(TIMED[max_tokens], shape[1])
    tiles = list(candidates(shape, max_tokens, kind))
    contenders = []
    for tile in tiles:

        def run(batch: Batch, i: int, tile: AnyTile = tile) -> torch.Tensor:
            return launch(kind, tile, batch, layers[i % len(layers)])

        reason = gate_of(run, decoded)(batch)
        if reason:
            raise RuntimeError(f"{shape} {kind} {TIMED[max_tokens]} tokens: {tile}: {reason}")
        contenders.append(
            Contender(
                name="quattuor",
                granularity=str(kind),
                includes_activation_quantization=False,
                copies=len(layers),
                run=run,
            )
        )
    lowest_us = floor_us(kind.weight_bytes(*shape), TIMED[max_tokens], *shape)
    latencies = median_latencies(contenders, batch, lowest_us)
    return sorted(zip(latencies, tiles, strict=True), key=lambda item: item[0])


def compile_one(job: tuple[tuple[int, int], Uniform, int, AnyTile]) -> None:
    """Run one candidate on a part of the layer, so that its kernel lies in the cache on disk."""
    shape, kind, max_tokens, tile = job
    part = (256, shape[1])
    _, layers = layers_of(part, kind)
    launch(kind, tile, make_batch(TIMED[max_tokens], shape[1]), layers[0])
    torch.cuda.synchronize()


def compile_jobs(cases: list[tuple[tuple[int, int], Uniform]], counts: list[int]) -> list[tuple]:
    """Return one job for each kernel that will be compiled."""
    jobs: dict[tuple, tuple] = {}
    for (shape, kind), max_tokens in itertools.product(cases, counts):
        is_even = shape[1] % layout_of(problem_of(shape, kind)).block_k == 0
        for tile in candidates(shape, max_tokens, kind):
            fields = asdict(tile)
            is_split = fields.pop("split", 1) > 1
            jobs.setdefault((kind, is_even, is_split, *fields.values()), (shape, kind, max_tokens, tile))
    return list(jobs.values())


def row_of(shape: tuple[int, int], kind: Uniform, max_tokens: int, latency_us: float, tile: AnyTile) -> dict:
    """Return a row of the file."""
    return {
        "n": shape[0],
        "k": shape[1],
        "bits": kind.bits,
        "group_size": kind.group_size,
        "zero_point": kind.zero_point,
        "max_tokens": max_tokens,
        "latency_us": round(latency_us, 2),
        "tile": asdict(tile),
    }


def save(rows: list[dict], file: Path) -> None:
    """Write the rows, and those of the shipped file that they do not replace."""
    old = json.loads(measured.FILE.read_text()) if measured.FILE.is_file() else {"choices": []}
    keys = ("n", "k", "bits", "group_size", "zero_point", "max_tokens")
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in old["choices"] if tuple(row[key] for key in keys) not in new]
    choices = sorted(kept + rows, key=lambda row: tuple((row[key] is None, row[key] or 0) for key in keys))
    content = {
        "measured_on": torch.cuda.get_device_name(),
        "compute_capability": describe_device("cuda")["compute_capability"],
        "choices": choices,
    }
    file.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Time the candidates within a time limit and write the choices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="compile with this many")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after this time")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--bits", default="2,3,4,8")
    parser.add_argument("--groups", default="128", help="0 for one scale per row")
    parser.add_argument("--zero-points", default="0", help="0 without, 1 with, or both")
    parser.add_argument("--tokens", default=",".join(map(str, TIMED)), help="largest counts, of those here")
    parser.add_argument("--json", type=Path, default=measured.FILE)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    kinds = [
        Uniform(bits=int(bits), group_size=int(group) or None, zero_point=zero == "1")
        for bits, group, zero in itertools.product(
            options.bits.split(","), options.groups.split(","), options.zero_points.split(",")
        )
    ]
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes.split(",")]
    counts = [int(text) for text in options.tokens.split(",")]
    cases = list(itertools.product(shapes, kinds))
    jobs = compile_jobs(cases, counts)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        pool.map(compile_one, jobs, chunksize=1)
    print(f"{len(jobs)} kernels, {deadline - time.monotonic():.0f} s left", flush=True)
    rows: list[dict] = []
    for shape, kind in cases:
        decoded, layers = layers_of(shape, kind)
        for max_tokens in counts:
            if time.monotonic() > deadline:
                return
            found = time_case(shape, kind, max_tokens, decoded, layers)
            for latency_us, tile in found:
                print(f"  {latency_us:.2f} {' '.join(map(str, asdict(tile).values()))}")
            print(f"{shape} {kind} {TIMED[max_tokens]}: {found[0][0]:.2f}", flush=True)
            rows.append(row_of(shape, kind, max_tokens, *found[0]))
            save(rows, options.json)


if __name__ == "__main__":
    main()
