# SPDX-License-Identifier: Apache-2.0
"""Models ready to run, quantized or not, with their tokenizers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from quattuor.checkpoints.base import read_tokenizer
from quattuor.checkpoints.layouts import QUANT_METHOD
from quattuor.checkpoints.source import ModelSource, resolve
from quattuor.errors import InputError, UnsupportedError, compose

__all__ = [
    "DtypeName",
    "LoadedModel",
    "load_model",
    "load_source",
    "max_positions",
    "require_tokenizer",
    "resolve_device",
]

DtypeName = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, its short name, and whether Quattuor quantized it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    is_quantized: bool

    @property
    def label(self) -> str:
        """How reports name it: "quantized" or "original"."""
        return "quantized" if self.is_quantized else "original"


def load_model(model: str, *, device: torch.device, dtype: DtypeName = "float32") -> LoadedModel:
    """Load a checkpoint of Quattuor, or an unquantized model from a folder, a hub id or a `.gguf` file.

    Args:
        model: Path or hub id.
        device: Where the model is put.
        dtype: Of everything that is not packed.

    Raises:
        InputError: There is no such model, or it has no tokenizer.
        CheckpointError: Its files are damaged.
        UnsupportedError: Another library quantized it.
    """
    path = resolve(model)
    method = _quant_method(path)
    if method is not None and method != QUANT_METHOD:
        raise UnsupportedError(
            compose(
                subject="quant_method",
                value=method,
                constraint="is the layout of another library",
                place=model,
                remedy="pass a folder that Quattuor wrote, or the model before it was quantized",
            )
        )
    if method is None:
        return load_source(ModelSource(model), device=device, dtype=dtype)
    loaded = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)))
    tokenizer = require_tokenizer(read_tokenizer(path), model)
    return LoadedModel(model=_on(loaded, device), tokenizer=tokenizer, name=path.resolve().name, is_quantized=True)


def load_source(source: ModelSource, *, device: torch.device, dtype: DtypeName = "float32") -> LoadedModel:
    """Load all of an unquantized source; the arguments and errors are those of `load_model`."""
    loaded = source.whole(getattr(torch, dtype))
    tokenizer = require_tokenizer(source.tokenizer, source.model_name)
    return LoadedModel(model=_on(loaded, device), tokenizer=tokenizer, name=source.model_name, is_quantized=False)


def _on(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    moved = cast(PreTrainedModel, model.to(device))  # type: ignore[arg-type]  # decorated by transformers
    moved.train(False)
    return moved


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, place: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer. Raises InputError when there is none."""
    if tokenizer is None:
        raise InputError(
            compose(
                subject="tokenizer",
                value=None,
                constraint="is missing, so that no text can be read",
                place=place,
                remedy="put tokenizer.json and tokenizer_config.json beside the weights",
            )
        )
    return tokenizer


def max_positions(config: object) -> int | None:
    """Return the longest sequence a configuration allows; None when it states no limit."""
    value = getattr(config, "max_position_embeddings", None)
    return int(value) if value is not None else None


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the first CUDA device, or the CPU without one.

    Raises:
        InputError: The name is no device, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _no_device(name, "is not the name of a device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise _no_device(name, f"is not among the {torch.cuda.device_count()} CUDA devices of this machine")
    return device


def _no_device(name: str, constraint: str) -> InputError:
    remedy = "use auto, cpu, cuda or cuda:1"
    return InputError(
        compose(subject="device", value=name, constraint=constraint, place="this machine", remedy=remedy)
    )


def _quant_method(path: Path) -> str | None:
    """Return the `quant_method` in a folder's configuration; None for an unquantized model or a `.gguf` file."""
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".gguf" or not (folder / "config.json").is_file():
        return None
    existing = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if existing is None:
        return None
    method = existing.get("quant_method") if isinstance(existing, dict) else existing.quant_method
    return str(getattr(method, "value", method))
