# SPDX-License-Identifier: Apache-2.0
"""Fills the tables of documentation pages from records, or checks that they equal the records.

    python -m benchmarks.report [--check] [PAGE.md ...]

A page holds a marker, and what stands below it up to the closing marker is generated:

    <!-- record: qqq_accuracy columns=system,bits,perplexity:.2f where=bits:4,variant:default -->
    <!-- /record -->

`columns` names keys of the rows in order, each with an optional format after a colon; a missing or null value
becomes a dash. `where` keeps the rows whose values, as text, equal the given ones. Without pages, README.md and
every page under docs/ are read. With `--check` nothing is written and the exit status is 1 when a page differs.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from benchmarks import record
from quattuor.errors import InputError, QuattuorError, compose

__all__ = ["fill", "main", "table"]

BLOCK = re.compile(
    r"^<!-- record: (?P<arguments>[^\n]*?) -->\n(?P<body>.*?)^<!-- /record -->$", re.MULTILINE | re.DOTALL
)
OPENING = re.compile(r"^\s*<!-- record:", re.MULTILINE)
DASH = "-"


def fill(text: str, *, page: str, folder: Path = record.RESULTS) -> str:
    """Return the text of a page with every table made again from its record.

    Raises:
        InputError: A marker is malformed or unclosed, or names a record, column or row that does not exist.
    """
    if len(OPENING.findall(text)) != len(BLOCK.findall(text)):
        raise _error(
            "marker", "<!-- record: ... -->", "is not closed", page, "add a line <!-- /record --> below it"
        )

    def replacement(match: re.Match[str]) -> str:
        made = _table_of(match["arguments"], page, folder)
        return f"<!-- record: {match['arguments']} -->\n{made}<!-- /record -->"

    return BLOCK.sub(replacement, text)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]]) -> str:
    """Return a Markdown table of (key, format) columns; numbers are right-aligned."""
    lines = [[name.replace("_", " ") for name, _ in columns]]
    lines.append(["---:" if _is_numeric(rows, name) else "---" for name, _ in columns])
    lines += [[_cell(row.get(name), spec) for name, spec in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables from records.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page differs")
    parser.add_argument("pages", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    pages = options.pages or [record.ROOT / "README.md", *sorted((record.ROOT / "docs").rglob("*.md"))]
    stale = []
    try:
        for page in pages:
            if _refresh(page, write=not options.check):
                stale.append(page)
    except QuattuorError as error:
        print(error, file=sys.stderr)
        return 1
    for page in stale:
        print(f"{page} {'differs from its records' if options.check else 'written'}")
    return 1 if options.check and stale else 0


def _refresh(page: Path, *, write: bool) -> bool:
    """Return whether a page differed from its records."""
    if not page.is_file():
        raise _error("page", str(page), "does not exist", "benchmarks.report", "name an existing Markdown file")
    text = page.read_text(encoding="utf-8")
    filled = fill(text, page=str(page))
    if write and filled != text:
        page.write_text(filled, encoding="utf-8")
    return filled != text


def _table_of(arguments: str, page: str, folder: Path) -> str:
    name, *options = arguments.split()
    place = f"{page}, record {name}"
    given = dict(option.partition("=")[::2] for option in options)
    for key in given:
        if key not in ("columns", "where"):
            raise _error("option", key, "is not columns or where", place, "write columns=a,b or where=key:value")
    rows = record.read(name, folder=folder)["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = _pairs(given["columns"]) if "columns" in given else [(key, "") for key in keys]
    conditions = _pairs(given["where"]) if "where" in given else []
    for key, _ in (*columns, *conditions):
        if key not in keys:
            nearest = get_close_matches(key, keys, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(keys)}"
            raise _error("column", key, "is in no row", place, remedy)
    kept = [row for row in rows if all(_cell(row.get(key), "") == value for key, value in conditions)]
    if not kept:
        raise _error("where", given["where"], "matches no row", place, "compare it with the record")
    return table(kept, columns)


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(item.partition(":")[0], item.partition(":")[2]) for item in text.split(",")]


def _is_numeric(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row[name] for row in rows if row.get(name) is not None]
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value.replace("|", "\\|").replace("\n", " ")
    return format(value, spec)


def _error(subject: str, value: object, constraint: str, place: str, remedy: str) -> InputError:
    return InputError(compose(subject=subject, value=value, constraint=constraint, place=place, remedy=remedy))


if __name__ == "__main__":
    sys.exit(main())
