# SPDX-License-Identifier: Apache-2.0
"""Rows of a record to which another run adds its own: only from the same device and the same versions."""

import json
from pathlib import Path

from quattuor.errors import InputError, compose
from quattuor.reports.environment import hardware, versions

__all__ = ["existing_rows"]

#: What the rows of one record share: fields of `hardware` and of `versions`.
SAME_HARDWARE = ("gpu", "gpu_memory_bytes")
SAME_VERSIONS = ("torch", "triton", "cuda")
Row = dict[str, str | int | float | bool | None]


def existing_rows(file: Path) -> list[Row]:
    """Return the rows of a record to append to, none when there is no file.

    Raises:
        InputError: The record was measured on another device, or with other versions of what is timed.
    """
    if not file.is_file():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    here = {"hardware": hardware(), "versions": versions()}
    for part, keys in (("hardware", SAME_HARDWARE), ("versions", SAME_VERSIONS)):
        for key in keys:
            if content[part].get(key) != here[part].get(key):
                raise InputError(
                    compose(
                        subject=f"{part}.{key}",
                        value=content[part].get(key),
                        constraint=f"differs from {here[part].get(key)}, with which this run would measure",
                        place=str(file),
                        remedy="measure every case again, without --append",
                    )
                )
    rows: list[Row] = content["rows"]
    return rows
