# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the layout of the original QQQ code, read and written without changing a bit.

`qqq_layout.py` has the layout of one weight. A checkpoint holds such tensors for every linear of the decoder
blocks, the other weights in float16, and in `config.json`

    "quantization_config": {"quant_method": "qqq", "wbits": 4, "group_size": -1 or 128}

The reader also takes a separate `quant_config.json` or `quantize_config.json`, and the key `bits` with `format` or
`checkpoint_format` "qqq". Activations are always int8 per token, computed at run time.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from quattuor.activations import ActivationQuantizer, DynamicQuantizer
from quattuor.checkpoints import qqq_layout
from quattuor.checkpoints.atomic import DEFAULT_SHARD_BYTES, ShardedFolder
from quattuor.checkpoints.base import CheckpointFormat, PackedModel, read_generation_config, read_tokenizer
from quattuor.checkpoints.native import read_native
from quattuor.checkpoints.skeleton import empty_model
from quattuor.checkpoints.tensors import SafetensorsStore, TensorStore
from quattuor.checkpoints.writing import write_json
from quattuor.errors import CheckpointError, UnsupportedError, compose
from quattuor.granularity import PerGroup
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["QQQFormat", "group_size_of", "read_qqq", "write_qqq"]

_CONFIG_FILES = ("quant_config.json", "quantize_config.json")
_LEAVES = ("B", "s_channel", "s_group")


class QQQFormat(CheckpointFormat):
    """The layout of the original QQQ code: 4 bits, per channel or in groups of 128, int8 activations per token."""

    def refuses(self, name: str, tensor: QuantizedTensor, activations: ActivationQuantizer | None) -> str | None:
        """Return why a weight does not fit."""
        if activations != DynamicQuantizer():
            return f"has activations {activations}; the layout implies int8 per token"
        return qqq_layout.refusal(tensor)

    def write(self, model: PackedModel, folder: Path) -> Path:
        """Write a model into a new folder, see `write_qqq`."""
        return write_qqq(model, folder)

    def read(self, folder: Path) -> PackedModel:
        """Read a folder, see `read_qqq`."""
        return read_qqq(folder)


def write_qqq(
    model: PackedModel | PreTrainedModel | str | Path,
    folder: str | Path,
    *,
    cast_dense: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a quantized model in the original QQQ layout.

    Args:
        model: A native checkpoint's folder, a model with packed linears, or a packed model.
        folder: The checkpoint to create.
        cast_dense: Round embeddings, norms, head and biases to float16, which the layout demands; without it a
            model that has them in another dtype is refused, because that would change its numbers.
        max_shard_bytes: Largest file, except for a single tensor that is larger.
        overwrite: Replace an existing folder, after success only.

    Raises:
        InputError: The folder exists.
        UnsupportedError: The layout cannot hold the model; the message names the first linear and why.
        CheckpointError: The disk is full.
    """
    packed = _packed(model)
    group_size = _common_group_size(packed)
    with ShardedFolder(folder, max_shard_bytes=max_shard_bytes, overwrite=overwrite) as target:
        with target.cleaning_up():
            for name, tensor in packed.linears.items():
                pack = qqq_layout.pack_channel if group_size == -1 else qqq_layout.pack_group
                target.add({f"{name}.{leaf}": value for leaf, value in pack(tensor, name).items()})
            for name, value in packed.dense.items():
                target.add({name: _to_float16(name, value, cast_dense)})
            target.write_index()
            _write_config(packed.config, group_size, target)
            for part in (packed.tokenizer, packed.generation_config):
                if part is not None:
                    part.save_pretrained(target.partial)
        return target.put_in_place()


def read_qqq(folder: str | Path) -> PackedModel:
    """Read a checkpoint in the original QQQ layout; `write_native` turns the result into one that loads.

    Raises:
        CheckpointError: It is no such checkpoint, a tensor is missing or of another shape, or a scale wraps.
        UnsupportedError: Another width or group size, or columns in an order that is not stored.
    """
    folder = Path(folder)
    group_size = group_size_of(*_find_settings(folder))
    config = AutoConfig.from_pretrained(folder)
    store = SafetensorsStore(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(config)
    linears: dict[str, QuantizedTensor] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Linear)
            and f"{name}.weight" not in store.names()
            and f"{name}.B" in store.names()
        ):
            linears[name] = _read_linear(store, name, group_size, (module.out_features, module.in_features))
    taken = {f"{name}.{leaf}" for name in linears for leaf in _LEAVES}
    _check_dense(model, linears, store, folder)
    return PackedModel(
        config=config,
        linears=linears,
        activations={name: DynamicQuantizer() for name in linears},
        dense={name: store.read(name) for name in sorted(store.names() - taken)},
        tokenizer=read_tokenizer(folder),
        generation_config=read_generation_config(folder),
    )


def _packed(model: PackedModel | PreTrainedModel | str | Path) -> PackedModel:
    if isinstance(model, PackedModel):
        return model
    return PackedModel.from_model(model) if isinstance(model, PreTrainedModel) else read_native(model)


def _common_group_size(packed: PackedModel) -> int:
    """Return -1 or 128 for the whole model, after asking every linear whether it fits."""
    form = QQQFormat()
    found: dict[int, str] = {}
    for name, tensor in packed.linears.items():
        reason = form.refuses(name, tensor, packed.activations[name])
        if reason is not None:
            raise _unsupported(name, f"[{tensor.shape[0]}, {tensor.shape[1]}]", reason)
        found.setdefault(128 if isinstance(tensor.granularity, PerGroup) else -1, name)
    if len(found) != 1:
        raise _unsupported("group_size", f"{found}", "must be the same for every linear of the model")
    model = empty_model(packed.config)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and name not in packed.linears:
            raise _unsupported(name, "in high precision", "must be quantized: the layout knows no exceptions")
    return next(iter(found))


def _to_float16(name: str, value: Tensor, cast_dense: bool) -> Tensor:
    if value.dtype == torch.float16 or not value.is_floating_point():
        return value
    if not cast_dense:
        reason = "is not float16, which the layout demands; pass cast_dense=True to round it"
        raise _unsupported(name, str(value.dtype), reason)
    half = value.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise _unsupported(name, f"{float(value.abs().max()):g}", "exceeds what float16 can hold")
    return half


def _write_config(config: Any, group_size: int, target: ShardedFolder) -> None:
    config = copy.deepcopy(config)
    config.dtype = torch.float16
    if "lm_head.weight" in target.entries:
        config.tie_word_embeddings = False
    config.quantization_config = {"quant_method": "qqq", "wbits": qqq_layout.BITS, "group_size": group_size}
    config.save_pretrained(target.partial)
    file = target.partial / "config.json"
    # Readers of this layout are older than the key "dtype".
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "torch_dtype": "float16"})


def group_size_of(settings: Mapping[str, Any], place: str) -> int:
    """Return the group size of a `quantization_config`, -1 for one scale per channel, after checking the rest.

    Args:
        settings: The plain data.
        place: Where it stands, for messages.

    Raises:
        CheckpointError: It is not one of QQQ.
        UnsupportedError: Another width or group size, or columns in an order that is not stored.
    """
    form = settings.get("checkpoint_format", settings.get("format", "qqq"))
    method = settings.get("quant_method", "qqq")
    if form != "qqq" or method not in ("qqq", "gptq"):
        raise CheckpointError(
            compose(
                subject="quant_method, format",
                value=f"{method}, {form}",
                constraint="is not the QQQ layout",
                place=place,
                remedy="read it with the package that wrote it",
            )
        )
    bits, group_size = settings.get("wbits", settings.get("bits")), settings.get("group_size")
    if bits != qqq_layout.BITS:
        raise _unsupported("bits", str(bits), f"is not the {qqq_layout.BITS} of the layout")
    if group_size not in (-1, qqq_layout.GROUP_SIZE):
        raise _unsupported("group_size", str(group_size), f"is neither -1 nor {qqq_layout.GROUP_SIZE}")
    if group_size != -1 and settings.get("desc_act") and not settings.get("static_groups", True):
        reason = "reorders columns across groups, and the layout does not store the order"
        raise _unsupported("desc_act without static_groups", "True", reason)
    return int(group_size)


def _find_settings(folder: Path) -> tuple[Mapping[str, Any], str]:
    config = folder / "config.json"
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
        if isinstance(settings, dict) and "quant_method" in settings:
            return settings, str(config)
    for name in _CONFIG_FILES:
        if (folder / name).is_file():
            found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            return found, str(folder / name)
    raise CheckpointError(
        compose(
            subject="quantization_config",
            value="missing",
            constraint=f"is in none of config.json, {', '.join(_CONFIG_FILES)}",
            place=str(folder),
            remedy="pass the folder of a QQQ checkpoint",
        )
    )


def _read_linear(store: TensorStore, name: str, group_size: int, shape: tuple[int, int]) -> QuantizedTensor:
    state = {leaf: store.read(f"{name}.{leaf}") for leaf in _LEAVES if f"{name}.{leaf}" in store.names()}
    has_groups = "s_group" in state and state["s_group"].numel() > 0
    if has_groups != (group_size != -1):
        value = tuple(state["s_group"].shape) if "s_group" in state else "missing"
        raise _damaged(f"{name}.s_group", value, f"contradicts group_size={group_size}", "config.json")
    tensor = (qqq_layout.unpack_group if has_groups else qqq_layout.unpack_channel)(state, name)
    if tensor.shape != shape:
        raise _damaged(f"{name}.B", tensor.shape, f"decodes to another shape than {shape}", "config.json")
    return tensor


def _check_dense(
    model: PreTrainedModel, linears: Mapping[str, QuantizedTensor], store: TensorStore, folder: Path
) -> None:
    """Find every tensor of the model that is neither packed nor stored nor tied."""
    tied = dict(model.all_tied_weights_keys)
    for full in model.state_dict():
        name, _, leaf = full.rpartition(".")
        if name in linears and leaf == "weight":
            continue
        if full not in store.names() and full not in tied:
            packed_name = f"{name}.B" if isinstance(model.get_submodule(name), nn.Linear) else full
            raise _damaged(packed_name, "missing", "is not stored", str(folder))


def _unsupported(subject: str, value: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        compose(
            subject=subject,
            value=value,
            constraint=reason,
            place="QQQ checkpoint layout",
            remedy="use the native format, which holds every layout",
        )
    )


def _damaged(subject: str, value: object, constraint: str, place: str) -> CheckpointError:
    return CheckpointError(
        compose(
            subject=subject,
            value=value,
            constraint=constraint,
            place=place,
            remedy="download or export the checkpoint again",
        )
    )
