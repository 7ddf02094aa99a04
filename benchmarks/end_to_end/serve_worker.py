# SPDX-License-Identifier: Apache-2.0
"""The process of `serve_vllm` that holds the engine: it times batches, and the kernels of a decode step."""

import argparse
import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.end_to_end.serving_formats import FORMATS, model_config

__all__ = ["KERNEL", "ROW", "Row", "decode_kernels", "settings", "tokens_per_second", "work"]

#: How lines start that hold, as JSON, a row of the times or of the kernels.
ROW, KERNEL = "ROW ", "KERNEL "
#: How the names of our own formats start, the only ones that are profiled.
OURS = "quattuor"
_PROFILED_STEPS = 16

Row = dict[str, str | int | float | bool | None]


def settings(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the engine, the same for every format but for its cache and the dtype of that."""
    memory = {"gpu_memory_utilization": 0.9}
    if options.only_start:  # beside the other formats; neither setting is in the key of the compile cache
        memory = {"gpu_memory_utilization": 0.3, "num_gpu_blocks_override": 128}
    return {
        **memory,
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": FORMATS[options.worker].dtype,
        "kv_cache_dtype": FORMATS[options.worker].kv_cache_dtype,
        "seed": 0,
        "max_model_len": options.input + options.output,
        "max_num_seqs": max(options.batches),
        "enable_prefix_caching": False,  # or every repeat would find its prompt computed
        "tensor_parallel_size": options.devices,
        "compilation_config": {"cudagraph_capture_sizes": sorted({*options.batches, options.input})},
    }


def work(options: argparse.Namespace) -> None:
    """Measure one format; print each row as it is known."""
    from vllm import LLM

    started = time.perf_counter()
    # a path that stays: it is in the key of the compile cache
    model = options.cache / "models" / f"{options.shape}-{options.worker}"
    model.mkdir(parents=True, exist_ok=True)
    config = model_config(options.shape, options.worker)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder, arguments = Path(name), settings(model, options)
        if options.profile and options.worker.startswith(OURS):
            profiler = {"profiler": "torch", "torch_profiler_dir": name, "torch_profiler_with_stack": False}
            arguments["profiler_config"] = profiler
        engine = LLM(**arguments)
        start_s = time.perf_counter() - started
        print(f"{options.worker}: engine ready after {start_s:.1f} s", flush=True)
        if options.only_start:
            return
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
            print(ROW + json.dumps(row), flush=True)
        for batch in options.profile if options.worker.startswith(OURS) else ():
            for kernel in _profile(engine, folder, options, batch, config["vocab_size"]):
                print(KERNEL + json.dumps(kernel), flush=True)


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


def _profile(engine: Any, folder: Path, options: argparse.Namespace, batch: int, vocab_size: int) -> list[Row]:
    """Return the kernels of one decode step: two runs that differ in 16 of them, subtracted."""
    prompts = _prompts(batch, options.input, vocab_size)
    traces = []
    for num_tokens in (1, 1 + _PROFILED_STEPS):
        known = set(folder.rglob("*.json*"))
        engine.start_profile()
        _run(engine, prompts, num_tokens)
        engine.stop_profile()
        traces.append([_read_trace(path) for path in sorted(set(folder.rglob("*.json*")) - known)])
    first, second = ([event for events in trace for event in events] for trace in traces)
    rows = decode_kernels(first, second, _PROFILED_STEPS)
    place = {"shape": options.shape, "format": options.worker, "batch": batch}
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
