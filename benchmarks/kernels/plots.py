# SPDX-License-Identifier: Apache-2.0
"""Draw the plots of docs/kernels from the record of the W4A8 kernels.

    python -m benchmarks.kernels.plots

`kernels_roofline.svg` shows the operations per second of each contender against the tokens of a batch, below the
roof of 4-bit weights; `kernels_speedup.svg` the speed-up over the fp16 product of cuBLAS. Both leave out the
quantization of activations.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks import record

__all__ = ["draw", "main"]

FOLDER = record.ROOT / "docs" / "kernels"
#: The layers that are drawn: the largest that every table starts with, a middle one, and a small one.
SHAPES = ((28672, 8192), (8192, 8192), (4096, 4096))
STYLES = {
    ("quattuor", "channel"): ("Quattuor W4A8, channel", "C0", "-"),
    ("quattuor", "group128"): ("Quattuor W4A8, groups of 128", "C0", "--"),
    ("humming_w4a8", "channel"): ("Humming W4A8, channel", "C1", "-"),
    ("humming_w4a8", "group128"): ("Humming W4A8, groups of 128", "C1", "--"),
    ("qqq_original", "channel"): ("QQQ W4A8, channel", "C2", "-"),
    ("qqq_original", "group128"): ("QQQ W4A8, groups of 128", "C2", "--"),
    ("w4a16_humming", "group128"): ("Humming W4A16, groups of 128", "C3", "--"),
    ("w4a16_marlin", "group128"): ("Marlin W4A16, groups of 128", "C6", "--"),
    ("cutlass_int8", "channel"): ("CUTLASS int8", "C7", "-"),
    ("cublas_fp8", "channel"): ("cuBLAS fp8", "C4", "-"),
    ("cublas_int8", "channel"): ("cuBLAS int8", "C5", "-"),
    ("cublas_fp16", "none"): ("cuBLAS fp16", "0.5", "-"),
}

Row = dict[str, Any]


def main() -> None:
    """Write both plots."""
    rows = record.read("kernels_w4a8")["rows"]
    draw(
        rows, FOLDER / "kernels_roofline.svg", "TOP/s", lambda row: operations(row) / row["latency_us"] / 1e6, True
    )
    draw(
        rows,
        FOLDER / "kernels_speedup.svg",
        "speed-up over cuBLAS fp16",
        lambda row: row["speedup_over_cublas_fp16"],
        False,
    )


def operations(row: Row) -> float:
    """Return the multiplications and additions of a case."""
    return 2.0 * row["m"] * row["n"] * row["k"]


def draw(rows: Sequence[Row], path: Path, label: str, value: Callable[[Row], float], has_roof: bool) -> None:
    """Draw one panel for each shape: `value` of each contender against the tokens of a batch."""
    shown = [shape for shape in SHAPES if any((row["n"], row["k"]) == shape for row in rows)]
    figure, panels = pyplot.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.6), squeeze=False)
    for panel, shape in zip(panels[0], shown, strict=True):
        draw_panel(panel, [row for row in rows if (row["n"], row["k"]) == shape], value, has_roof)
        panel.set_title(f"{shape[0]} x {shape[1]}")
        panel.set_xlabel("tokens")
        panel.set_ylabel(label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    # a fixed salt and no date: the same record gives the same file
    matplotlib.rcParams["svg.hashsalt"] = "quattuor"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_panel(panel: Any, rows: Sequence[Row], value: Callable[[Row], float], has_roof: bool) -> None:
    """Draw the contenders of one shape, and the roof."""
    kernel_only = [
        row for row in rows if not row["includes_activation_quantization"] or row["contender"] == "cublas_fp16"
    ]
    for (name, granularity), (label, color, line) in STYLES.items():
        points = [row for row in kernel_only if (row["contender"], row["granularity"]) == (name, granularity)]
        points.sort(key=lambda row: row["m"])
        panel.plot(
            [row["m"] for row in points],
            [value(row) for row in points],
            line,
            color=color,
            label=label,
            marker=".",
        )
    if has_roof:
        roof = sorted({(row["m"], operations(row) / row["floor_us"] / 1e6) for row in rows})
        panel.plot(*zip(*roof, strict=True), ":", color="black", label="roof of 4-bit weights")
        panel.set_yscale("log")
    panel.set_xscale("log", base=2)
    counts = sorted({row["m"] for row in rows})
    panel.set_xticks(counts, [str(count) for count in counts], fontsize=7)
    if not has_roof:
        panel.set_ylim(0, math.ceil(max(value(row) for row in kernel_only)))
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    main()
