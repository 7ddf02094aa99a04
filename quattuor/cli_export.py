# SPDX-License-Identifier: Apache-2.0
"""`quattuor export` and `quattuor convert`: to and from the layouts of other projects."""

from pathlib import Path
from typing import Annotated

import typer

from quattuor.checkpoints.conversion import EXPORTS, READERS
from quattuor.checkpoints.conversion import convert as convert_folder
from quattuor.checkpoints.conversion import export as export_folder

__all__ = ["convert", "export"]

Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to create.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder after success.")]


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that Quattuor wrote.")],
    output: Output,
    to: Annotated[str, typer.Option(metavar="LAYOUT", help=f"{', '.join(EXPORTS)}.")],
    allow_rounding: Annotated[
        bool, typer.Option("--allow-rounding", help="Round what the layout keeps in fewer bits; never the codes.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write DIR in the layout of another project, without changing a number or not at all."""
    written = export_folder(folder, to, output, allow_rounding=allow_rounding, overwrite=overwrite)
    typer.echo(f"{to} checkpoint: {written}")


def convert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help=f"A checkpoint of {', '.join(READERS)}.")],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint of another project as a native one, bit for bit."""
    typer.echo(f"native checkpoint: {convert_folder(folder, output, overwrite=overwrite)}")
