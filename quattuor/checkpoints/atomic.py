# SPDX-License-Identifier: Apache-2.0
"""A folder of shards that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from quattuor.checkpoints.tensors import INDEX_NAME, SINGLE_NAME
from quattuor.checkpoints.writing import disk_full, is_disk_full, sha256, write_json, write_safetensors
from quattuor.errors import InputError, compose

__all__ = ["DEFAULT_SHARD_BYTES", "ShardedFolder"]

DEFAULT_SHARD_BYTES = 4 * 2**30
_TEXT_BYTES = 2**24


class ShardedFolder:
    """Writes into a hidden folder beside the target and renames it into place when it is complete.

    Use it as a context manager: leaving it by any exception, an interrupt included, removes the hidden folder, so
    that no half checkpoint is left that loads.

    Args:
        folder: The folder to create.
        max_shard_bytes: Start a new file before the current one exceeds this size.
        overwrite: Replace an existing folder, after success only.

    Attributes:
        folder: The target.
        partial: The hidden folder, for the files that are not tensors.
        entries: SHA-256, shape, dtype and bytes of every tensor so far; its file after `write_index`.

    Raises:
        InputError: The folder exists and `overwrite` is False, or the shard size is no size.
    """

    def __init__(
        self, folder: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, overwrite: bool = False
    ) -> None:
        """Create the hidden folder."""
        self.folder = Path(folder).expanduser().absolute()
        if max_shard_bytes < 1:
            raise InputError(
                compose(
                    subject="max_shard_bytes",
                    value=max_shard_bytes,
                    constraint="is not a positive size",
                    place="checkpoint",
                    remedy="use a few gigabytes, for example 4 * 2**30",
                )
            )
        if self.folder.exists() and not overwrite:
            raise InputError(
                compose(
                    subject="output folder",
                    value=str(folder),
                    constraint="exists already",
                    place="checkpoint",
                    remedy="choose another folder, or pass overwrite=True to replace it",
                )
            )
        self.entries: dict[str, dict[str, Any]] = {}
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._is_in_place = False
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.partial = self.folder.parent / f".{self.folder.name}.partial-{os.getpid()}"
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir()

    def __enter__(self) -> "ShardedFolder":
        """Return the folder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what is not in place."""
        self.abort()

    def abort(self) -> None:
        """Remove the hidden folder, if it is not in place."""
        if not self._is_in_place:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append named tensors; full shards are written at once and leave memory.

        Raises:
            InputError: A name was added before.
            CheckpointError: The disk is full; the hidden folder is removed.
        """
        for name, tensor in tensors.items():
            if name in self.entries:
                raise InputError(
                    compose(
                        subject="tensor",
                        value=name,
                        constraint="was added before",
                        place=str(self.folder),
                        remedy="add every tensor once, tied ones under one name",
                    )
                )
            stored = tensor.detach().cpu().contiguous()
            pending_bytes = sum(waiting.nbytes for waiting in self._pending.values())
            if self._pending and pending_bytes + stored.nbytes > self._max_shard_bytes:
                self._flush()
            self._pending[name] = stored
            self.entries[name] = {
                "sha256": sha256(stored),
                "shape": list(stored.shape),
                "dtype": str(stored.dtype).removeprefix("torch."),
                "bytes": stored.nbytes,
            }

    def write_index(self) -> None:
        """Write the last shard, give the shards their final names, and write the index when there are several."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            final = SINGLE_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self.partial / _shard_name(index)).rename(self.partial / final)
            for name in names:
                weight_map[name] = final
                self.entries[name]["file"] = final
        if count > 1:
            total = sum(entry["bytes"] for entry in self.entries.values())
            with self.cleaning_up():
                write_json(
                    self.partial / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
                )

    def put_in_place(self) -> Path:
        """Sync everything and rename the hidden folder to the target."""
        with self.cleaning_up():
            for file in self.partial.rglob("*"):
                _sync(file)
            _sync(self.partial)
        replaced = self.partial.with_name(f".{self.folder.name}.replaced-{os.getpid()}")
        had_folder = self.folder.exists()
        if had_folder:
            self.folder.rename(replaced)
        self.partial.rename(self.folder)
        self._is_in_place = True
        _sync(self.folder.parent)
        if had_folder:
            shutil.rmtree(replaced)
        return self.folder

    @contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """Remove the hidden folder on any failure inside, and name a full disk as such.

        Raises:
            CheckpointError: The disk is full.
        """
        try:
            yield
        except OSError as error:
            self.abort()
            if not is_disk_full(error):
                raise
            raise disk_full(self.folder, _TEXT_BYTES) from error
        except BaseException:
            self.abort()
            raise

    def _flush(self) -> None:
        if self._pending:
            with self.cleaning_up():
                write_safetensors(self.partial / _shard_name(len(self._shards)), self._pending)
            self._shards.append(list(self._pending))
            self._pending = {}


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
