# SPDX-License-Identifier: Apache-2.0
"""Quattuor's own checkpoint: written as it streams in, put in place only when complete.

`docs/checkpoints.md` draws the layout of the folder.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from quattuor.activations.base import ActivationQuantizer
from quattuor.checkpoints.atomic import DEFAULT_SHARD_BYTES, ShardedFolder
from quattuor.checkpoints.base import CheckpointFormat, PackedModel, read_generation_config, read_tokenizer
from quattuor.checkpoints.layouts import quantization_config, read_layouts, stored_names
from quattuor.checkpoints.manifest import MANIFEST_NAME, build_manifest, model_card
from quattuor.checkpoints.skeleton import expected_tensors, quantized_linears, quantized_skeleton
from quattuor.checkpoints.tensors import SafetensorsStore
from quattuor.checkpoints.writing import write_json
from quattuor.errors import CheckpointError, InputError, compose
from quattuor.nn.layout import LinearLayout
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.recipe import Recipe

__all__ = ["CheckpointWriter", "NativeFormat", "read_native", "save_pretrained", "write_native"]


class CheckpointWriter:
    """Writes a native checkpoint as its tensors come, without leaving a half one; see `ShardedFolder`.

    Args:
        folder: The checkpoint to create.
        max_shard_bytes: Start a new file before the current one exceeds this size.
        overwrite: Replace an existing folder, after success only.

    Raises:
        InputError: The folder exists and `overwrite` is False.
    """

    def __init__(
        self, folder: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, overwrite: bool = False
    ) -> None:
        """Create the hidden folder."""
        self._target = ShardedFolder(folder, max_shard_bytes=max_shard_bytes, overwrite=overwrite)

    def __enter__(self) -> "CheckpointWriter":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what is not finished."""
        self.abort()

    def abort(self) -> None:
        """Remove the hidden folder, unless the checkpoint is finished."""
        self._target.abort()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append named tensors; full shards are written at once and leave memory.

        Raises:
            InputError: A name was added before.
            CheckpointError: The disk is full; the hidden folder is removed.
        """
        self._target.add(tensors)

    def finish(
        self,
        config: Any,
        recipe: Recipe,
        layouts: Mapping[str, LinearLayout],
        report: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        generation_config: Any = None,
    ) -> Path:
        """Write everything but the tensors, check completeness, sync and rename into place.

        Args:
            config: Configuration of the model; copied. The head is marked as untied when it was added.
            recipe: What was done.
            layouts: Layout of every quantized module by its full name.
            report: Plain data to keep in the manifest. Its list "layers" of rows with "name" and "error" gives the
                errors that `inspect` shows.
            tokenizer: Saved beside the weights when given.
            generation_config: Saved beside the weights when given.

        Returns:
            The folder.

        Raises:
            CheckpointError: A tensor of the model was not added, was added in another shape, or the disk is full.
        """
        target = self._target
        with target.cleaning_up():
            config = self._final_config(config, recipe, layouts)
            model = quantized_skeleton(config, layouts)
            self._check_complete(model)
            target.write_index()
            manifest = build_manifest(target.entries, quantized_linears(model), report)
            config.save_pretrained(target.partial)
            write_json(target.partial / MANIFEST_NAME, manifest)
            card = model_card(target.folder.name, recipe, manifest)
            (target.partial / "README.md").write_text(card, encoding="utf-8")
            for part in (tokenizer, generation_config):
                if part is not None:
                    part.save_pretrained(target.partial)
        return target.put_in_place()

    def _final_config(self, config: Any, recipe: Recipe, layouts: Mapping[str, LinearLayout]) -> Any:
        config = copy.deepcopy(config)
        packed = {full for name, layout in layouts.items() for full in stored_names(name, layout)}
        sizes: dict[str, int] = {}
        for name, entry in self._target.entries.items():
            if name not in packed and entry["dtype"].startswith(("float", "bfloat")):
                sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + entry["bytes"]
        if sizes:
            config.dtype = getattr(torch, max(sizes, key=lambda dtype: sizes[dtype]))
        if getattr(config, "tie_word_embeddings", False) and "lm_head.weight" in self._target.entries:
            config.tie_word_embeddings = False
        config.quantization_config = quantization_config(layouts, recipe)
        return config

    def _check_complete(self, model: PreTrainedModel) -> None:
        entries, expected = self._target.entries, expected_tensors(model)
        for name in sorted(expected.keys() | entries.keys()):
            problem = None
            if name not in entries:
                problem = ("missing", "was not added, but the model needs it")
            elif name not in expected:
                problem = (str(tuple(entries[name]["shape"])), "is no tensor of this model")
            elif entries[name]["shape"] != list(expected[name].shape):
                found = tuple(entries[name]["shape"])
                problem = (str(found), f"is not the shape {tuple(expected[name].shape)} of this model")
            if problem is not None:
                raise CheckpointError(
                    compose(
                        subject=name,
                        value=problem[0],
                        constraint=problem[1],
                        place=str(self._target.folder),
                        remedy="add the state of every module of the quantized model, tied tensors once",
                    )
                )


class NativeFormat(CheckpointFormat):
    """Quattuor's own checkpoint; holds every layout."""

    def refuses(self, name: str, tensor: QuantizedTensor, activations: ActivationQuantizer | None) -> str | None:
        """Refuse nothing."""
        return None

    def write(self, model: PackedModel, folder: Path) -> Path:
        """Write a model into a new folder, with an empty recipe: a packed model does not say how it came to be."""
        return write_native(model, folder, recipe=Recipe())

    def read(self, folder: Path) -> PackedModel:
        """Read a folder that `CheckpointWriter` wrote."""
        return read_native(folder)


def write_native(
    model: PackedModel,
    folder: str | Path,
    *,
    recipe: Recipe,
    report: Mapping[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a packed model as a native checkpoint; arguments as for `CheckpointWriter`."""
    with CheckpointWriter(folder, max_shard_bytes=max_shard_bytes, overwrite=overwrite) as writer:
        writer.add(model.dense)
        for name, tensor in model.linears.items():
            writer.add({f"{name}.{leaf}": value for leaf, value in tensor.state().items()})
        return writer.finish(
            model.config, recipe, model.layouts(), report, model.tokenizer, model.generation_config
        )


def read_native(folder: str | Path) -> PackedModel:
    """Read a native checkpoint as a packed model, everything in memory.

    Raises:
        CheckpointError: Tensors are missing, damaged or of another shape than `config.json` says.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    layouts = read_layouts(config)
    model = quantized_skeleton(config, layouts)
    store = SafetensorsStore(folder)
    missing = sorted(expected_tensors(model).keys() - store.names())
    if missing:
        raise CheckpointError(
            compose(
                subject="tensor",
                value=missing[0],
                constraint="is missing",
                place=str(folder),
                remedy="download or write the checkpoint again",
            )
        )
    linears, packed = {}, set()
    for name, module in quantized_linears(model).items():
        leaves = module.layout.tensor_names
        packed |= {f"{name}.{leaf}" for leaf in leaves}
        state = {leaf: store.read(f"{name}.{leaf}") for leaf in leaves}
        linears[name] = module.layout.read(state, module.out_features, module.in_features, name=name)
    return PackedModel(
        config=config,
        linears=linears,
        activations={name: layout.activations for name, layout in layouts.items()},
        dense={name: store.read(name) for name in sorted(store.names() - packed)},
        tokenizer=read_tokenizer(folder),
        generation_config=read_generation_config(folder),
    )


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    recipe: Recipe | None = None,
    report: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Save a quantized model in memory, with manifest and model card, atomically.

    Args:
        model: A model with packed linears.
        folder: The checkpoint to create.
        recipe: What was done; by default the one in `model.config.quantization_config`.
        report: As for `CheckpointWriter.finish`.
        tokenizer: Saved beside the weights when given.
        max_shard_bytes: Largest file, except for a single tensor that is larger.
        overwrite: Replace an existing folder, after success only.

    Raises:
        InputError: The folder exists, the model has no packed linear, or nothing says what the recipe was.
        CheckpointError: The disk is full.
    """
    if recipe is None:
        existing = getattr(model.config, "quantization_config", None)
        data = existing if isinstance(existing, Mapping) or existing is None else existing.to_dict()
        if data is None or "recipe" not in data:
            raise InputError(
                compose(
                    subject="recipe",
                    value=None,
                    constraint="is not given and model.config has none",
                    place="save_pretrained",
                    remedy="pass recipe=, the one that the model was quantized with",
                )
            )
        recipe = Recipe.from_dict(data["recipe"])
    return write_native(
        PackedModel.from_model(model, tokenizer),
        folder,
        recipe=recipe,
        report=report,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
