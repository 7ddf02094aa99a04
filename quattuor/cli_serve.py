# SPDX-License-Identifier: Apache-2.0
"""`quattuor serve`: an OpenAI-compatible server, vLLM's with a GPU, transformers' own without."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from quattuor.evaluation.loading import resolve_device
from quattuor.serving.launch import Engine, Options, choose_engine, this_machine, vllm_command
from quattuor.serving.local_server import make_server

__all__ = ["serve"]


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients; by default the folder's.")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="auto takes vLLM when there is a GPU.")] = "auto",
    devices: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    max_model_len: Annotated[int | None, typer.Option(metavar="N", help="Tokens of prompt and answer.")] = None,
    device: Annotated[str, typer.Option(help="Of transformers' server: auto, cpu, cuda or cuda:N.")] = "auto",
    show: Annotated[bool, typer.Option("--show", help="Say what would be started, and stop.")] = False,
) -> None:
    """Serve DIR at /v1/chat/completions and /v1/completions."""
    options = Options(engine=engine, host=host, port=port, name=name, devices=devices, max_model_len=max_model_len)
    chosen = choose_engine(folder, options, this_machine())
    command = vllm_command(folder, options)
    address = f"http://{host}:{port}/v1"
    if chosen == "vllm":
        typer.echo(f"vLLM at {address}: {shlex.join(command)}", err=not show)
    else:
        typer.echo(f"transformers at {address}, model {name or folder.resolve().name}", err=not show)
    if show:
        return
    if chosen == "vllm":
        os.execv(command[0], command)
    make_server(folder, host=host, port=port, device=str(resolve_device(device)), name=name).run()
