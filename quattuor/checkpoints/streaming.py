# SPDX-License-Identifier: Apache-2.0
"""From a source to a checkpoint one module at a time: never more than a block is in memory."""

from typing import Any

from torch import nn

from quattuor.checkpoints.native import CheckpointWriter
from quattuor.checkpoints.skeleton import quantized_linears, tied_names
from quattuor.checkpoints.source import ModelSource
from quattuor.nn.layout import LinearLayout

__all__ = ["StreamingStore"]


class StreamingStore:
    """Loads the modules of a skeleton from a source, and writes and releases them when they are finished.

    Args:
        source: Where parameters come from.
        writer: Where finished modules go.
        model: The source's skeleton. As long as its configuration ties the head, only the embedding is written.

    Attributes:
        layouts: Layout of every packed linear written so far, for `CheckpointWriter.finish`.
    """

    def __init__(self, source: ModelSource, writer: CheckpointWriter, model: Any) -> None:
        """Remember which parameters are tied, before loading separates them."""
        self._source = source
        self._writer = writer
        self._config = model.config
        self._tied = tied_names(model)
        self.layouts: dict[str, LinearLayout] = {}

    def load_(self, module: nn.Module, prefix: str) -> None:
        """Make the parameters of a module real, in float32."""
        self._source.load_(module, prefix)

    def emit(self, module: nn.Module, prefix: str) -> None:
        """Write a finished module and release its memory."""
        state = {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
        if getattr(self._config, "tie_word_embeddings", False):
            state = {name: tensor for name, tensor in state.items() if name not in self._tied}
        self._writer.add(state)
        for path, linear in quantized_linears(module).items():
            self.layouts[f"{prefix}.{path}"] = linear.layout
            linear.to("meta")
        self._source.release_(module)
