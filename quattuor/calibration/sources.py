# SPDX-License-Identifier: Apache-2.0
"""Sources of text: named ones, of the standard library or the hub, and files.

| source | text | calibration | evaluation |
| --- | --- | --- | --- |
| `pydoc` | the reference topics in Python's own library (offline) | about 3/4 | about 1/4 |
| `wikitext2` | Salesforce/wikitext, wikitext-2-raw-v1 (hub) | train | test |
| `c4` | allenai/c4, en, first documents of one shard (hub) | train | validation |
| `pile` | mit-han-lab/pile-val-backup (hub) | documents 1024 to 5119 | documents 0 to 1023 |
| a `.txt`, `.jsonl` (field "text") or `.parquet` (column "text") file | the file | all of it | all of it |

A file has no splits: calibrating and evaluating on the same file measures memory, not quality. The topics of
`pydoc` differ a little between versions of Python; everything else is the same text everywhere.
"""

import importlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from quattuor.errors import CalibrationError, InputError, UnsupportedError, compose

__all__ = ["SOURCES", "Split", "load_text"]

Split = Literal["calibration", "evaluation"]

#: Paragraphs below this length (list markers, "Note:", signatures) may stand in both splits of `pydoc`.
SHORTEST_SHARED_PARAGRAPH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class _HubSplit:
    """Documents `first` to `last` (None: all) of one split, joined by `separator`."""

    split: str
    separator: str
    data_files: str | None = None
    first: int = 0
    last: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _HubText:
    """A dataset of the hub whose rows have a field "text"."""

    path: str
    name: str | None = None
    calibration: _HubSplit
    evaluation: _HubSplit


# The separators and the 1100 validation documents of C4 are those of the GPTQ authors' loaders, which the
# literature's perplexities follow.
HUB_TEXTS: dict[str, _HubText] = {
    "wikitext2": _HubText(
        path="Salesforce/wikitext",
        name="wikitext-2-raw-v1",
        calibration=_HubSplit(split="train", separator="\n\n"),
        evaluation=_HubSplit(split="test", separator="\n\n"),
    ),
    "c4": _HubText(
        path="allenai/c4",
        calibration=_HubSplit(
            split="train", separator=" ", data_files="en/c4-train.00000-of-01024.json.gz", last=4096
        ),
        evaluation=_HubSplit(
            split="validation", separator=" ", data_files="en/c4-validation.00000-of-00008.json.gz", last=1100
        ),
    ),
    "pile": _HubText(
        path="mit-han-lab/pile-val-backup",
        calibration=_HubSplit(split="validation", separator="\n\n", first=1024, last=5120),
        evaluation=_HubSplit(split="validation", separator="\n\n", last=1024),
    ),
}

SOURCES: tuple[str, ...] = ("pydoc", *HUB_TEXTS)
"""The sources that have names; every other source is the path of a file."""

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")


def load_text(source: str | Path, split: Split) -> str:
    """Return the text of a source.

    Args:
        source: A name in `SOURCES`, or the path of a `.txt`, `.jsonl` or `.parquet` file.
        split: Which part of a named source; "calibration" and "evaluation" share no text. A file has one part.

    Raises:
        InputError: The source does not exist, or a file does not hold text.
        CalibrationError: The text is empty, or the hub cannot be reached.
        UnsupportedError: The source needs a package that is not installed.
    """
    name = str(source)
    if name == "pydoc":
        text = _pydoc(split)
    elif name in HUB_TEXTS:
        text = _hub(name, split)
    else:
        text = _file(name)
    if not text.strip():
        raise CalibrationError(
            compose(
                subject="text",
                value="",
                constraint="is empty or only white space",
                place=f"data source {name}",
                remedy=f"name a file with text in it, or one of {', '.join(SOURCES)}",
            )
        )
    return text


def _pydoc(split: Split) -> str:
    """Return the reference topics of one split, each paragraph once.

    Topics repeat each other's paragraphs (`pydoc if` is a part of `pydoc compound`), so topics that share a
    paragraph stay together. The families, largest first, go where the text is short of its share.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts: dict[Split, list[str]] = {"calibration": [], "evaluation": []}
    sizes: dict[Split, int] = {"calibration": 0, "evaluation": 0}
    for family in _families(topics):
        paragraphs = _distinct_paragraphs(topics[name] for name in family)
        side: Split = "evaluation" if 3 * sizes["evaluation"] < sizes["calibration"] else "calibration"
        sizes[side] += sum(map(len, paragraphs))
        texts[side] += paragraphs
    return "\n\n".join(texts[split])


def _families(topics: dict[str, str]) -> list[list[str]]:
    """Group topics that share a paragraph, largest group first; names sorted, ties by name."""
    parent = {name: name for name in topics}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    owner: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in map(_normalized, topics[name].split("\n\n")):
            if len(paragraph) >= SHORTEST_SHARED_PARAGRAPH:
                parent[root(name)] = root(owner.setdefault(paragraph, name))
    families: dict[str, list[str]] = defaultdict(list)
    for name in sorted(topics):
        families[root(name)].append(name)
    return sorted(families.values(), key=lambda family: (-sum(len(topics[name]) for name in family), family))


def _distinct_paragraphs(texts: Iterable[str]) -> list[str]:
    kept = {_normalized(paragraph): paragraph for text in texts for paragraph in text.strip("\n").split("\n\n")}
    return [paragraph for key, paragraph in kept.items() if key]


def _normalized(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _hub(name: str, split: Split) -> str:
    """Read a dataset of the hub through the optional package `datasets`."""
    source = HUB_TEXTS[name]
    part: _HubSplit = getattr(source, split)
    datasets = _optional("datasets", extra="hub", place=f"data source {name}")
    try:
        # streaming: a shard of C4 holds 350 000 documents, of which a few thousand are read
        rows = datasets.load_dataset(
            source.path, source.name, data_files=part.data_files, split=part.split, streaming=True
        )
        documents = [row["text"] for row in islice(rows, part.first, part.last)]
    except OSError as error:
        raise CalibrationError(
            compose(
                subject="dataset",
                value=source.path,
                constraint=f"cannot be read from the hub ({error})",
                place=f"data source {name}",
                remedy="connect to the network, or use the offline source pydoc or a file",
            )
        ) from error
    return part.separator.join(documents)


def _file(name: str) -> str:
    path = Path(name)
    if path.suffix not in FILE_SUFFIXES:
        nearest = get_close_matches(name, SOURCES, n=1)
        raise InputError(
            compose(
                subject="data source",
                value=name,
                constraint=f"is neither one of {', '.join(SOURCES)} nor a {', '.join(FILE_SUFFIXES)} file",
                place="load_text",
                remedy=f"did you mean {nearest[0]}?" if nearest else "use pydoc, which needs no network",
            )
        )
    if not path.is_file():
        raise InputError(
            compose(
                subject="data source",
                value=name,
                constraint="is not an existing file",
                place="load_text",
                remedy=f"check the path, seen from {Path.cwd()}",
            )
        )
    if path.suffix == ".parquet":
        return "\n\n".join(_parquet_documents(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            compose(
                subject="byte",
                value=f"{error.object[error.start]:#04x}",
                constraint=f"at position {error.start} is not UTF-8",
                place=name,
                remedy="save the file as UTF-8",
            )
        ) from error
    return text if path.suffix == ".txt" else "\n\n".join(_jsonl_documents(text, name))


def _jsonl_documents(text: str, place: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _bad_row(line[:40], f"is not JSON ({error})", f"{place} line {number}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            keys = list(row) if isinstance(row, dict) else type(row).__name__
            raise _bad_row(keys, 'has no string in a field "text"', f"{place} line {number}")
        documents.append(row["text"])
    return documents


def _parquet_documents(path: Path) -> list[str]:
    """Read the column "text" through the optional package `pyarrow`."""
    parquet = _optional("pyarrow.parquet", extra="parquet", place=str(path))
    arrow = _optional("pyarrow", extra="parquet", place=str(path))
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise _bad_row(names, 'has no column "text"', str(path))
        documents = file.read(columns=["text"]).column("text").to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise _bad_row(path.name, f"is not a parquet file ({error})", str(path)) from error
    wrong = next((index for index, item in enumerate(documents) if not isinstance(item, str)), None)
    if wrong is not None:
        raise _bad_row(documents[wrong], 'in column "text" is not a string', f"{path} row {wrong}")
    return cast(list[str], documents)


def _bad_row(value: object, constraint: str, place: str) -> InputError:
    remedy = 'give every row a string in the field "text"'
    return InputError(compose(subject="row", value=value, constraint=constraint, place=place, remedy=remedy))


def _optional(module: str, *, extra: str, place: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            compose(
                subject="package",
                value=module.partition(".")[0],
                constraint="is not installed",
                place=place,
                remedy=f'run pip install "quattuor[{extra}]"',
            )
        ) from error
