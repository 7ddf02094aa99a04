# SPDX-License-Identifier: Apache-2.0
"""Find the fastest tile of the W4A8 kernels for the shapes in `benchmarks/shapes.py`, and write what was found.

    python -m benchmarks.kernels.tune [--processes P] [--seconds S] [--shapes NxK,...] [--tokens M,...]
        [--modes MODE,...] [--json FILE]

Every candidate is compared with the reference before it is timed; one that is wrong or refused by the compiler
stops the run. Timing is that of `benchmarks.kernels.timing`. For each range of token counts that dispatch knows,
one implementation is chosen; within it each token count has its own tile. What the file holds and the run does not
measure stays.
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.kernels.contenders import quantized_rows
from benchmarks.kernels.timing import Batch, Contender, floor_us, median_latencies, num_copies
from benchmarks.shapes import LINEAR_SHAPES
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import TOKEN_RANGES, LinearProblem, describe_device
from quattuor.kernels.token_quantize import token_quantize
from quattuor.kernels.w4a8_linear import gluon_kernel, lanes_kernel, measured, triton_kernel
from quattuor.kernels.w4a8_linear.hopper import Schedule, estimate, make_schedule
from quattuor.kernels.w4a8_linear.planes import (
    BLOCK_K,
    HopperTile,
    LanesTile,
    Tile,
    group_scale_of,
    mode_of,
    prepare_planes,
)

__all__ = ["candidates", "choose", "main"]

#: The token count that is timed, by the largest that it stands for.
TIMED = {1: 1, 8: 8, 16: 16, 32: 32, 64: 64, 128: 128, 256: 256, 512: 512, 1024: 1024, 8192: 4096}
GROUPS = {"channel": None, "integer": 128, "half": 128}
PROCESSORS = 132
#: Schedules whose longest program has more work than this times the mean are not timed.
UNFAIR = 1.6
AnyTile = Tile | HopperTile | LanesTile


def split_of(shape: tuple[int, int], num_tokens: int, rows: int, tokens: int, per_processor: int) -> int:
    """Return into how many parts K is cut so that each multiprocessor gets so many programs."""
    tiles = -(-shape[0] // rows) * -(-num_tokens // tokens)
    return max(1, min(PROCESSORS * per_processor // tiles, -(-shape[1] // BLOCK_K) // 4))


def schedule_of(shape: tuple[int, int], num_tokens: int, tile: HopperTile) -> Schedule:
    """Return the schedule of a layer on this device."""
    num_tiles = -(-shape[0] // tile.rows) * -(-num_tokens // tile.tokens)
    return make_schedule(num_tiles, -(-shape[1] // BLOCK_K), PROCESSORS * tile.per_processor, tile.cut)


def every_cut(shape: tuple[int, int], num_tokens: int, tile: HopperTile) -> Iterator[HopperTile]:
    """Yield the tile with each way to treat the last tiles, unless some program gets far more than the mean."""
    wave = PROCESSORS * tile.per_processor
    num_tiles = -(-shape[0] // tile.rows) * -(-num_tokens // tile.tokens)
    # equal pieces of each tile were always faster than equal shares where both are possible
    for cut in ("none", "aligned" if 2 * (num_tiles % wave) <= wave else "even"):
        candidate = dataclasses.replace(tile, cut=cut)
        schedule = schedule_of(shape, num_tokens, candidate)
        longest = -(-schedule.whole // schedule.programs) + (num_tiles - schedule.whole) / schedule.sharers
        if longest < UNFAIR * num_tiles / wave and (cut == "none" or schedule.whole < num_tiles):
            yield candidate


def triton_candidates(shape: tuple[int, int], max_tokens: int, channel: bool) -> Iterator[Tile]:
    """Yield the Triton tiles worth timing."""

    def tile(rows, tokens, num_warps, num_stages, overlap, per_processor=2):
        split = split_of(shape, max_tokens, rows, tokens, per_processor)
        return Tile(
            rows=rows, tokens=tokens, split=split, num_warps=num_warps, num_stages=num_stages, overlap=overlap
        )

    if max_tokens <= 32:
        # many stages leave room for two programs on a multiprocessor, which an early start needs
        pair = {8: 9, 16: 7, 32: 6}[max_tokens]
        for num_stages, overlap in ((3, "none"), (4, "none"), (5, "none"), (5, "late"), (pair, "early")):
            yield tile(64, max_tokens, 4, num_stages, overlap)
        if max_tokens <= 16:
            for num_stages, overlap in ((4, "late"), (6, "none"), (6, "early")):
                yield tile(64, max_tokens, 4, num_stages, overlap)
            for num_stages in (3, 4, 5):
                yield tile(64, max_tokens, 4, num_stages, "none", per_processor=num_stages)
    elif max_tokens == 64:
        for num_stages, overlap in ((4, "early"), (5, "early"), (4, "late")):
            yield tile(64, 64, 4, num_stages, overlap)
        for overlap in ("none", "late"):
            yield tile(128, 64, 8, 3, overlap)
    elif max_tokens == 128 and channel:
        for overlap in ("none", "late"):
            yield tile(64, 64, 4, 4, overlap, per_processor=3)
            yield tile(64, 128, 4, 3, overlap)
            yield tile(128, 64, 8, 3, overlap)


def lanes_candidates(shape: tuple[int, int]) -> Iterator[LanesTile]:
    """Yield the tiles for one token worth timing; some of them may be equal."""
    if shape[1] % BLOCK_K == 0:
        steps = -(-shape[1] // (4 * BLOCK_K))
        for rows, num_warps, ahead, cap in (
            (8, 4, 3, 64),
            (8, 4, 4, None),
            (8, 4, 4, 64),
            (8, 4, 6, 80),
            (8, 4, 8, 96),
            (8, 8, 8, None),
            (16, 8, 4, None),
            (16, 8, 5, None),
            (16, 4, 4, None),
        ):
            yield LanesTile(rows=rows, num_warps=num_warps, ahead=min(ahead, steps), max_registers=cap)


def hopper_candidates(max_tokens: int) -> Iterator[HopperTile]:
    """Yield the Hopper tiles worth timing, before the ways to cut the last ones."""
    # with a cap on registers two programs fit a multiprocessor
    paired = {"blocks": 1, "registers": 96, "max_registers": 80, "per_processor": 2}
    if max_tokens <= 32:
        few, many = {8: (5, 10), 16: (5, 9), 32: (4, 8)}[max_tokens]
        yield HopperTile(blocks=1, tokens=max_tokens, stages=many)
        yield HopperTile(**paired, tokens=max_tokens, stages=few)
        return
    if max_tokens <= 512:
        yield HopperTile(**paired, tokens=64, stages=3)
    if max_tokens <= 256:
        yield HopperTile(blocks=1, tokens=64, stages=6)
        yield HopperTile(blocks=1, tokens=64, stages=6, unroll=2)
    if max_tokens > 64:
        yield HopperTile(blocks=1, tokens=128, stages=4)
        yield HopperTile(blocks=1, tokens=128, stages=4, unroll=2)
        yield HopperTile(blocks=2, tokens=128, stages=3)
    if max_tokens > 128:
        yield HopperTile(blocks=1, tokens=256, spans=2, stages=2)


def candidates(shape: tuple[int, int], max_tokens: int, mode: str, top: int | None = None) -> list[AnyTile]:
    """Return the tiles worth timing; with `top`, so many Hopper tiles by estimate, and the present choice."""
    lanes = list(lanes_candidates(shape)) if max_tokens == 1 else []
    max_tokens = max(8, max_tokens)
    hopper: list[HopperTile] = []
    for tile in hopper_candidates(max_tokens):
        # float16 scales take room: a stage less where they need it
        stages = tile.stages - (tile.shared_bytes(mode) > tile.shared_limit)
        hopper += every_cut(shape, TIMED[max_tokens], dataclasses.replace(tile, stages=stages))
    if top is None:
        return list(dict.fromkeys([*lanes, *hopper, *triton_candidates(shape, max_tokens, mode == "channel")]))
    problem = LinearProblem(
        out_features=shape[0],
        in_features=shape[1],
        group_size=GROUPS[mode],
        integer_group_scale=mode == "integer",
        device_type="cuda",
        compute_capability=(9, 0),
    )
    present = measured.find(problem, max_tokens)
    hopper.sort(key=lambda tile: estimate(tile, TIMED[max_tokens], problem, PROCESSORS))
    return list(dict.fromkeys([*lanes, *hopper[:top], *([present.tile] if present else [])]))


def name_of(tile: AnyTile) -> str:
    """Return the implementation that a tile belongs to."""
    return {Tile: "triton", HopperTile: "gluon", LanesTile: "lanes"}[type(tile)]


def problem_of(shape: tuple[int, int], mode: str) -> LinearProblem:
    """Describe a layer of a mode on this device."""
    return LinearProblem(
        out_features=shape[0],
        in_features=shape[1],
        group_size=GROUPS[mode],
        integer_group_scale=mode == "integer",
        **describe_device("cuda"),
    )


def launch(problem: LinearProblem, tile: AnyTile, batch: Batch, tensors: dict) -> torch.Tensor:
    """Compute the layer with a tile."""
    out = torch.empty(batch.x.shape[0], problem.out_features, dtype=torch.float16, device="cuda")
    mode, group_scale = group_scale_of(problem, tensors)
    arguments = (batch.x_codes, batch.x_scale, tensors["packed"], tensors["scale"], group_scale)
    shared = {"group_size": problem.group_size, "tile": tile}
    if isinstance(tile, LanesTile):
        lane_scales = tensors.get("lane_scales")
        lanes_kernel.launch_lanes(*arguments[:4], None, out, tile=tile, mode=mode, lane_scales=lane_scales)
    elif isinstance(tile, Tile):
        words = tensors.get("group_words")
        triton_kernel.launch(
            *arguments, tensors["arrivals"], None, out, **shared, mode=mode_of(problem), group_words=words
        )
    else:
        schedule = schedule_of((problem.out_features, problem.in_features), batch.x.shape[0], tile)
        num_blocks = -(-problem.in_features // BLOCK_K)
        gluon_kernel.launch(
            *arguments,
            tensors["arrivals"],
            None,
            out,
            **shared,
            mode=mode,
            num_blocks=num_blocks,
            schedule=schedule,
        )
    return out


def prepare_layer(problem: LinearProblem) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Round a Gaussian weight as the problem says: its codes and scales, and the prepared tensors."""
    weight = torch.randn(problem.out_features, problem.in_features, dtype=torch.float16, device="cuda")
    codes, scale, group_scale = quantized_rows(weight, problem.group_size)
    if group_scale is not None and not problem.integer_group_scale:
        group_scale = group_scale - 0.25
    return (codes, scale, group_scale), prepare_planes(problem, codes, scale, group_scale)


def make_batch(num_tokens: int, in_features: int) -> Batch:
    """Gaussian activations."""
    x = torch.randn(num_tokens, in_features, dtype=torch.float16, device="cuda")
    x_codes, x_scale = token_quantize(x)
    return Batch(x=x, x_codes=x_codes, x_scale=x_scale, x_narrow=x)


def time_shape(
    shape: tuple[int, int], mode: str, deadline: float, counts: list[int], top: int | None = None
) -> list[tuple[int, str, float, AnyTile]]:
    """Return (largest token count, implementation, latency in us, tile) of every candidate."""
    problem = problem_of(shape, mode)
    rounded, prepared = prepare_layer(problem)
    total = num_copies(math.prod(shape) // 2)
    layers = [prepared]
    for _ in range(total - 1):
        # scales and counters of their own, so that they are as cold as the weight
        fresh = {name: tensor.clone() for name, tensor in layers[0].items()}
        layers.append(fresh | {"packed": torch.randint_like(fresh["packed"], -128, 128)})
    exact = w4a8_linear.plan(problem, force="reference")
    operand = exact.prepare(*rounded)
    found = []
    for max_tokens in counts:
        if time.monotonic() > deadline:
            break
        num_tokens = TIMED[max_tokens]
        batch = make_batch(num_tokens, shape[1])
        rows = torch.arange(0, num_tokens, max(1, num_tokens // 8), device="cuda")
        expected = exact.linear(batch.x_codes[rows], batch.x_scale[rows], operand)
        tiles = candidates(shape, max_tokens, mode, top)
        for tile in tiles:
            if not torch.equal(launch(problem, tile, batch, layers[0])[rows], expected):
                raise RuntimeError(f"{shape} {mode} {num_tokens} tokens: {tile} differs from the reference")
        contenders = [
            Contender(
                name=name_of(tile),
                granularity=mode,
                includes_activation_quantization=False,
                copies=total,
                run=lambda batch, i, tile=tile: launch(problem, tile, batch, layers[i % total]),
            )
            for tile in tiles
        ]
        latencies = median_latencies(contenders, batch, floor_us(num_tokens, *shape))
        found += [(max_tokens, name_of(tile), us, tile) for tile, us in zip(tiles, latencies, strict=True)]
        best = min(zip(latencies, tiles, strict=True), key=lambda item: item[0])
        print(f"{shape[0]}x{shape[1]} {mode} {num_tokens}: {best[0]:.2f} us {best[1]}", flush=True)
        for us, tile in sorted(zip(latencies, tiles, strict=True), key=lambda item: item[0]):
            print(f"  {us:.2f} {name_of(tile)} {' '.join(map(str, asdict(tile).values()))}", flush=True)
    return found


def choose(
    found: list[tuple[int, str, float, AnyTile]],
) -> dict[int, tuple[str, float, AnyTile]]:
    """Return the best tile by largest token count, of one implementation within each range of dispatch."""
    chosen: dict[int, tuple[str, float, AnyTile]] = {}
    for tokens in TOKEN_RANGES:
        counts = sorted({count for count, *_ in found if count in tokens})
        best: dict[str, dict[int, tuple[str, float, AnyTile]]] = {}
        for count, name, us, tile in found:
            known = best.setdefault(name, {}).get(count) if count in counts else None
            if count in counts and (known is None or us < known[1]):
                best[name][count] = (name, us, tile)
        whole = [item for item in best.values() if counts and len(item) == len(counts)]
        if whole:
            chosen |= min(whole, key=lambda item: math.prod(us for _, us, _ in item.values()))
    return chosen


def compile_one(job: tuple[tuple[int, int], int, str, AnyTile]) -> None:
    """Run one candidate, so that its kernel lies in the cache on disk."""
    shape, max_tokens, mode, tile = job
    problem = problem_of(shape, mode)
    launch(problem, tile, make_batch(TIMED[max_tokens], shape[1]), prepare_layer(problem)[1])
    torch.cuda.synchronize()


def compile_jobs(
    shapes: list[tuple[int, int]], modes: list[str], counts: list[int], top: int | None = None
) -> list[tuple[tuple[int, int], int, str, AnyTile]]:
    """Return one job for each kernel that will be compiled."""
    jobs: dict[tuple, tuple] = {}
    for shape, mode, max_tokens in itertools.product(shapes, modes, counts):
        for tile in candidates(shape, max_tokens, mode, top):
            fields = asdict(tile)
            is_split = fields.pop("split", 1) > 1
            fields.pop("cut", None)
            # the kernel for one token is compiled for a length of K
            length = shape[1] if isinstance(tile, LanesTile) else 0
            key = (mode, name_of(tile), length, is_split, *fields.values())
            jobs.setdefault(key, (shape, max_tokens, mode, tile))
    return list(jobs.values())


def main(arguments: list[str] | None = None) -> None:
    """Time every shape and write the choices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=0, help="compile beforehand with this many")
    parser.add_argument("--seconds", type=float, default=300.0, help="start no token count after this time")
    parser.add_argument(
        "--compile-only", action="store_true", help="fill the cache of compiled kernels, time nothing"
    )
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in LINEAR_SHAPES.values()))
    parser.add_argument("--tokens", default=",".join(map(str, TIMED)), help="largest token counts to tune for")
    parser.add_argument("--top", type=int, help="time so many Hopper tiles, by the estimate of `hopper.py`")
    parser.add_argument("--modes", default=",".join(GROUPS), help="of " + ", ".join(GROUPS))
    parser.add_argument("--json", type=Path, default=measured.FILE, help="where the choices go")
    options = parser.parse_args(arguments)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    counts = list(map(int, options.tokens.split(",")))
    modes = options.modes.split(",")
    if options.processes:
        jobs = compile_jobs(sorted(shapes), modes, counts, options.top)
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            pool.map(compile_one, jobs, chunksize=1)
        print(f"compiled {len(jobs)} kernels", file=sys.stderr)
    if options.compile_only:
        return
    deadline = time.monotonic() + options.seconds
    rows = json.loads(options.json.read_text())["choices"] if options.json.is_file() else []
    for shape, mode in itertools.product(shapes, modes):
        for max_tokens, (name, us, tile) in choose(time_shape(shape, mode, deadline, counts, options.top)).items():
            place = {"n": shape[0], "k": shape[1], "mode": mode, "max_tokens": max_tokens}
            rows = others(rows, place)
            rows.append(place | {"implementation": name, "latency_us": round(us, 2), "tile": asdict(tile)})
        torch.cuda.empty_cache()
        write(rows, options.json)


def others(rows: list[dict], place: dict) -> list[dict]:
    """Return the choices for other places, and those of other widths than 4 bits."""
    return [row for row in rows if row.get("bits", 4) != 4 or any(row[key] != place[key] for key in place)]


def write(rows: list[dict], file: Path) -> None:
    """Write the choices with what they were measured on."""
    properties = torch.cuda.get_device_properties(0)
    content = {
        "measured_on": properties.name,
        "compute_capability": [properties.major, properties.minor],
        "choices": sorted(
            rows, key=lambda row: (row["n"], row["k"], row["mode"], row.get("bits", 4), row["max_tokens"])
        ),
    }
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
