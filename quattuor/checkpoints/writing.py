# SPDX-License-Identifier: Apache-2.0
"""The functions that write the files of a checkpoint.

A safetensors file is: 8 bytes, the length of the header as a little-endian integer; the header, JSON padded with
spaces to a multiple of 8 bytes, which gives dtype, shape and byte range of every tensor; the bytes of the tensors.
It is written here rather than by the library so that a full disk is an `OSError` and no second copy of a shard is
held in memory.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quattuor.checkpoints.tensors import DTYPE_NAMES
from quattuor.errors import CheckpointError, compose

__all__ = ["disk_full", "is_disk_full", "sha256", "write_bytes", "write_json", "write_safetensors"]


def sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in memory order."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and sync one file; tensors lie in the given order.

    Raises:
        CheckpointError: The disk is full; the message gives the bytes needed and free.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    needed = 8 + len(encoded) + offset
    try:
        with file.open("wb") as stream:
            write_bytes(stream, len(encoded).to_bytes(8, "little"))
            write_bytes(stream, encoded)
            for tensor in tensors.values():
                write_bytes(stream, _bytes_of(tensor))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise disk_full(file, needed) from error


def write_bytes(stream: BinaryIO, data: bytes | memoryview) -> None:
    """Write all bytes to an open file; the place where a full disk shows."""
    stream.write(data)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write plain data as readable JSON."""
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(file: Path, needed_bytes: int) -> CheckpointError:
    """Return the error for a disk without room for a file."""
    free = shutil.disk_usage(file.parent).free
    return CheckpointError(
        compose(
            subject="disk space",
            value=f"{free} bytes free",
            constraint=f"is less than the {needed_bytes} bytes of {file.name}",
            place=str(file.parent),
            remedy="free space or choose another output folder; nothing was left behind",
        )
    )
