# SPDX-License-Identifier: Apache-2.0
"""Seconds per batch of a model served by vLLM, in several formats: the record `serve_vllm`.

    python -m benchmarks.end_to_end.serve_vllm [--shape llama-2-13b] [--formats quattuor_w4a8,fp16,...]
        [--batches 1,16,64] [--input 1024] [--output 128] [--repeats 2] [--timeout 150] [--append] [--json FILE]

Weights are random, so no model is needed; what they are does not change how long they take. Each format runs in a
process of its own and is ended after its timeout. The record is written again after each row. `end_to_end_s` is
the median time of a batch, `prefill_s` of the same batch with one output token: the time to the first token.

`--profile` adds the kernels of one decode step of the first batch to the record `serve_vllm_kernels`.
"""

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.end_to_end.serving_formats import FORMATS, SHAPES, model_config

__all__ = ["RECORD", "decode_kernels", "main", "settings", "tokens_per_second"]

RECORD, KERNELS = "serve_vllm", "serve_vllm_kernels"
_ROW, _KERNEL = "ROW ", "KERNEL "
_PROFILED_STEPS = 16
_COMMAND = (sys.executable, "-m", "benchmarks.end_to_end.serve_vllm")

Row = dict[str, str | int | float | bool | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 when a format gave no row."""
    options = _parser().parse_args(arguments)
    if options.worker:
        work(options)
        return 0
    names = options.formats.split(",")
    silent: list[str] = []
    rows, kernels = _known(RECORD, options, names), _known(KERNELS, options, names)
    for name in names:
        print(f"== {name}", flush=True)
        count = len(rows)
        for line in _worker_lines(name, options):
            if line.startswith(_ROW):
                rows.append(json.loads(line.removeprefix(_ROW)))
                _write(RECORD, rows, _path(RECORD, options))
            elif line.startswith(_KERNEL):
                kernels.append(json.loads(line.removeprefix(_KERNEL)))
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
    parser.add_argument("--batches", default="1,16,64", type=lambda text: [int(item) for item in text.split(",")])
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds for each format")
    parser.add_argument("--devices", type=int, default=1, help="tensor parallelism")
    parser.add_argument("--json", type=Path, help="write the record here, not to benchmarks/results")
    parser.add_argument("--append", action="store_true", help="keep the rows of other formats in the record")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


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


def _worker_lines(name: str, options: argparse.Namespace) -> Iterator[str]:
    """Run one format in a process of its own, echo its output, and end it after its timeout."""
    command = [*_COMMAND, "--worker", name]
    for key in ("shape", "input", "output", "repeats", "devices"):
        command += [f"--{key}", str(getattr(options, key))]
    command += ["--batches", ",".join(map(str, options.batches)), *(["--profile"] if options.profile else [])]
    environment = {
        **os.environ,
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_DISABLE_COMPILE_CACHE": "1",  # its key does not hold all of the variables below
        "PYTHONUNBUFFERED": "1",
        **FORMATS[name].environment,
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    ended = threading.Timer(options.timeout, lambda: os.killpg(process.pid, 9))
    ended.start()
    assert process.stdout is not None, "a pipe was asked for"
    for line in process.stdout:
        print(line, end="", flush=True)
        yield line.rstrip("\n")
    process.wait()
    ended.cancel()
    print(f"-- {name}: exit status {process.returncode}", flush=True)


def settings(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the engine, the same for every format."""
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "float16",
        "seed": 0,
        "max_model_len": options.input + options.output,
        "max_num_seqs": max(options.batches),
        "enable_prefix_caching": False,  # or every repeat would find its prompt computed
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": options.devices,
        "compilation_config": {"cudagraph_capture_sizes": sorted(options.batches)},
    }


def work(options: argparse.Namespace) -> None:
    """Measure one format; print each row as it is known."""
    from vllm import LLM

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = model_config(options.shape, options.worker)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        arguments = settings(folder, options)
        if options.profile:
            profiler = {"profiler": "torch", "torch_profiler_dir": str(folder), "torch_profiler_with_stack": False}
            arguments["profiler_config"] = profiler
        engine = LLM(**arguments)
        start_s = time.perf_counter() - started
        print(f"{options.worker}: engine ready after {start_s:.1f} s", flush=True)
        for batch in options.batches:
            prompts = _prompts(batch, options.input, config["vocab_size"])
            _run(engine, prompts, 4)  # kernels that are compiled when first called
            prefills = [_run(engine, prompts, 1) for _ in range(options.repeats)]
            wholes = [_run(engine, prompts, options.output) for _ in range(options.repeats)]
            row: Row = {
                "shape": options.shape,
                "format": options.worker,
                "batch": batch,
                "input_tokens": options.input,
                "output_tokens": options.output,
                "devices": options.devices,
                "end_to_end_s": statistics.median(wholes),
                "prefill_s": statistics.median(prefills),
                "tokens_per_s": tokens_per_second(batch, options.output, statistics.median(wholes)),
                "repeats": options.repeats,
                "engine_start_s": start_s,
            }
            print(_ROW + json.dumps(row), flush=True)
        if options.profile:
            for kernel in _profile(engine, folder, options, config["vocab_size"]):
                print(_KERNEL + json.dumps(kernel), flush=True)


def tokens_per_second(batch: int, output_tokens: int, seconds: float) -> float:
    """Return generated tokens of the batch per second, prefill included in the time."""
    return batch * output_tokens / seconds


def _prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """Return different tokens for every sequence, the same in every run."""
    return [
        [3 + (7919 * row + 104729 * place) % (vocab_size - 3) for place in range(length)] for row in range(batch)
    ]


def _run(engine: Any, prompts: list[list[int]], num_tokens: int) -> float:
    """Return the seconds that a batch takes."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling_params=sampling, use_tqdm=False
    )
    elapsed_s = time.perf_counter() - started
    assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs), "a sequence ended early"
    return elapsed_s


def _profile(engine: Any, folder: Path, options: argparse.Namespace, vocab_size: int) -> list[Row]:
    """Return the kernels of one decode step: two runs that differ in 16 of them, subtracted."""
    prompts = _prompts(options.batches[0], options.input, vocab_size)
    traces = []
    for num_tokens in (1, 1 + _PROFILED_STEPS):
        known = set(folder.rglob("*.json*"))
        engine.start_profile()
        _run(engine, prompts, num_tokens)
        engine.stop_profile()
        traces.append([_read_trace(path) for path in sorted(set(folder.rglob("*.json*")) - known)])
    first, second = ([event for events in trace for event in events] for trace in traces)
    rows = decode_kernels(first, second, _PROFILED_STEPS)
    place = {"shape": options.shape, "format": options.worker, "batch": options.batches[0]}
    return [{**place, **row} for row in rows]


def _read_trace(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return list(json.loads(text).get("traceEvents", []))


def decode_kernels(
    shorter: Sequence[dict[str, Any]], longer: Sequence[dict[str, Any]], num_steps: int
) -> list[Row]:
    """Return calls and microseconds of each kernel in one step, the longest first.

    Args:
        shorter: Trace events of a run.
        longer: Of the same run with more decode steps.
        num_steps: How many more.
    """
    totals: dict[str, list[float]] = {}
    for sign, events in ((-1, shorter), (1, longer)):
        for event in events:
            if event.get("cat") == "kernel":
                total = totals.setdefault(_short(str(event["name"])), [0.0, 0.0])
                total[0] += sign
                total[1] += sign * float(event["dur"])
    rows: list[Row] = [
        {"kernel": name, "calls": round(calls / num_steps, 2), "time_us": round(time_us / num_steps, 2)}
        for name, (calls, time_us) in totals.items()
        if calls > 0
    ]
    return sorted(rows, key=lambda row: -float(row["time_us"] or 0))


def _short(name: str) -> str:
    """Return a kernel's name without its template arguments and parameters."""
    bare = re.sub(r"^(void|std::enable_if\S*)\s+", "", name)
    return re.split(r"[<(]", bare, maxsplit=1)[0][:80] or name[:80]


if __name__ == "__main__":
    sys.exit(main())
