# SPDX-License-Identifier: Apache-2.0
"""A model to read from: a folder, a file, a hub id or a model in memory, one module at a time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quattuor.checkpoints.base import read_generation_config, read_tokenizer
from quattuor.checkpoints.locating import resolve
from quattuor.checkpoints.skeleton import empty_model, tied_names
from quattuor.checkpoints.tensors import MemoryStore, SafetensorsStore, TensorStore
from quattuor.errors import CheckpointError, InputError, UnsupportedError, compose

__all__ = ["ModelSource", "resolve"]


class ModelSource:
    """A causal language model whose weights are read when asked for.

    Folders, single safetensors files and hub ids are read shard by shard: never more than the requested tensors
    are in memory. A `.gguf` file is decoded to float32 as a whole when its first weight is asked for and stays in
    memory; a model in memory is read from where it is. All offer the same interface.

    Args:
        model: A folder with safetensors, a `.safetensors` file beside its `config.json`, a hub id, a `.gguf`
            file, or a `PreTrainedModel`.
        tokenizer: Used instead of the one found beside the weights.

    Attributes:
        config: The model's configuration.
        model_name: Short name for reports.
        path: The local folder or file; None for a model in memory.

    Raises:
        InputError: The path does not exist and is no hub id in reach, or the model is quantized already.
        CheckpointError: Shards are missing or truncated.
        UnsupportedError: An encoder or encoder-decoder model.
    """

    def __init__(
        self, model: str | os.PathLike[str] | PreTrainedModel, *, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Open the source; reads configuration and headers, no weights."""
        self._store: TensorStore | None = None
        self._skeleton: PreTrainedModel | None = None
        self._tokenizer = tokenizer
        self._generation_config: GenerationConfig | None = None
        self._gguf: Path | None = None
        self.path: Path | None = None
        if isinstance(model, PreTrainedModel):
            self.config = model.config
            self.model_name = str(model.config.name_or_path or type(model).__name__)
            _reject_quantized(self.config, self.model_name)
            self._generation_config = model.generation_config
            self._store = MemoryStore(model.state_dict())
        else:
            self.path = resolve(model)
            self._gguf = self.path if self.path.suffix == ".gguf" else None
            self.model_name = str(model) if not self.path.exists() else self.path.resolve().stem
            self.config = self._read_config()
            _reject_quantized(self.config, str(model))
            if self._gguf is None:
                self._store = SafetensorsStore(self.path)
        if getattr(self.config, "is_encoder_decoder", False):
            raise UnsupportedError(
                compose(
                    subject="model_type",
                    value=self.config.model_type,
                    constraint="is an encoder-decoder model",
                    place=self.model_name,
                    remedy="use a decoder such as Llama, Qwen, Mistral, Gemma, Phi-3 or OPT",
                )
            )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the weights, or None when there is none."""
        if self._tokenizer is None and self.path is not None:
            if self._gguf is not None:
                self._tokenizer = AutoTokenizer.from_pretrained(self._gguf.parent, gguf_file=self._gguf.name)
            else:
                folder = self.path if self.path.is_dir() else self.path.parent
                self._tokenizer = read_tokenizer(folder)
        return self._tokenizer

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The generation configuration beside the weights, or None when there is none."""
        if self._generation_config is None and self.path is not None and self._gguf is None:
            self._generation_config = read_generation_config(self.path if self.path.is_dir() else self.path.parent)
        return self._generation_config

    def skeleton(self) -> PreTrainedModel:
        """Build the model with parameters on the meta device and real buffers.

        Raises:
            CheckpointError: A parameter of the model is not among the stored tensors, or has another shape.
        """
        model = empty_model(self.config)
        if self._gguf is None:
            self._check_complete(model)
        return model

    def load_(self, module: nn.Module, prefix: str = "", dtype: torch.dtype = torch.float32) -> None:
        """Materialise the parameters of one submodule, replacing them; floating point in `dtype`.

        A tied parameter gets a copy of what it is tied to.

        Args:
            module: A submodule of `skeleton()`, or of any model of the same configuration.
            prefix: Its full name in the model; empty for the whole model.
            dtype: Of floating-point parameters.

        Raises:
            CheckpointError: A tensor is missing, has another shape than the module, or holds NaN or infinity.
        """
        for owner, leaf, full in _slots(module, prefix):
            tensor = self._checked(full, tuple(getattr(owner, leaf).shape))
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def release_(self, module: nn.Module) -> None:
        """Put the parameters of a submodule back on the meta device."""
        for owner in module.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def whole(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Load the entire model, tied parameters sharing storage again."""
        model = self.skeleton()
        tied = tied_names(model)
        self.load_(model, "", dtype)
        if tied:
            model.tie_weights()
        return model

    def read(self, name: str) -> Tensor:
        """Return one stored tensor by its name in the model, in the stored dtype.

        Raises:
            CheckpointError: There is no such tensor.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise self._missing(name)
        return self._tensors.read(stored)

    def names(self) -> frozenset[str]:
        """Return the names of the stored tensors, as they are stored."""
        return self._tensors.names()

    @property
    def _tensors(self) -> TensorStore:
        if self._store is None:
            self._store = MemoryStore(self._read_gguf())
        return self._store

    def _read_config(self) -> Any:
        assert self.path is not None, "only called for stored models"
        if self._gguf is not None:
            config = AutoConfig.from_pretrained(self._gguf.parent, gguf_file=self._gguf.name)
            config.architectures = config.architectures or [_class_name(config)]
            return config
        folder = self.path if self.path.is_dir() else self.path.parent
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                compose(
                    subject="config.json",
                    value="missing",
                    constraint="is needed to build the model",
                    place=str(folder),
                    remedy="pass a folder that save_pretrained wrote",
                )
            )
        return AutoConfig.from_pretrained(folder)

    def _read_gguf(self) -> dict[str, Tensor]:
        assert self._gguf is not None, "only called for a .gguf file"
        options: dict[str, Any] = {}
        gguf_config = getattr(transformers, "GgufConfig", None)  # absent before it could keep blocks packed
        if gguf_config is not None:
            options["quantization_config"] = gguf_config(gguf_file=self._gguf.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            self._gguf.parent, gguf_file=self._gguf.name, dtype=torch.float32, **options
        )
        tensors: dict[str, Tensor] = model.state_dict()
        return tensors

    def _check_complete(self, model: PreTrainedModel) -> None:
        for owner, leaf, full in _slots(model, ""):
            stored = self._stored_name(full)
            if stored is None:
                raise self._missing(full)
            self._check_shape(full, self._tensors.shape(stored), tuple(getattr(owner, leaf).shape))

    def _checked(self, full: str, shape: tuple[int, ...]) -> Tensor:
        stored = self._stored_name(full)
        if stored is None:
            raise self._missing(full)
        self._check_shape(full, self._tensors.shape(stored), shape)
        tensor = self._tensors.read(stored)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                compose(
                    subject=full,
                    value=f"{count} of {tensor.numel()} values",
                    constraint="are NaN or infinite",
                    place=self.model_name,
                    remedy="repair the checkpoint; no quantizer can round such weights",
                )
            )
        return tensor

    def _check_shape(self, full: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise CheckpointError(
                compose(
                    subject=full,
                    value=str(found),
                    constraint=f"is not the shape {expected} that config.json implies",
                    place=self.model_name,
                    remedy="use the config.json that belongs to these weights",
                )
            )

    def _missing(self, full: str) -> CheckpointError:
        examples = ", ".join(sorted(self._tensors.names())[:3])
        return CheckpointError(
            compose(
                subject="tensor",
                value=full,
                constraint=f"is not among the stored tensors ({examples}, ...)",
                place=self.model_name,
                remedy="use weights of the same architecture as config.json",
            )
        )

    def _stored_name(self, full: str) -> str | None:
        """Return the name under which a parameter is stored.

        Some checkpoints lack the prefix of the base model ("layers.0..." for "model.layers.0..."), older ones have
        one that the class has not. A tied parameter is read from what it is tied to, even where a copy is stored.
        """
        if self._skeleton is None:
            self._skeleton = empty_model(self.config)
        base = self._skeleton.base_model_prefix + "."
        names = self._tensors.names()
        aliases = (tied_names(self._skeleton).get(full, full), full)
        for alias in aliases:
            for candidate in (alias, alias.removeprefix(base), base + alias):
                if candidate in names:
                    return candidate
        return None


def _slots(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield (owner, attribute, full name) of every parameter."""
    for path, owner in module.named_modules():
        base = ".".join(part for part in (prefix, path) if part)
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, leaf, f"{base}.{leaf}" if base else leaf


def _class_name(config: Any) -> str:
    return type(empty_model(config)).__name__


def _reject_quantized(config: Any, place: str) -> None:
    existing = getattr(config, "quantization_config", None)
    if existing is None:
        return
    method = existing.get("quant_method") if isinstance(existing, dict) else existing.quant_method
    method = getattr(method, "value", method)
    remedy = "start from the original model; a second rounding would only lose more"
    if method == "gguf":
        remedy = "pass the path of the .gguf file, or load it with GgufConfig(dequantize=True)"
    raise InputError(
        compose(
            subject="quantization_config",
            value=f"quant_method={method}",
            constraint="says that the model is quantized already",
            place=place,
            remedy=remedy,
        )
    )
