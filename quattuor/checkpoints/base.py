# SPDX-License-Identifier: Apache-2.0
"""A packed model outside of any file format, and what a checkpoint format must offer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from quattuor.activations.base import ActivationQuantizer
from quattuor.checkpoints.skeleton import expected_tensors, quantized_linears
from quattuor.errors import InputError, compose
from quattuor.nn.layout import LinearLayout
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["CheckpointFormat", "PackedModel", "read_generation_config", "read_tokenizer"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedModel:
    """A quantized model as its tensors.

    Args:
        config: The model's configuration; its quantization is described by the other fields.
        linears: Packed weight of every quantized linear by its full name.
        activations: Activation quantizer of every quantized linear.
        dense: Every other stored tensor by name, biases included.
        tokenizer: Kept beside the weights.
        generation_config: Kept beside the weights.
    """

    config: Any
    linears: Mapping[str, QuantizedTensor]
    activations: Mapping[str, ActivationQuantizer | None]
    dense: Mapping[str, Tensor]
    tokenizer: Any = field(default=None)
    generation_config: Any = field(default=None)

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: Any = None) -> "PackedModel":
        """Take the tensors of a model with packed linears; nothing is copied.

        Raises:
            InputError: The model has no packed linear.
        """
        modules = quantized_linears(model)
        if not modules:
            raise InputError(
                compose(
                    subject="model",
                    value=type(model).__name__,
                    constraint="has no packed linear",
                    place="PackedModel.from_model",
                    remedy="quantize it first, or save it with its own save_pretrained",
                )
            )
        packed = {f"{name}.{leaf}" for name, module in modules.items() for leaf in module.layout.tensor_names}
        return cls(
            config=model.config,
            linears={name: module.tensor for name, module in modules.items()},
            activations={name: module.layout.activations for name, module in modules.items()},
            dense={name: tensor for name, tensor in expected_tensors(model).items() if name not in packed},
            tokenizer=tokenizer,
            generation_config=getattr(model, "generation_config", None),
        )

    def layouts(self) -> dict[str, LinearLayout]:
        """Return the layout of every quantized linear."""
        return {name: LinearLayout.of(tensor, self.activations[name]) for name, tensor in self.linears.items()}


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, or None when it has none."""
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return AutoTokenizer.from_pretrained(folder)
    return None


def read_generation_config(folder: Path) -> Any:
    """Return the generation configuration of a folder, or None when it has none."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return None


class CheckpointFormat(ABC):
    """One layout of files on disk, written and read without changing a bit."""

    @abstractmethod
    def refuses(self, name: str, tensor: QuantizedTensor, activations: ActivationQuantizer | None) -> str | None:
        """Return why this format cannot hold a weight, or None when it can."""

    @abstractmethod
    def write(self, model: PackedModel, folder: Path) -> Path:
        """Write a model into a new folder. Raises UnsupportedError when the format cannot hold it."""

    @abstractmethod
    def read(self, folder: Path) -> PackedModel:
        """Read what `write` wrote. Raises CheckpointError when the files do not hold what they promise."""
