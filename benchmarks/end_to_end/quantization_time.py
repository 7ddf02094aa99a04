# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory that quantizing a Llama-3-8B takes: the record `quantization_time`.

    python -m benchmarks.end_to_end.quantization_time [--device cuda] [--blocks 3] [--dtype bfloat16 float32]
        [--budget-seconds S]

The shapes are those of Llama-3-8B and the weights random: time and memory depend on the shapes. It is the pipeline
of a real run: blocks are created on the device when their turn comes and released when they are packed, and
hidden states of 128 sequences of 2048 tokens flow from one to the next. Measured are the embedding, one block to
warm up (kernels are compiled, loops captured), and a few more. Blocks are alike, so the seconds of the whole model
are projected: embedding, warm-up, and 31 times the mean of the others. Reading and writing files is not included.
"""

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from benchmarks import record
from quattuor.checkpoints.skeleton import empty_model
from quattuor.pipeline.run import BlockStore
from quattuor.progress import Progress
from quattuor.quantize import quantize
from quattuor.systems import gptq

__all__ = ["RandomStore", "Stopwatch", "measure", "row_of"]

SHAPES: dict[str, dict[str, int]] = {
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
WARM_UP_BLOCKS = 1


class RandomStore(BlockStore):
    """Fills the parameters of a module with random numbers on the device, and releases them afterwards."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Seed the generator."""
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def load_(self, module: nn.Module, prefix: str) -> None:
        """Create weights that keep the size of activations, and ones for norms. The head is never read."""
        if prefix == "lm_head":
            return
        for owner in module.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is None:
                    continue
                value = torch.ones(parameter.shape, device=self.device, dtype=self.dtype)
                if parameter.dim() > 1:
                    value.normal_(0, parameter.shape[-1] ** -0.5, generator=self.generator)
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def emit(self, module: nn.Module, prefix: str) -> None:
        """Release the memory; a run that keeps its result would write it here."""
        module.to("meta")


@dataclass(slots=True)
class Stopwatch(Progress):
    """Notes when the blocks begin and when each of them ends, with the device idle."""

    device: torch.device
    times_s: list[float] = field(default_factory=list)

    def start(self, task: str, total: int | None = None) -> None:
        """Note the time."""
        self.advance(task)

    def advance(self, task: str, steps: int = 1, note: str = "") -> None:
        """Note the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times_s.append(time.perf_counter())
        print(f"{task} {len(self.times_s) - 1} {note}", flush=True)

    def finish(self, task: str) -> None:
        """Nothing: the last block has noted the time."""


def measure(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    blocks: int,
    samples: int,
    length: int,
    batch_size: int,
) -> dict[str, Any]:
    """Quantize the first blocks of a model and return the row."""
    sizes = {**SHAPES[shape], "num_hidden_layers": WARM_UP_BLOCKS + blocks}
    model = empty_model(LlamaConfig(**sizes, max_position_embeddings=length, rope_theta=500000.0))  # type: ignore[arg-type]
    model.to(dtype)
    tokens = torch.randint(sizes["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(0))
    watch = Stopwatch(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start_s = time.perf_counter()
    report = quantize(
        model,
        gptq(bits=4, group_size=128 if sizes["hidden_size"] % 128 == 0 else None),
        tokens,
        store=RandomStore(device, dtype),
        device=device,
        storage=device if dtype == torch.bfloat16 else "cpu",
        batch_size=batch_size,
        progress=watch,
    )
    row = row_of(shape, str(dtype).removeprefix("torch."), start_s, watch.times_s)
    row |= {f"{name}_seconds": report.seconds[name] for name in ("collect", "solve", "propagate")}
    row |= {"samples": samples, "length": length, "peak_device_memory_bytes": report.peak_device_memory_bytes}
    return row


def row_of(shape: str, dtype: str, start_s: float, times_s: list[float]) -> dict[str, Any]:
    """Return what the times say: measured seconds, and those projected to all blocks.

    Args:
        shape: Name in `SHAPES`.
        dtype: Of weights and activations.
        start_s: When quantization began.
        times_s: When the blocks began, and when each ended.
    """
    first_s, warm_s = times_s[0], times_s[WARM_UP_BLOCKS]
    num_timed, num_blocks = len(times_s) - 1 - WARM_UP_BLOCKS, SHAPES[shape]["num_hidden_layers"]
    seconds_per_block = (times_s[-1] - warm_s) / num_timed
    return {
        "system": "gptq",
        "bits": 4,
        "shape": shape,
        "dtype": dtype,
        "embedding_seconds": first_s - start_s,
        "warm_up_seconds": warm_s - first_s,
        "timed_blocks": num_timed,
        "seconds_per_block": seconds_per_block,
        "projected_blocks": num_blocks,
        "projected_seconds": warm_s - start_s + (num_blocks - WARM_UP_BLOCKS) * seconds_per_block,
    }


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3-8B")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--blocks", type=int, default=3, help="timed, after one to warm up")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no row after these")
    parser.add_argument("--record", default="quantization_time")
    arguments = parser.parse_args()
    device, rows, begin_s = torch.device(arguments.device), [], time.perf_counter()
    for name in arguments.dtype:
        if time.perf_counter() - begin_s > arguments.budget_seconds:
            print(f"budget spent, left out: {name}", flush=True)
            continue
        row = measure(
            arguments.shape,
            getattr(torch, name),
            device,
            blocks=arguments.blocks,
            samples=arguments.samples,
            length=arguments.length,
            batch_size=arguments.batch_size,
        )
        print(row, flush=True)
        rows.append(row)
        record.write(arguments.record, rows)


if __name__ == "__main__":
    main()
