# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal, one function per thing to show."""

import inspect
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from quattuor.checkpoints.verification import LayerRow, VerifiedRow
from quattuor.recipe import Recipe
from quattuor.reports.result import (
    Evaluation,
    Generation,
    RunResult,
    format_bytes,
    mean_bits_per_weight,
    site_errors,
)

__all__ = [
    "evaluation_table",
    "generation_table",
    "inspection_table",
    "quantization_table",
    "systems_table",
    "verification_table",
]

DASH = "-"


def systems_table(systems: Mapping[str, Callable[..., Recipe]]) -> Table:
    """List systems: name, what it does, what `--set` takes with its default."""
    table = _table("Systems", "system", "what it does", "--set")
    for name, system in systems.items():
        summary = (inspect.getdoc(system) or "").partition("\n")[0]
        parameters = inspect.signature(system).parameters.values()
        defaults = "\n".join(f"{item.name}={item.default}" for item in parameters)
        table.add_row(name, Text(summary), Text(defaults))
    return table


def quantization_table(result: RunResult) -> Table:
    """Summarise a quantization: size, error, time by phase, peak memory."""
    report = result.quantization
    assert report is not None, "only for a run that quantized"
    table = _table(f"{result.model_name}: {', '.join(result.systems)}", "what", "value")
    layers = report.layers
    table.add_row("linears", f"{len(layers)} in {report.blocks} blocks")
    table.add_row("bits per weight", f"{mean_bits_per_weight(layers):.3f}" if layers else DASH)
    for site, error in site_errors(layers).items():
        table.add_row(f"relative error of {site}", f"{error:.3e}")
    for phase, seconds in report.seconds.items():
        table.add_row(f"seconds: {phase}", f"{seconds:.1f}")
    table.add_row("peak memory", format_bytes(report.peak_memory_bytes))
    if report.peak_device_memory_bytes is not None:
        table.add_row("peak device memory", format_bytes(report.peak_device_memory_bytes))
    if result.calibration is not None:
        facts = result.calibration
        table.add_row("calibration", f"{facts.num_samples} x {facts.length} tokens of {facts.source}")
    if result.output is not None:
        table.add_row("written to", Text(result.output))
    return table


def evaluation_table(evaluations: Sequence[Evaluation], *, caption: str | None = None) -> Table:
    """Compare perplexities; each row counts its ratio to the first on the same text."""
    table = _table("Perplexity", "model", "text", "perplexity", "std. error", "ratio", "tokens", "seconds")
    table.caption = caption
    for item in evaluations:
        metric = item.perplexity
        first = next(other for other in evaluations if other.source == item.source).perplexity
        table.add_row(
            item.label,
            Text(item.source),
            f"{metric.perplexity:.3f}",
            DASH if metric.perplexity_stderr is None else f"{metric.perplexity_stderr:.3f}",
            f"{metric.perplexity / first.perplexity:.4f}",
            f"{metric.num_windows} x {metric.length}",
            f"{metric.seconds:.1f}",
        )
    return table


def generation_table(generations: Sequence[Generation]) -> Table:
    """Show prompts and what each model added, with its speed."""
    table = _table("Text", "model", "prompt and continuation", "tokens/s")
    for item in generations:
        text = Text(item.result.prompt, style="dim")
        text.append(item.result.text, style="not dim")
        table.add_row(item.label, text, f"{item.result.tokens_per_second:.1f}")
    return table


def inspection_table(rows: Sequence[LayerRow]) -> Table:
    """List the packed linears of a checkpoint."""
    table = _table(
        "Packed linears", "name", "shape", "format", "granularity", "activations", "bits per weight", "error"
    )
    for row in rows:
        table.add_row(
            Text(row.name),
            f"{row.out_features} x {row.in_features}",
            Text(row.format),
            Text(row.granularity),
            Text(row.activations or DASH),
            f"{row.bits_per_weight:.3f}",
            DASH if row.error is None else f"{row.error:.3e}",
        )
    return table


def verification_table(rows: Sequence[VerifiedRow]) -> Table:
    """List what was checked in a checkpoint."""
    table = _table("Verified", "name", "checks passed", "note")
    for row in rows:
        table.add_row(Text(row.name), ", ".join(row.checks), Text(row.note))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", title_style="bold")
    numbers = ("perplexity", "std. error", "ratio", "seconds", "tokens/s", "bits per weight", "error")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
