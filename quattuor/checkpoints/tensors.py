# SPDX-License-Identifier: Apache-2.0
"""Named tensors on disk or in memory, read one at a time."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quattuor.errors import CheckpointError, compose

__all__ = [
    "DTYPE_NAMES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "MemoryStore",
    "SafetensorsStore",
    "TensorStore",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorStore(ABC):
    """Tensors by name; nothing is read before it is asked for."""

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor; a copy of a stored one, the tensor itself of one in memory."""


class MemoryStore(TensorStore):
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors."""
        self._tensors = dict(tensors)

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """Return a copy of the tensor."""
        return self._tensors[name].clone()  # callers change what they read in place


class SafetensorsStore(TensorStore):
    """The safetensors files of a folder, or one such file.

    The headers of all files are read when the store is opened, so that a missing or truncated shard is found
    before any work is done; tensors are read when asked for.

    Args:
        path: A folder with `model.safetensors`, with an index and its shards, or with one other file; or a file.

    Raises:
        CheckpointError: No safetensors file, a shard that the index names is missing or truncated, or lacks a
            tensor that the index promises.
    """

    def __init__(self, path: Path) -> None:
        """Read the index and the headers."""
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        index = path / INDEX_NAME
        promised = _read_index(index) if path.is_dir() and index.is_file() else None
        for file in _files_of(path) if promised is None else sorted({path / name for name in promised.values()}):
            self._read_header(file)
        for name, file_name in (promised or {}).items():
            if self._files.get(name) != path / file_name:
                raise CheckpointError(
                    compose(
                        subject="tensor",
                        value=name,
                        constraint=f"is promised in {file_name} by the index but is not there",
                        place=str(path),
                        remedy="download or write the checkpoint again",
                    )
                )

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        return self._dtypes[name]

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._files[name]

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor, so that it outlives the file."""
        with safe_open(self._files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name).clone()
        return tensor

    def _read_header(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(
                compose(
                    subject="shard",
                    value=file.name,
                    constraint="is listed in the index but missing",
                    place=str(file.parent),
                    remedy="download or copy the missing file",
                )
            )
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (not a mapping)
                    piece = handle.get_slice(name)
                    self._files[name] = file
                    self._shapes[name] = tuple(piece.get_shape())
                    self._dtypes[name] = _dtype_of(piece.get_dtype(), name, file)
        except SafetensorError as error:
            raise CheckpointError(
                compose(
                    subject="shard",
                    value=f"{file.name} ({file.stat().st_size} bytes)",
                    constraint=f"is truncated or damaged: {error}",
                    place=str(file.parent),
                    remedy="download or copy the file again",
                )
            ) from error


def _dtype_of(name: str, tensor: str, file: Path) -> torch.dtype:
    if name not in _DTYPES:
        raise CheckpointError(
            compose(
                subject="dtype",
                value=name,
                constraint=f"of {tensor} is not one that can be read ({', '.join(sorted(_DTYPES))})",
                place=str(file),
                remedy="convert the checkpoint to bfloat16 first",
            )
        )
    return _DTYPES[name]


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(
            compose(
                subject="index",
                value=index.name,
                constraint=f"cannot be read: {error}",
                place=str(index.parent),
                remedy="download or copy the file again",
            )
        ) from error
    return {str(name): str(file) for name, file in weight_map.items()}


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / SINGLE_NAME).is_file():
        return [path / SINGLE_NAME]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "(empty)"
    raise CheckpointError(
        compose(
            subject="weights",
            value=found,
            constraint="contain no model.safetensors and no index of shards",
            place=str(path),
            remedy="save the model with save_pretrained, which writes safetensors",
        )
    )
