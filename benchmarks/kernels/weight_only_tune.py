# SPDX-License-Identifier: Apache-2.0
"""Find the fastest tile of the weight-only Triton kernel, and write what was found.

    python -m benchmarks.kernels.weight_only_tune [--processes P] [--seconds S] [--shapes NxK,...] [--bits B,...]
        [--groups G,...] [--tokens M,...] [--json FILE]

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
from quattuor.kernels.w4a16_linear.fragments import launch_fragments
from quattuor.kernels.w4a16_linear.planes import MAX_FEW_TOKENS, FewTile, Tile, layout_of

__all__ = ["candidates", "main"]

#: The token count that is timed, by the largest that it stands for.
TIMED = {8: 1, 16: 16, 32: 32, 64: 64, 128: 128, 256: 256}
PROCESSORS = 132
SHARED_BYTES = 227 * 1024
REGISTERS = 65536

Found = list[tuple[float, Tile | FewTile]]


def candidates(shape: tuple[int, int], max_tokens: int, kind: Uniform) -> Iterator[Tile | FewTile]:
    """Yield the tiles worth timing."""
    if max_tokens <= MAX_FEW_TOKENS:
        yield from few_tiles(kind, max_tokens)
    layout = layout_of(problem_of(shape, kind))
    num_blocks = -(-shape[1] // layout.block_k)
    seen = set()
    for rows, tokens, num_warps, stages, per_processors, overlaps, raws in families(max_tokens):
        tiles = -(-shape[0] // rows) * -(-TIMED[max_tokens] // tokens)
        for num_stages, per_processor, overlap, raw in itertools.product(stages, per_processors, overlaps, raws):
            split = max(1, min(PROCESSORS * per_processor // tiles, num_blocks // 2))
            shared = num_stages * 2 * (rows * layout.words * layout.plane_k + tokens * layout.block_k)
            tile = Tile(
                rows=rows,
                tokens=tokens,
                split=split,
                num_warps=num_warps,
                num_stages=num_stages,
                overlap=overlap,
                raw=raw,
                # more than four programs of a multiprocessor's 65536 registers would leave one without room
                max_registers=128 if raw and kind.bits < 4 else None,
            )
            if shared <= SHARED_BYTES and tile not in seen:
                seen.add(tile)
                yield tile


def few_tiles(kind: Uniform, max_tokens: int) -> Iterator[FewTile]:
    """Yield tiles of the kernel for few tokens that fill the registers of every multiprocessor."""
    for fragments, num_warps, max_registers, ahead in (
        (1, 4, 128, True),
        (1, 4, 80, False),
        (1, 8, 128, True),
        (2, 4, 168, True),
        (2, 4, 128, False),
    ):
        # 16 tokens or three words leave no registers for the rows of a second fragment
        if fragments == 1 or (max_tokens <= 8 and kind.bits != 3):
            yield FewTile(
                fragments=fragments,
                num_warps=num_warps,
                programs=PROCESSORS * (REGISTERS // (max_registers * 32 * num_warps)),
                ahead=ahead,
                max_registers=max_registers,
            )


def families(max_tokens: int) -> Iterator[tuple]:
    """Yield rows, tokens, warps, stages, programs per multiprocessor, overlaps and raw operands or not."""
    none, both = ("none",), (True, False)
    if max_tokens <= 16:
        yield 64, 8, 4, (3,), (3, 4, 7), none, both
        yield 64, 16, 4, (3,), (3,), none, (False,)
    if max_tokens == 32:
        yield 64, 32, 4, (2, 3, 4), (2, 3), none, (False,)
        yield 128, 32, 8, (2, 3), (1, 2), none, (False,)
    if max_tokens in (64, 128):
        yield 64, 64, 4, (2, 3), (1, 2, 3), none, (False,)
        yield 128, 64, 8, (2, 3), (1, 2), none, (False,)
    if max_tokens > 64:
        yield 128, 64, 8, (2, 3), (1, 2), none, (False,)


def launch(kind: Uniform, tile: Tile | FewTile, batch: Batch, operand: Operand) -> torch.Tensor:
    """Compute the layer with a tile."""
    tensors = operand.layout("fields")
    shape = (tensors["packed"].shape[0] * 128, batch.x.shape[1])
    out = torch.empty(batch.x.shape[0], shape[0], dtype=torch.float16, device="cuda")
    start = launch_fragments if isinstance(tile, FewTile) else triton_kernel.launch
    start(
        batch.x,
        tensors["packed"],
        tensors["scale"],
        tensors.get("zero_point"),
        tensors["arrivals"],
        None,
        out,
        layout=layout_of(problem_of(shape, kind)),
        group_size=kind.group_size,
        tile=tile,
    )
    return out


def time_case(
    shape: tuple[int, int], kind: Uniform, max_tokens: int, decoded: torch.Tensor, layers: list[Operand]
) -> Found:
    """Return (latency in us, tile) of every candidate, fastest first."""
    batch = make_batch(TIMED[max_tokens], shape[1])
    tiles = list(candidates(shape, max_tokens, kind))
    contenders = []
    for tile in tiles:

        def run(batch: Batch, i: int, tile: Tile | FewTile = tile) -> torch.Tensor:
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


def compile_one(job: tuple[tuple[int, int], Uniform, int, Tile | FewTile]) -> None:
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
            is_split = (fields.pop("split", None) or fields.pop("programs")) > 1
            # the kernel for few tokens is compiled for the spans of 8 in the batch, not for those of the tile
            spans = -(-TIMED[max_tokens] // 8) if isinstance(tile, FewTile) else 0
            jobs.setdefault((kind, is_even, is_split, spans, *fields.values()), (shape, kind, max_tokens, tile))
    return list(jobs.values())


def row_of(
    shape: tuple[int, int], kind: Uniform, max_tokens: int, latency_us: float, tile: Tile | FewTile
) -> dict:
    """Return a row of the file."""
    return {
        "n": shape[0],
        "k": shape[1],
        "bits": kind.bits,
        "group_size": kind.group_size,
        "max_tokens": max_tokens,
        "latency_us": round(latency_us, 2),
        "tile": asdict(tile),
    }


def save(rows: list[dict], file: Path) -> None:
    """Write the rows, and those of the shipped file that they do not replace."""
    old = json.loads(measured.FILE.read_text()) if measured.FILE.is_file() else {"choices": []}
    keys = ("n", "k", "bits", "group_size", "max_tokens")
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
    parser.add_argument("--tokens", default=",".join(map(str, TIMED)), help="largest counts, of those here")
    parser.add_argument("--json", type=Path, default=measured.FILE)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    kinds = [
        Uniform(bits=int(bits), group_size=int(group) or None)
        for bits, group in itertools.product(options.bits.split(","), options.groups.split(","))
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
