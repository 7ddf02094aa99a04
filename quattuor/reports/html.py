# SPDX-License-Identifier: Apache-2.0
"""A run as one HTML file without scripts or outside references."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from quattuor.quantization_report import LayerReport
from quattuor.reports.files import write_text_atomically
from quattuor.reports.result import RunResult, format_bytes, mean_bits_per_weight, site_errors

__all__ = ["Chart", "error_chart", "render", "write_html"]

WIDTH, HEIGHT = 760.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 12.0, 12.0, 34.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One linear in the chart: its place in pixels and what the pointer shows."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The linears of one kind over the blocks."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Relative error of each linear over its block, on a logarithmic axis."""

    series: tuple[Series, ...]
    y_ticks: tuple[Point, ...]
    x_ticks: tuple[Point, ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    bottom: float = HEIGHT - BOTTOM
    top: float = TOP


def render(result: RunResult) -> str:
    """Return the HTML text of a run; every value in it is escaped."""
    environment = Environment(
        loader=PackageLoader("quattuor.reports", package_path="."), autoescape=True, undefined=StrictUndefined
    )
    report = result.quantization
    layers = report.layers if report is not None else []
    return environment.get_template("report.html").render(
        result=result,
        report=report,
        chart=error_chart(layers),
        site_errors=site_errors(layers),
        bits_per_weight=mean_bits_per_weight(layers) if layers else None,
        ratios=[
            item.perplexity.perplexity / _first_perplexity(result, item.source) for item in result.evaluations
        ],
        total_seconds=sum(report.seconds.values()) if report is not None else 0.0,
        recipe_json=json.dumps(result.recipe, indent=2, ensure_ascii=False),
        format_bytes=format_bytes,
    )


def write_html(result: RunResult, path: Path) -> None:
    """Write the HTML text to a file, as a whole or not at all."""
    write_text_atomically(path, render(result))


def error_chart(layers: Sequence[LayerReport]) -> Chart | None:
    """Lay out the chart; None without a positive error to draw. A linear without error is not drawn."""
    drawn = [(layer, _block_index(layer.name)) for layer in layers if layer.error > 0]
    if not drawn:
        return None
    lowest = math.floor(math.log10(min(layer.error for layer, _ in drawn)))
    highest = max(math.ceil(math.log10(max(layer.error for layer, _ in drawn))), lowest + 1)
    last = max(max(index for _, index in drawn), 1)

    def x(index: int) -> float:
        return round(LEFT + 10 + (WIDTH - RIGHT - LEFT - 20) * index / last, 1)

    def y(logarithm: float | int) -> float:
        return round(TOP + (HEIGHT - BOTTOM - TOP) * (highest - logarithm) / (highest - lowest), 1)

    kinds: dict[str, list[Point]] = {}
    for layer, index in drawn:
        point = Point(x=x(index), y=y(math.log10(layer.error)), label=f"{layer.name}: {layer.error:.3e}")
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(point)
    step = max(1, math.ceil((last + 1) / 16))
    powers = range(lowest, highest + 1, max(1, (highest - lowest) // 6))
    return Chart(
        series=tuple(Series(name=name, points=tuple(points)) for name, points in kinds.items()),
        y_ticks=tuple(Point(x=LEFT, y=y(power), label=f"1e{power}") for power in powers),
        x_ticks=tuple(Point(x=x(i), y=HEIGHT - BOTTOM, label=str(i)) for i in range(0, last + 1, step)),
    )


def _block_index(name: str) -> int:
    """Return the first number among the parts of a module's name: the block of "model.layers.3.mlp.up_proj"."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else 0


def _first_perplexity(result: RunResult, source: str) -> float:
    return next(item.perplexity.perplexity for item in result.evaluations if item.source == source)
