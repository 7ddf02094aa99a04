# SPDX-License-Identifier: Apache-2.0
"""Perplexity of QQQ and its variants on a real model: the record `qqq_accuracy`.

    python -m benchmarks.end_to_end.qqq_accuracy MODEL [--data DIR] [--device cuda] [--only NAME ...]
        [--budget-seconds S]

DIR holds `passages.txt` (calibration) and `wikitext2_test.txt` (evaluation). Every variant starts from the same
float32 model and is calibrated on the same windows. All are evaluated on the first 16 windows of 2048 tokens, the
main ones on the whole test set as well. The record is written after each variant, so an interrupted run keeps what
it has; with a budget no variant is started once it is spent, and those left out are named.
"""

import argparse
import copy
import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from quattuor.calibration.data import calibration_batches, evaluation_windows
from quattuor.checkpoints.source import ModelSource
from quattuor.evaluation.perplexity import perplexity
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.systems import qqq, rtn
from quattuor.transforms import AdaptiveSmoothing

LENGTH = 2048
FIRST_WINDOWS = 16
THRESHOLDS, SEQUENCES = 41, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row: a recipe, and the words that tell it from its neighbours."""

    system: str
    group_size: int | None
    variant: str
    recipe: Callable[[], Recipe] | None
    is_main: bool = False


def both(variant: str, *, is_main: bool = False, **options: Any) -> list[Variant]:
    """Return QQQ with these options, per channel and per group of 64."""
    return [
        Variant(
            system="qqq",
            group_size=size,
            variant=variant,
            recipe=lambda size=size: qqq(group_size=size, **options),
            is_main=is_main,
        )
        for size in (None, 64)
    ]


def variants() -> list[Variant]:
    """List what is measured, the most telling first: the baselines, the default, and each choice changed alone."""
    listed = [Variant(system="none", group_size=None, variant="fp32", recipe=None, is_main=True)]
    for size in (None, 64):
        listed.append(
            Variant(
                system="rtn",
                group_size=size,
                variant="rounding",
                recipe=lambda size=size: rtn(group_size=size, activation_bits=8),
                is_main=True,
            )
        )
    listed += both("default", is_main=True)
    listed += both("no rotation", rotation=False)
    listed += with_smoothing("smoothing instead of rotation", rotation=False)
    listed += both("positive scales only", choose_sign=False)
    listed += both("no clip search", clip="none")
    listed += both("original inputs", inputs="original")
    listed.append(
        Variant(
            system="qqq",
            group_size=64,
            variant="float16 group scales",
            recipe=lambda: qqq(group_size=64, integer_group_scales=False),
        )
    )
    listed += both("no coordinate descent", num_passes=0)
    listed += both("clip by plain squared error", clip="plain")
    listed += both("quantized inputs, not rounded", inputs="quantized")
    listed += with_smoothing("rotation and smoothing", rotation=True)
    listed += both("targets of the original model", correct_targets=True, sequential=True)
    listed += both("sequential sites", sequential=True)
    return listed


def with_smoothing(name: str, *, rotation: bool) -> list[Variant]:
    """Return QQQ with a shortened search for smoothing, per channel and per group of 64."""
    return [
        Variant(
            system="qqq",
            group_size=size,
            variant=f"{name}, {THRESHOLDS} thresholds on {SEQUENCES} sequences",
            recipe=lambda size=size: smoothed(size, rotation),
        )
        for size in (None, 64)
    ]


def smoothed(group_size: int | None, rotation: bool) -> Recipe:
    """Return QQQ with smoothing searched over fewer thresholds and sequences than the system's default."""
    recipe = qqq(group_size=group_size, rotation=rotation)
    smoothing = AdaptiveSmoothing(num_candidates=THRESHOLDS, max_sequences=SEQUENCES)
    return dataclasses.replace(recipe, transforms=(*recipe.transforms, smoothing))


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, default=os.environ.get("QUATTUOR_DATA"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", help="measure only variants whose name contains one of these")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--windows", type=int, help="evaluate only so many windows")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no variant after these")
    parser.add_argument("--record", default="qqq_accuracy")
    arguments = parser.parse_args()
    started_s = time.perf_counter()
    if arguments.data is None:
        parser.error("name the data folder with --data or QUATTUOR_DATA")
    source = ModelSource(arguments.model)
    original = source.whole()
    calibration = calibration_batches(
        source.tokenizer,
        (Path(arguments.data) / "passages.txt").read_text(),
        arguments.samples,
        arguments.length,
        seed=0,
    )
    text = (Path(arguments.data) / "wikitext2_test.txt").read_text()
    windows = evaluation_windows(source.tokenizer, text, LENGTH, arguments.windows)
    rows: list[dict[str, Any]] = []
    left_out = []
    for item in variants():
        name = f"{item.system} {item.variant} g{item.group_size}"
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        if time.perf_counter() - started_s > arguments.budget_seconds:
            left_out.append(name)
            continue
        measured = measure(item, original, calibration, windows, arguments.device)
        rows += measured
        shown = (f"{row['windows']}: {row['perplexity']:.3f}" for row in measured)
        print(f"{time.perf_counter() - started_s:.0f} s", name, *shown, measured[0]["seconds"], flush=True)
        record.write(arguments.record, rows)
    if left_out:
        print("budget spent, left out:", "; ".join(left_out), flush=True)


def measure(
    item: Variant, original: torch.nn.Module, calibration: torch.Tensor, windows: torch.Tensor, device: str
) -> list[dict[str, Any]]:
    """Quantize a copy of the model and return its two rows."""
    model = copy.deepcopy(original).to(device)
    start = time.perf_counter()
    bits, bits_per_weight, seconds = 32, 32.0, None
    if item.recipe is not None:
        report = quantize(model, item.recipe(), calibration, storage=device, kernel="float32")
        bits = 4
        bits_per_weight = sum(layer.bits_per_weight * layer.num_weights for layer in report.layers) / sum(
            layer.num_weights for layer in report.layers
        )
        seconds = time.perf_counter() - start
    rows = []
    parts = [("first 16", windows[:FIRST_WINDOWS])] + (
        [("all", windows)] if item.is_main and len(windows) > FIRST_WINDOWS else []
    )
    for label, part in parts:
        result = perplexity(model, part, batch_size=8)
        rows.append(
            {
                "system": item.system,
                "bits": bits,
                "group_size": item.group_size or 0,
                "variant": item.variant,
                "windows": label,
                "perplexity": result.perplexity,
                "perplexity_stderr": result.perplexity_stderr,
                "bits_per_weight": bits_per_weight,
                "seconds": seconds,
            }
        )
    return rows


if __name__ == "__main__":
    main()
