# SPDX-License-Identifier: Apache-2.0
"""To and from the layouts of other projects: lossless, or refused with the first linear that does not fit."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from quattuor.activations import ActivationQuantizer
from quattuor.checkpoints.atomic import DEFAULT_SHARD_BYTES, ShardedFolder
from quattuor.checkpoints.awq import AWQReader
from quattuor.checkpoints.base import PackedModel, read_generation_config, read_tokenizer
from quattuor.checkpoints.compressed_tensors import CompressedTensors
from quattuor.checkpoints.foreign import ForeignLayout, ForeignReader, Settings, damaged, refused, uniform
from quattuor.checkpoints.gptq import GPTQLayout
from quattuor.checkpoints.native import read_native, write_native
from quattuor.checkpoints.qqq import read_qqq, write_qqq
from quattuor.checkpoints.skeleton import empty_model
from quattuor.checkpoints.tensors import SafetensorsStore, TensorStore
from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.nn import reason_against_execution
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.recipe import Recipe

__all__ = ["EXPORTS", "READERS", "convert", "export", "read_foreign", "write_foreign"]

EXPORTS: dict[str, ForeignLayout | None] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQLayout(),
    "qqq": None,
}
"""What `export` writes; QQQ has a writer of its own."""

READERS: dict[str, ForeignReader | None] = {
    "awq": AWQReader(),
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQLayout(),
    "qqq": None,
}
"""What `convert` reads, by `quant_method`."""


def export(
    source: str | Path,
    target: str,
    folder: str | Path,
    *,
    allow_rounding: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a native checkpoint in the layout of another project.

    Args:
        source: Folder of the native checkpoint.
        target: A name in `EXPORTS`.
        folder: The checkpoint to create.
        allow_rounding: Round what the layout keeps in fewer bits: scales, and for QQQ the dense tensors. The codes
            are never changed. Without it such a model is refused.
        overwrite: Replace an existing folder, after success only.

    Raises:
        InputError: The target is unknown, or the folder exists.
        UnsupportedError: The layout cannot hold the model; the message names the first linear and why.
        CheckpointError: The source is damaged, or the disk is full.
    """
    if target not in EXPORTS:
        raise InputError(
            compose(
                subject="target",
                value=target,
                constraint="is not a layout that is written",
                place="export",
                remedy=f"use one of {', '.join(EXPORTS)}",
            )
        )
    layout = EXPORTS[target]
    if layout is None:
        return write_qqq(source, folder, cast_dense=allow_rounding, overwrite=overwrite)
    return write_foreign(layout, source, folder, round_scales=allow_rounding, overwrite=overwrite)


def convert(source: str | Path, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a checkpoint of another project as a native one, bit for bit.

    Args:
        source: Folder of a QQQ, GPTQ, AWQ or compressed-tensors checkpoint.
        folder: The checkpoint to create.
        overwrite: Replace an existing folder, after success only.

    Raises:
        InputError: The folder exists.
        UnsupportedError: Its method is not read, or something cannot be kept without changing a number.
        CheckpointError: The source is damaged.
    """
    source = Path(source)
    settings = read_settings(source)
    method = str(settings.get("quant_method", "gptq"))
    if settings.get("checkpoint_format", settings.get("format")) == "qqq":
        method = "qqq"
    if method not in READERS:
        raise UnsupportedError(
            compose(
                subject="quant_method",
                value=method,
                constraint="is not a layout that is read",
                place=str(source),
                remedy=f"use a checkpoint of {', '.join(READERS)}; a native one needs no conversion",
            )
        )
    reader = READERS[method]
    model = read_qqq(source) if reader is None else read_foreign(reader, source)
    return write_native(model, folder, recipe=Recipe(systems=(method.replace("-", "_"),)), overwrite=overwrite)


def write_foreign(
    layout: ForeignLayout,
    model: PackedModel | str | Path,
    folder: str | Path,
    *,
    round_scales: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a packed model in the layout of another project.

    Args:
        layout: Which one.
        model: A packed model, or the folder of a native checkpoint.
        folder: The checkpoint to create.
        round_scales: Round scales to the dtype that readers keep them in; without it a model whose scales that
            dtype cannot hold is refused, because readers would round them silently.
        max_shard_bytes: Largest file, except for a single tensor that is larger.
        overwrite: Replace an existing folder, after success only.

    Raises:
        InputError: The folder exists.
        UnsupportedError: The layout cannot hold the model; the message names the first linear and why.
        CheckpointError: The disk is full.
    """
    packed = model if isinstance(model, PackedModel) else read_native(model)
    dtype = layout.scale_dtype(_dense_dtype(packed))
    grids, scales = {}, {}
    for name, tensor in packed.linears.items():
        grid = uniform(tensor)
        reason = grid if isinstance(grid, str) else layout.refuses(grid, packed.activations[name])
        if reason is not None or isinstance(grid, str):
            raise refused(layout.name, name, reason or "")
        grids[name], scales[name] = grid, grid.scale.to(dtype)
        is_exact = torch.equal(scales[name].double(), grid.scale)
        if not is_exact and not round_scales:
            kept = str(dtype).removeprefix("torch.")
            raise refused(layout.name, name, f"has scales that {kept} cannot hold; --allow-rounding rounds them")
        if not bool(scales[name].isfinite().all()):
            raise refused(layout.name, name, "has scales beyond the range of their dtype")
    settings = layout.settings(grids, packed.activations, _others(packed))
    with ShardedFolder(folder, max_shard_bytes=max_shard_bytes, overwrite=overwrite) as target:
        with target.cleaning_up():
            for name, grid in grids.items():
                encoded = layout.encode(grid, scales[name])
                target.add({f"{name}.{leaf}": value.contiguous() for leaf, value in encoded.items()})
            target.add(packed.dense)
            target.write_index()
            config = copy.deepcopy(packed.config)
            config.dtype = _dense_dtype(packed)
            if "lm_head.weight" in target.entries:
                config.tie_word_embeddings = False
            config.quantization_config = settings
            config.save_pretrained(target.partial)
            for part in (packed.tokenizer, packed.generation_config):
                if part is not None:
                    part.save_pretrained(target.partial)
        return target.put_in_place()


def read_foreign(layout: ForeignReader, folder: str | Path) -> PackedModel:
    """Read a checkpoint in the layout of another project.

    Raises:
        CheckpointError: A tensor is missing or of another shape, or `config.json` says nothing of this layout.
        UnsupportedError: Something cannot be kept without changing a number.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    store, config = SafetensorsStore(folder), AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(config)
    modules = dict(model.named_modules())
    linears: dict[str, QuantizedTensor] = {}
    activations: dict[str, ActivationQuantizer | None] = {}
    for name in layout.linears(store):
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise damaged(name, "packed", "is not a linear of this architecture", str(folder))
        linears[name], activations[name] = layout.decode(name, store, settings)
        wanted = (module.out_features, module.in_features)
        if linears[name].shape != wanted:
            raise damaged(name, linears[name].shape, f"is not the {wanted} of this architecture", str(folder))
        tensor = linears[name]
        reason = reason_against_execution(tensor.number_format, tensor.granularity, activations[name])
        if reason is not None:
            raise refused(layout.name, name, f"cannot be run as it is: {reason}")
    taken = {f"{name}.{leaf}" for name in linears for leaf in layout.leaves}
    check_dense(model, linears, store, layout.leaves[0], folder)
    return PackedModel(
        config=config,
        linears=linears,
        activations=activations,
        dense={name: store.read(name) for name in sorted(store.names() - taken)},
        tokenizer=read_tokenizer(folder),
        generation_config=read_generation_config(folder),
    )


def read_settings(folder: Path) -> Settings:
    """Return the `quantization_config` of a folder, wherever it stands. Raises CheckpointError without one."""
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        file = folder / name
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            settings = found.get("quantization_config") if name == "config.json" else found
            if isinstance(settings, dict):
                return settings
    raise damaged("quantization_config", "missing", "is in no JSON file of the folder", str(folder))


def check_dense(
    model: PreTrainedModel, linears: Mapping[str, QuantizedTensor], store: TensorStore, leaf: str, folder: Path
) -> None:
    """Find every tensor of the model that is neither packed nor stored nor tied. Raises CheckpointError."""
    tied = dict(model.all_tied_weights_keys)
    for full in model.state_dict():
        name, _, last = full.rpartition(".")
        if (name in linears and last == "weight") or full in store.names() or full in tied:
            continue
        is_linear = isinstance(model.get_submodule(name), nn.Linear) and last == "weight"
        raise damaged(f"{name}.{leaf}" if is_linear else full, "missing", "is not stored", str(folder))


def _dense_dtype(model: PackedModel) -> torch.dtype:
    """Return the dtype of most dense numbers."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in model.dense.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _others(model: PackedModel) -> list[str]:
    """Return the linears in high precision, the head included."""
    modules = empty_model(model.config).named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and name not in model.linears]
