# SPDX-License-Identifier: Apache-2.0
"""The one writer of measured figures: `benchmarks/results/<name>.json`.

A record is an object with `command`, `commit`, `date`, `hardware`, `versions` and `rows`: flat objects whose keys
carry their units (`latency_us`, `perplexity`, `bits_per_weight`, `seconds`). The tables of `docs/` are made from
records by `benchmarks/report.py`; no figure is quoted without one.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quattuor.errors import InputError, compose
from quattuor.reports.environment import hardware, versions
from quattuor.reports.files import write_text_atomically

__all__ = ["RESULTS", "read", "write"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIELDS = ("command", "commit", "date", "hardware", "versions", "rows")

Scalar = str | int | float | bool | None


def write(
    name: str,
    rows: Sequence[Mapping[str, Scalar]],
    command: str | None = None,
    *,
    folder: Path = RESULTS,
    to: Path | None = None,
) -> Path:
    """Write a record, replacing an earlier one of the same name as a whole.

    Args:
        name: Lower-case words joined by underscores; the name of the file.
        rows: At least one flat object of strings, finite numbers, booleans or None.
        command: What makes this record again; None for the command line of this process.
        folder: Where records lie.
        to: The file to write, whatever its name; None for that of the record in the folder.

    Raises:
        InputError: The name or a row is not of this form; the message names the row and the key.
    """
    _check_name(name)
    _check_rows(name, rows)
    record = {
        "command": command if command is not None else _command_line(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "rows": [dict(row) for row in rows],
    }
    path = folder / f"{name}.json" if to is None else to
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def read(name: str, *, folder: Path = RESULTS) -> dict[str, Any]:
    """Return a record.

    Raises:
        InputError: There is no such record, or its file is not one.
    """
    _check_name(name)
    path = folder / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(item.stem for item in folder.glob("*.json"))) or "none yet"
        raise _error("record", name, "does not exist", str(folder), f"use one of those there: {known}")
    record = json.loads(path.read_text(encoding="utf-8"))
    missing = [field for field in FIELDS if field not in record]
    if missing:
        raise _error("record", name, f"lacks {', '.join(missing)}", str(path), "measure it again")
    _check_rows(name, record["rows"])
    return dict(record)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise _error("name", name, "is not lower-case words joined by underscores", "record", "rename the record")


def _check_rows(name: str, rows: Sequence[Mapping[str, Scalar]]) -> None:
    if not rows:
        raise _error("rows", [], "holds no measurement", f"record {name}", "write the record after measuring")
    for index, row in enumerate(rows):
        place = f"record {name}, row {index}"
        if not row:
            raise _error("row", {}, "is empty", place, "leave it out")
        for key, value in row.items():
            if not isinstance(key, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", key):
                raise _error("key", key, "is not lower-case words joined by underscores", place, "rename the key")
            if not isinstance(value, str | int | float | None):
                kind = type(value).__name__
                raise _error(key, kind, "is not a string, number, boolean or None", place, "flatten the row")
            if isinstance(value, float) and not math.isfinite(value):
                raise _error(key, value, "is not finite", place, "use None for a figure that does not exist")


def _error(subject: str, value: object, constraint: str, place: str, remedy: str) -> InputError:
    return InputError(compose(subject=subject, value=value, constraint=constraint, place=place, remedy=remedy))


def _command_line() -> str:
    """Return this process's command line with paths relative to the repository, but not where the record goes."""
    arguments = ["python", *sys.orig_argv[1:]]
    if "--json" in arguments:
        place = arguments.index("--json")
        del arguments[place : place + 2]
    return shlex.join(argument.replace(f"{ROOT}/", "") for argument in arguments)


def _commit() -> str:
    """Return the commit, with "-dirty" when tracked files other than records and docs differ from it."""
    revision = _git("rev-parse", "HEAD")
    if revision is None:  # a copy without history, as on a machine that only measures
        return os.environ.get("QUATTUOR_COMMIT", "unknown")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return revision + ("-dirty" if changes else "")


def _git(*arguments: str) -> str | None:
    """Return the output of git, or None outside a repository or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
