# SPDX-License-Identifier: Apache-2.0
"""The sub-commands of `quattuor bench`: arguments -> a benchmark of the repository, run in a process of its own.

A process of its own, because the command line of that process is what its record states as its origin.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from quattuor.errors import UnsupportedError, compose
from quattuor.reports.files import check_writable

__all__ = ["bench", "run_benchmark"]

#: The repository, when the package is used from one.
ROOT = Path(__file__).resolve().parents[1]

bench = typer.Typer(no_args_is_help=True, help="Measure kernels and serving on this machine.")

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the record here.")]


@bench.callback()
def _commands() -> None:
    """Keep `bench` a group of commands while it has a single one."""


@bench.command()
def kernels(
    json_file: JsonFile = None,
    seconds: Annotated[float, typer.Option(help="Start no case after this time.")] = 1200.0,
    shapes: Annotated[
        str | None, typer.Option(metavar="NxK,...", help="Layers; all of benchmarks/shapes.py if not given.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="M,...", help="Token counts; all of benchmarks/shapes.py if not given.")
    ] = None,
    qqq: Annotated[
        Path | None, typer.Option(metavar="DIR", help="CUDA sources of the original QQQ kernel, to time it too.")
    ] = None,
    marlin: Annotated[Path | None, typer.Option(metavar="DIR", help="Likewise marlin/ of Marlin.")] = None,
    cutlass: Annotated[Path | None, typer.Option(metavar="DIR", help="Likewise include/ of CUTLASS.")] = None,
) -> None:
    """Time W4A8 linear layers against cuBLAS and every peer that is installed, on one GPU."""
    check_writable(json_file)
    arguments = ["--seconds", str(seconds)]
    peers = (("--qqq", qqq), ("--marlin", marlin), ("--cutlass", cutlass))
    for name, value in (("--shapes", shapes), ("--tokens", tokens), *peers, ("--json", json_file)):
        if value is not None:
            arguments += [name, str(value.resolve() if isinstance(value, Path) else value)]
    run_benchmark("benchmarks.kernels.w4a8", arguments, needs_cuda=True)


@bench.command()
def serve(
    json_file: JsonFile = None,
    shape: Annotated[str, typer.Option(help="Of the model, whose weights are random.")] = "llama-2-13b",
    formats: Annotated[
        str, typer.Option(metavar="NAME,...", help="What to compare.")
    ] = "quattuor_w4a8,fp16,w8a8,fp8,w4a16",
    batches: Annotated[str, typer.Option(metavar="N,...", help="Sequences at once.")] = "1,16,64",
    input_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of a prompt.")] = 1024,
    output_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of an answer.")] = 128,
    devices: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For each format.")] = 300.0,
    profile: Annotated[bool, typer.Option("--profile", help="Also time the kernels of a decode step.")] = False,
) -> None:
    """Time whole batches in vLLM against the stock formats: end to end, and to the first token."""
    check_writable(json_file)
    arguments = ["--shape", shape, "--formats", formats, "--batches", batches, "--devices", str(devices)]
    arguments += ["--input", str(input_tokens), "--output", str(output_tokens), "--timeout", str(timeout)]
    arguments += ["--profile", batches] if profile else []
    arguments += [] if json_file is None else ["--json", str(json_file.resolve())]
    run_benchmark("benchmarks.end_to_end.serve_vllm", arguments, needs_cuda=True)


def run_benchmark(module: str, arguments: list[str], *, needs_cuda: bool) -> None:
    """Run a benchmark module of the repository; its output is this process's, and so is its failure.

    Raises:
        UnsupportedError: The package is not used from a checkout, or there is no CUDA device.
        typer.Exit: The benchmark failed; it has printed why.
    """
    file = ROOT / (module.replace(".", "/") + ".py")
    if not file.is_file():
        raise UnsupportedError(
            compose(
                subject="benchmark",
                value=module,
                constraint="is in the repository and not in the installed package",
                place="quattuor bench",
                remedy="run the command in a checkout (pip install -e .)",
            )
        )
    if needs_cuda and not torch.cuda.is_available():
        raise UnsupportedError(
            compose(
                subject="device",
                value="none",
                constraint="offers no CUDA kernels to time",
                place="quattuor bench",
                remedy="run the command on a machine with an NVIDIA GPU",
            )
        )
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
