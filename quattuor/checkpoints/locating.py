# SPDX-License-Identifier: Apache-2.0
"""From what a user calls a model to a path on this machine."""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from quattuor.errors import InputError, compose

__all__ = ["resolve"]

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")


def resolve(model: str | os.PathLike[str]) -> Path:
    """Return the local path of a model, downloading a hub id's safetensors when needed.

    Raises:
        InputError: No such path, and no hub id that can be reached.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    reason = "is not an existing path"
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and path.suffix not in (".gguf", ".safetensors"):
        try:
            return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
        except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
            summary = str(error).strip().splitlines()[0]
            reason = f"is neither an existing path nor a model that the hub gives: {summary}"
    raise InputError(
        compose(
            subject="model",
            value=str(model),
            constraint=reason,
            place="ModelSource",
            remedy="pass a folder with safetensors, a .gguf file, or the id of a public model while online",
        )
    )
