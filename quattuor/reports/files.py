# SPDX-License-Identifier: Apache-2.0
"""Files that are either complete or absent."""

import os
import tempfile
from pathlib import Path

from quattuor.errors import InputError, compose

__all__ = ["write_text_atomically"]


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
        raise InputError(
            compose(
                subject="file",
                value=str(path),
                constraint=f"cannot be written ({error.strerror})",
                place="report",
                remedy="name a file in an existing folder with free space and write permission",
            )
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
