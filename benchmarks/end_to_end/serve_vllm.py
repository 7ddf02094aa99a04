# SPDX-License-Identifier: Apache-2.0
"""Seconds per batch of a model served by vLLM, in several formats: the record `serve_vllm`.

    python -m benchmarks.end_to_end.serve_vllm [--shape llama-2-13b] [--formats quattuor_w4a8,fp16,...]
        [--batches 1,16,64] [--input 1024] [--output 128] [--repeats 2] [--timeout 150] [--append] [--json FILE]
        [--warm] [--profile 1,64]

Weights are random, so no model is needed; what they are does not change how long they take. Each format runs in a
process of its own, which has its timeout once to start and once more for its rows. The record is written again
after each row. `end_to_end_s` is the median time of a batch, `prefill_s` of the same batch with one output token:
the time to the first token. Settings are the same for every format; CUDA graphs are captured for the batches and
for one prompt. `weights_gib` is what the engine says that the model takes: a format that was not applied shows
there.

`--warm` only starts the engines of all formats, a few side by side, and so fills their compile caches; the device
needs memory for the weights and the largest batch of each. `--profile` adds the kernels of one decode step of
these batches, in our own formats, to the record `serve_vllm_kernels`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import record
from benchmarks.end_to_end.serve_worker import KERNEL, ROW, Row, work
from benchmarks.end_to_end.serving_formats import FORMATS, SHAPES

__all__ = ["RECORD", "main"]

RECORD, KERNELS = "serve_vllm", "serve_vllm_kernels"
#: What the engine says when the weights lie on the device.
LOADED = re.compile(r"Model loading took ([\d.]+) GiB")
#: What the worker says when it begins to time batches.
READY = re.compile(r": engine ready after [\d.]+ s$")
_COMMAND = (sys.executable, "-m", "benchmarks.end_to_end.serve_vllm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 when a format gave no row."""
    options = _parser().parse_args(arguments)
    if options.worker:
        work(options)
        return 0
    names = options.formats.split(",")
    silent: list[str] = []
    rows, kernels = _known(RECORD, options, names), _known(KERNELS, options, names)
    if options.warm:
        return _warm(names, options)
    for name in names:
        print(f"== {name}", flush=True)
        count = len(rows)
        weights_gib = None
        for line in _worker_lines(name, options):
            if found := LOADED.search(line):
                weights_gib = float(found[1])
            if line.startswith(ROW):
                rows.append(json.loads(line.removeprefix(ROW)) | {"weights_gib": weights_gib})
                _write(RECORD, rows, _path(RECORD, options))
            elif line.startswith(KERNEL):
                kernels.append(json.loads(line.removeprefix(KERNEL)))
        if kernels:
            _write(KERNELS, kernels, _path(KERNELS, options))
        if len(rows) == count:
            silent.append(name)
    if silent:
        print(f"no row for {', '.join(silent)}; see their output above", flush=True)
    return 1 if silent else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end.serve_vllm", description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-13b")
    parser.add_argument("--formats", default="quattuor_w4a8,fp16,w8a8,fp8,w4a16")
    parser.add_argument("--batches", default="1,16,64", type=_numbers)
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--timeout", type=float, default=150.0, help="seconds for each format to start, and for its rows"
    )
    parser.add_argument("--devices", type=int, default=1, help="tensor parallelism")
    parser.add_argument("--json", type=Path, help="write the record here, not to benchmarks/results")
    parser.add_argument("--append", action="store_true", help="keep the rows of other formats in the record")
    parser.add_argument("--profile", default=[], type=_numbers, help="batches")
    parser.add_argument("--warm", action="store_true", help="only fill the compile caches of all formats")
    parser.add_argument("--at-once", type=int, default=3, help="engines that --warm starts side by side")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "quattuor-serve-vllm")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--only-start", action="store_true", help=argparse.SUPPRESS)
    return parser


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def _path(name: str, options: argparse.Namespace) -> Path:
    """Return where a record goes: `--json` for the times, beside it for the kernels."""
    if options.json is None:
        return record.RESULTS / f"{name}.json"
    target: Path = options.json
    return target if name == RECORD else target.with_name(f"{name}.json")


def _known(name: str, options: argparse.Namespace, measured: Sequence[str]) -> list[Row]:
    """Return the rows of an earlier run that stay: with `--append` those of other shapes and formats."""
    path = _path(name, options)
    if not options.append or not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["shape"] != options.shape or row["format"] not in measured]


def _write(name: str, rows: Sequence[Row], path: Path) -> None:
    written = record.write(name, rows, folder=path.parent)
    written.replace(path)


def _warm(names: Sequence[str], options: argparse.Namespace) -> int:
    """Start engines side by side, with little memory, and end each when it is ready; return how many failed."""
    with ThreadPoolExecutor(options.at_once) as pool:
        return sum(pool.map(lambda name: _warm_one(name, options), names))


def _warm_one(name: str, options: argparse.Namespace) -> bool:
    started = time.perf_counter()
    process = _start(name, options, ["--only-start"])
    end = _end_after(options.timeout, process)
    output, _ = process.communicate()
    end.cancel()
    if process.returncode:
        print(output, flush=True)
    seconds = time.perf_counter() - started
    print(f"-- {name}: warm, exit status {process.returncode}, {seconds:.0f} s", flush=True)
    return process.returncode != 0


def _worker_lines(name: str, options: argparse.Namespace) -> Iterator[str]:
    """Run one format in a process of its own, echo its output, and end it when its time is up."""
    process = _start(name, options, [])
    end = _end_after(options.timeout, process)
    assert process.stdout is not None, "a pipe was asked for"
    for line in process.stdout:
        if READY.search(line):
            end.cancel()
            end = _end_after(options.timeout, process)
        print(line, end="", flush=True)
        yield line.rstrip("\n")
    process.wait()
    end.cancel()
    print(f"-- {name}: exit status {process.returncode}", flush=True)


def _start(name: str, options: argparse.Namespace, more: Sequence[str]) -> "subprocess.Popen[str]":
    command = [*_COMMAND, "--worker", name, *more]
    for key in ("shape", "input", "output", "repeats", "devices", "cache"):
        command += [f"--{key}", str(getattr(options, key))]
    for key in ("batches", "profile"):
        if getattr(options, key):
            command += [f"--{key}", ",".join(map(str, getattr(options, key)))]
    environment = {
        **os.environ,
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # one cache for each format: its keys do not hold all of the variables below
        "VLLM_CACHE_ROOT": str(options.cache / name),
        "PYTHONUNBUFFERED": "1",
        **FORMATS[name].environment,
    }
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _end_after(seconds: float, process: "subprocess.Popen[str]") -> threading.Timer:
    """Return a timer that runs and then ends the process."""
    end = threading.Timer(seconds, _end, [process])
    end.start()
    return end


def _end(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, 9)


if __name__ == "__main__":
    sys.exit(main())
