# SPDX-License-Identifier: Apache-2.0
"""Draws the plots of docs/serving.md from the records of `serve_vllm`, and writes the ratios its table shows.

    python -m benchmarks.end_to_end.serve_plots

`serving_seconds.svg` shows the seconds a batch takes, prefill apart; `serving_decode_step.svg` where the time of
one decode step goes when no kernel starts before the one before it ends. The record `serve_vllm_ratios` holds, for
each shape, batch and number of devices, by how much our format is faster than each other one.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks import record

__all__ = ["OURS", "RATIOS", "draw_seconds", "draw_steps", "main", "ratios", "time_by_part"]

FOLDER = record.ROOT / "docs"
OURS, RATIOS = "quattuor_w4a8", "serve_vllm_ratios"
#: What a kernel's name begins with, and the part of a decode step that it is.
PARTS = {
    "w4a8_": "linears",
    "cutlass::device_kernel": "attention",
    "flash": "attention",
    "vllm::reshape_and_cache": "key and value cache",
    "rms_norm_quantize": "norm, gate, quantization",
    "silu_mul_quantize": "norm, gate, quantization",
    "token_quantize": "norm, gate, quantization",
    "triton_": "norm, gate, quantization",
    "nvjet": "language model head",
}
OTHER = "the rest"
LABELS = {
    "quattuor_w4a8": "Quattuor W4A8",
    "quattuor_w4a8_g128": "Quattuor W4A8, groups of 128",
    "quattuor_w4a16": "Quattuor W4A16",
    "quattuor_w4a8_unfused": "Quattuor W4A8, not fused",
    "quattuor_w4a8_compiler": "Quattuor W4A8, fused by the compiler",
    "quattuor_w4a8_kv8": "Quattuor W4A8, fp8 KV cache",
    "fp8_kv8": "fp8, fp8 KV cache",
    "fp16": "fp16",
    "w4a16": "W4A16 (Machete)",
    "w8a8": "W8A8 int8",
    "fp8": "fp8",
    "w4a8_marlin": "W4A8 (Marlin)",
}

#: Kernels that start while the one before them runs, and wait within their own time: times that do not add up.
OVERLAPPING = (OURS,)

Row = dict[str, Any]


def main() -> None:
    """Write the plots and the ratios."""
    rows, kernels = (record.read(name)["rows"] for name in ("serve_vllm", "serve_vllm_kernels"))
    draw_seconds(rows, FOLDER / "serving_seconds.svg")
    draw_steps(kernels, FOLDER / "serving_decode_step.svg")
    found = ratios(rows)
    if found:
        record.write(RATIOS, found)


def ratios(rows: Sequence[Row]) -> list[Row]:
    """Return how many times the seconds of each format are ours, for each shape, batch and number of devices."""
    cases: dict[tuple[str, int, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        cases[row["shape"], row["batch"], row["devices"]][row["format"]] = row["end_to_end_s"]
    return [
        {"shape": shape, "batch": batch, "devices": devices, "ours_s": seconds[OURS]}
        | {f"{name}_over_ours": value / seconds[OURS] for name, value in seconds.items() if name != OURS}
        for (shape, batch, devices), seconds in cases.items()
        if len(seconds) > 1 and OURS in seconds
    ]


def time_by_part(kernels: Sequence[Row]) -> dict[str, float]:
    """Return the microseconds of each part of a decode step."""
    parts: dict[str, float] = defaultdict(float)
    for row in kernels:
        part = next((part for start, part in PARTS.items() if row["kernel"].startswith(start)), OTHER)
        parts[part] += row["time_us"]
    return dict(parts)


def draw_seconds(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for each shape and batch: a bar for each format, the fastest first."""
    cases: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["format"] in LABELS and row["devices"] == 1:
            cases[row["shape"], row["batch"]].append(row)
    shapes = sorted({shape for shape, _ in cases}, key=[shape for shape, _ in cases].index)
    batches = sorted({batch for _, batch in cases})
    size = (4.6 * len(batches), 2.8 * len(shapes))
    figure, panels = pyplot.subplots(len(shapes), len(batches), figsize=size, squeeze=False)
    for shape, line in zip(shapes, panels, strict=True):
        for batch, panel in zip(batches, line, strict=True):
            shown = sorted(cases[shape, batch], key=lambda row: -row["end_to_end_s"])
            names = [LABELS[row["format"]] for row in shown]
            colors = ["C0" if row["format"].startswith("quattuor") else "0.6" for row in shown]
            panel.barh(names, [row["end_to_end_s"] for row in shown], color=colors)
            panel.barh(names, [row["prefill_s"] for row in shown], color="black", alpha=0.35)
            panel.set_title(f"{shape}, batch {batch}", fontsize=10)
            panel.set_xlabel("seconds a batch (dark: prefill)", fontsize=8)
            panel.tick_params(labelsize=8)
    save(figure, path)


def draw_steps(kernels: Sequence[Row], path: Path) -> None:
    """Draw a panel for each batch: a stacked bar for each way to run our format without overlaps."""
    kernels = [row for row in kernels if row["format"] not in OVERLAPPING]
    batches = sorted({row["batch"] for row in kernels})
    figure, panels = pyplot.subplots(1, len(batches), figsize=(5.2 * len(batches), 3.2), squeeze=False)
    for batch, panel in zip(batches, panels[0], strict=True):
        formats = [
            name for name in LABELS if any((row["format"], row["batch"]) == (name, batch) for row in kernels)
        ]
        begin = dict.fromkeys(formats, 0.0)
        for index, part in enumerate([*dict.fromkeys(PARTS.values()), OTHER]):
            widths = []
            for name in formats:
                rows = [row for row in kernels if (row["format"], row["batch"]) == (name, batch)]
                widths.append(time_by_part(rows).get(part, 0.0) / 1000)
            names = [LABELS[name] for name in formats]
            panel.barh(names, widths, left=list(begin.values()), color=f"C{index}", label=part)
            begin = {name: left + width for (name, left), width in zip(begin.items(), widths, strict=True)}
        panel.set_title(f"one decode step, batch {batch}", fontsize=10)
        panel.set_xlabel("milliseconds in kernels", fontsize=8)
        panel.tick_params(labelsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, path, bottom=0.22)


def save(figure: Any, path: Path, bottom: float = 0.0) -> None:
    """Write a figure; the same record gives the same file."""
    figure.tight_layout(rect=(0, bottom, 1, 1))
    matplotlib.rcParams["svg.hashsalt"] = "quattuor"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
