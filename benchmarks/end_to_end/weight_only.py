# SPDX-License-Identifier: Apache-2.0
"""Perplexity of the weight-only systems at measured bits per weight: the record `weight_only`.

    python -m benchmarks.end_to_end.weight_only MODEL [--data DIR] [--device cuda] [--only NAME ...]
        [--budget-seconds S] [--append [--missing]] [--files BITS ...]

DIR holds `passages.txt` (calibration) and `wikitext2_test.txt` (evaluation). Every row starts from the same
float32 model, is calibrated on the same sequences and evaluated on the same windows of 2048 tokens. Rounding
(`rtn`) is measured with several group sizes, so that every system has a neighbour of the same measured bits. The
record is written after each row; with a budget no row is started once it is spent, and those left out are named.
`--append` keeps the rows of an existing record and replaces those that are measured again; `--missing` measures
none again. Rows of the widths named by `--files` are also stored and read back: `file_bytes` is the size of the
stored tensors, `formula_bytes` what the report says they take, and `is_identical` whether the reloaded model gives
the same logits bit for bit.
"""

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import record
from quattuor.calibration.data import calibration_batches, evaluation_windows
from quattuor.checkpoints import PackedModel, write_native
from quattuor.checkpoints.skeleton import expected_tensors, quantized_linears
from quattuor.checkpoints.source import ModelSource
from quattuor.evaluation.perplexity import perplexity
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.systems import SYSTEMS

__all__ = ["Variant", "merged", "variants"]

LENGTH = 2048
KEY = ("system", "bits", "options", "windows")
GROUP_SIZE = 64
"""Divides both input sizes of the model, 576 and 1536; the papers' 128 does not."""
AWQ_SEQUENCES = 2
"""Sequences that AWQ's search measures errors on; with all of them it takes longer than every other system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row: a system and what differs from its defaults; system None is the model as it is."""

    system: str | None
    bits: int = 32
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The options in words."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items()) or "default"

    @property
    def name(self) -> str:
        """What `--only` looks into."""
        return f"{self.system or 'none'} {self.bits} {self.label}"


def variants() -> list[Variant]:
    """List what is measured: rounding at every size, then systems by width, the cheapest of a width first."""
    grouped = {"group_size": GROUP_SIZE}
    listed = [Variant(system=None)]
    for bits in (3, 4, 2):
        listed += [
            Variant(system="rtn", bits=bits, options={"group_size": size, "symmetric": False})
            for size in (GROUP_SIZE, 16, 32, 192, None)
        ]
    for bits in (3, 2, 4):
        listed += [
            Variant(system="gptq", bits=bits, options=grouped),
            Variant(system="owq", bits=bits),
            Variant(system="quip", bits=bits),
            Variant(system="lut_gemm", bits=bits, options=grouped),
            Variant(system="spqr", bits=bits),
            Variant(system="squeezellm", bits=bits),
            Variant(system="awq", bits=bits, options={**grouped, "max_sequences": AWQ_SEQUENCES}),
        ]
    small = {"group_size": GROUP_SIZE, "outlier_threshold": 0.5, "damping": 0.05}
    greedy = {"multiple": None, "num_passes": 3, "order": "activation"}
    return [
        *listed,
        Variant(system="spqr", bits=3, options=small),
        Variant(system="gptq", bits=2, options={"group_size": 192}),
        Variant(system="quip", bits=2, options={"num_passes": 2, "order": "activation"}),
        Variant(system="spqr", bits=2, options={"outlier_threshold": 2.0, "damping": 0.05}),
        Variant(system="lut_gemm", bits=3, options={**grouped, "rounding": "nearest"}),
        Variant(system="lut_gemm", bits=3, options={**grouped, "rounding": "weighted"}),
        Variant(system="gptq", bits=3, options={"group_size": None}),
        Variant(system="gptq", bits=2, options={"group_size": None}),
        Variant(system="squeezellm", bits=3, options={"sensitive_share": 0.0, "large_share": 0.0}),
        Variant(system="spqr", bits=3, options={"damping": 0.05}),
        Variant(system="quip", bits=2, options={"kind": "hadamard"}),
        *(
            Variant(system="quip", bits=bits, options=options)
            for bits in (2, 3, 4)
            for options in (greedy, {"outputs": False, **greedy})
        ),
        Variant(system="quip", bits=2, options={"multiple": None}),
        Variant(system="quip", bits=2, options={**greedy, "sequential": True}),
        *(
            Variant(system="gptq", bits=2, options={"group_size": size, "clip": "weighted"})
            for size in (192, None, GROUP_SIZE)
        ),
        Variant(system="gptq", bits=3, options={**grouped, "clip": "weighted"}),
    ]


def main() -> None:
    """Measure, print a line per row, write the record."""
    arguments = _arguments()
    started_s = time.perf_counter()
    source = ModelSource(arguments.model)
    original = source.whole()
    text = (arguments.data / "passages.txt").read_text()
    calibration = calibration_batches(source.tokenizer, text, arguments.samples, arguments.length, seed=0)
    text = (arguments.data / "wikitext2_test.txt").read_text()
    windows = evaluation_windows(source.tokenizer, text, LENGTH, arguments.windows)
    rows = _existing_rows(arguments)
    left_out = []
    for item in variants():
        if arguments.only and not any(part in item.name for part in arguments.only):
            continue
        if arguments.missing and any(_is_row_of(row, item, len(windows)) for row in rows):
            continue
        if time.perf_counter() - started_s > arguments.budget_seconds:
            left_out.append(item.name)
            continue
        stores = item.bits in arguments.files
        row = measure(item, original, calibration, windows, arguments.device, stores=stores)
        rows = merged(rows, row)
        shown = f"{row['bits_per_weight']:.3f} bits, perplexity {row['perplexity']:.3f}, {row['seconds']} s"
        print(f"{time.perf_counter() - started_s:.0f} s {item.name}: {shown}", flush=True)
        record.write(arguments.record, rows)
    if left_out:
        print("budget spent, left out:", "; ".join(left_out), flush=True)


def measure(
    item: Variant,
    original: torch.nn.Module,
    calibration: torch.Tensor,
    windows: torch.Tensor,
    device: str,
    *,
    stores: bool = False,
) -> dict[str, Any]:
    """Quantize a copy of the model and return its row; with `stores` also what a file of it says."""
    model: Any = copy.deepcopy(original).to(device)
    bits_per_weight, seconds, peak_memory_bytes = 32.0, None, None
    files: dict[str, Any] = {"file_bytes": None, "formula_bytes": None, "is_identical": None}
    if item.system is not None:
        recipe = SYSTEMS[item.system](bits=item.bits, **item.options)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        report = quantize(model, recipe, calibration, storage=device, kernel=_kernel(device))
        seconds = time.perf_counter() - start
        num_weights = sum(layer.num_weights for layer in report.layers)
        bits_per_weight = sum(layer.bits_per_weight * layer.num_weights for layer in report.layers) / num_weights
        peak_memory_bytes = report.peak_device_memory_bytes or report.peak_memory_bytes
        if stores:
            files = stored(model, recipe, bits_per_weight * num_weights / 8, windows[:1, :256].to(device))
    result = perplexity(model, windows, batch_size=1 if device == "cpu" else 8)
    return {
        "system": item.system or "none",
        "bits": item.bits,
        "options": item.label,
        "windows": len(windows),
        "bits_per_weight": bits_per_weight,
        "perplexity": result.perplexity,
        "perplexity_stderr": result.perplexity_stderr,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "calibration_tokens": calibration.numel() if item.system else 0,
        **files,
    }


@torch.no_grad()
def stored(model: Any, recipe: Recipe, packed_bytes: float, tokens: torch.Tensor) -> dict[str, Any]:
    """Write a quantized model to a temporary folder, read it back, and compare sizes and logits.

    Args:
        model: The quantized model.
        recipe: What quantized it.
        packed_bytes: What the report says its linears take.
        tokens: One sequence.
    """
    expected = model(tokens, use_cache=False).logits
    rest = {name: tensor for name, tensor in expected_tensors(model).items() if not _is_packed(model, name)}
    with tempfile.TemporaryDirectory() as folder:
        write_native(PackedModel.from_model(model), Path(folder) / "model", recipe=recipe)
        file_bytes = sum(map(_tensor_bytes, (Path(folder) / "model").glob("*.safetensors")))
        again = AutoModelForCausalLM.from_pretrained(Path(folder) / "model").to(tokens.device)
    for module in quantized_linears(again).values():
        module.use_kernel(_kernel(tokens.device.type))
    return {
        "file_bytes": file_bytes,
        "formula_bytes": round(packed_bytes) + sum(tensor.nbytes for tensor in rest.values()),
        "is_identical": torch.equal(again(tokens, use_cache=False).logits, expected),
    }


def _kernel(device: str) -> str:
    """Return the kernel that multiplies in float32: with the weight decoded once, or on a GPU on every call."""
    return "float32" if device == "cpu" else "reference"


def _is_packed(model: Any, name: str) -> bool:
    """Whether a tensor belongs to the packed weight of a linear; a bias does not."""
    owners = [path for path in quantized_linears(model) if name.startswith(f"{path}.")]
    return bool(owners) and name != f"{owners[0]}.bias"


def _tensor_bytes(path: Path) -> int:
    """Return the bytes of a safetensors file behind its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def _is_row_of(row: dict[str, Any], item: Variant, num_windows: int) -> bool:
    """Whether a row is what measuring a variant on so many windows would make again."""
    expected = {"system": item.system or "none", "bits": item.bits, "options": item.label, "windows": num_windows}
    return all(row[name] == expected[name] for name in KEY)


def merged(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with one more, in the order of `variants`; it replaces a row of the same key."""
    order = {(item.system or "none", item.bits, item.label): place for place, item in enumerate(variants())}
    kept = [old for old in rows if any(old[name] != row[name] for name in KEY)]
    return sorted(
        [*kept, row], key=lambda one: order.get((one["system"], one["bits"], one["options"]), len(order))
    )


def _existing_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows to begin with: those of the record when appending."""
    path = record.RESULTS / f"{arguments.record}.json"
    if not arguments.append or not path.is_file():
        return []
    rows: list[dict[str, Any]] = record.read(arguments.record)["rows"]
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=os.environ.get("QUATTUOR_DATA"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", help="measure only rows whose name contains one of these")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, help="evaluate only so many windows")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no row after these")
    parser.add_argument("--append", action="store_true", help="keep the rows of an existing record")
    parser.add_argument("--missing", action="store_true", help="measure only what the record lacks")
    parser.add_argument("--files", type=int, nargs="*", default=[], help="widths whose rows are stored as well")
    parser.add_argument("--record", default="weight_only")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("name the data folder with --data or QUATTUOR_DATA")
    arguments.data = Path(arguments.data)
    return arguments


if __name__ == "__main__":
    main()
