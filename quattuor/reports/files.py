# SPDX-License-Identifier: Apache-2.0
"""Files that are either complete or absent."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quattuor.errors import InputError, compose

__all__ = ["check_writable", "write_json", "write_text_atomically"]


def write_text_atomically(path: Path, text: str) -> None:
    """Write to a temporary file in the same folder, then rename it: a reader never sees half a file.

    Raises:
        InputError: The folder does not exist or cannot be written to.
    """
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes the file private, which a report is not
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _unwritable(path, f"cannot be written ({error.strerror})") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write plain data as JSON, as a whole or not at all; no path, no file."""
    if path is not None:
        write_text_atomically(path, json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def check_writable(path: Path | None) -> None:
    """Raise InputError when a file could not be written, so that hours of work are not lost at their end."""
    if path is None:
        return
    if path.is_dir():
        raise _unwritable(path, "is a folder")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise _unwritable(path, "is not in an existing folder that can be written to")


def _unwritable(path: Path, constraint: str) -> InputError:
    remedy = "name a file in an existing folder with free space and write permission"
    return InputError(
        compose(subject="file", value=str(path), constraint=constraint, place="report", remedy=remedy)
    )
