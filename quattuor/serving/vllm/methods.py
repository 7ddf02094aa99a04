# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of serving: configurations and linear methods, the only module that imports vLLM.

Parts of vLLM that moved between releases are avoided rather than followed: weights are loaded by a loader of our
own, which needs no parameter classes and names the tensor that does not fit; kernels are our own operators.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from quattuor.checkpoints.layouts import QUANT_METHOD, read_layouts
from quattuor.checkpoints.qqq import group_size_of
from quattuor.errors import CheckpointError, UnsupportedError, compose
from quattuor.nn import LinearLayout
from quattuor.serving import packed_linear
from quattuor.serving.sharding import MergedLinear, StoredTensor, fill_
from quattuor.serving.storage import NativeStorage, QQQStorage, Storage
from quattuor.serving.vllm import graph_pass

__all__ = ["PackedLinearMethod", "QQQConfig", "QuattuorConfig", "register_configs"]

_PREFIX = "quattuor_"
_SHARDS = {"q": 0, "k": 1, "v": 2}
_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


class _Config(QuantizationConfig):  # type: ignore[misc]  # vLLM has no types for strict checking
    """What both configurations share."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the compute capability that the integer kernels need, times ten."""
        return 80

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return every dtype that the kernels return."""
        return _DTYPES

    def parts(self, prefix: str) -> tuple[str, ...]:
        """Return the names in the checkpoint of the linears that vLLM merged into one."""
        parent, dot, leaf = prefix.rpartition(".")
        return tuple(f"{parent}{dot}{name}" for name in self.packed_modules_mapping.get(leaf, [leaf]))


class QuattuorConfig(_Config):
    """The `quantization_config` of a native checkpoint.

    Args:
        layouts: Layout of every quantized linear by its name in the checkpoint.
    """

    def __init__(self, layouts: Mapping[str, LinearLayout]) -> None:
        """Keep the layouts."""
        super().__init__()
        self.layouts = dict(layouts)

    @classmethod
    def get_name(cls) -> str:
        """Return the `quant_method`."""
        return QUANT_METHOD

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no further files: config.json holds everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuattuorConfig":
        """Read the layouts of `config.json`."""
        return cls(read_layouts(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the linears as vLLM renames the modules of a model."""
        self.layouts = hf_to_vllm_mapper.apply_dict(self.layouts)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return the method of a linear: packed, or in high precision when the checkpoint has it so.

        Raises:
            UnsupportedError: Linears that vLLM merges have different layouts, or experts are packed.
        """
        if not isinstance(layer, LinearBase):
            inside = next((name for name in self.layouts if name.startswith(f"{prefix}.")), None)
            if inside is not None and "MoE" in type(layer).__name__:
                raise _unservable(inside, type(layer).__name__, "merges packed experts, which is not implemented")
            return None
        names = self.parts(prefix)
        layouts = {name: self.layouts.get(name) for name in names}
        layout = layouts[names[0]]
        if any(other != layout for other in layouts.values()):
            value = "; ".join(f"{name}: {_describe(item)}" for name, item in layouts.items())
            raise _unservable(prefix, value, "are merged by vLLM and must have one layout")
        if layout is None:
            return UnquantizedLinearMethod()
        return PackedLinearMethod(NativeStorage(layout, prefix), prefix, names)


class QQQConfig(_Config):
    """The `quantization_config` of an original QQQ checkpoint.

    Args:
        group_size: -1 for one scale per channel, or 128.
    """

    def __init__(self, group_size: int) -> None:
        """Keep the group size."""
        super().__init__()
        self.storage = QQQStorage(group_size)

    @classmethod
    def get_name(cls) -> str:
        """Return the `quant_method`."""
        return "qqq"

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the files that older exports keep beside config.json."""
        return ["quant_config.json", "quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QQQConfig":
        """Read the group size, after checking every other setting."""
        return cls(group_size_of(config, "config.json"))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return the method of a linear; the layout knows no linear in high precision inside the blocks."""
        if not isinstance(layer, LinearBase):
            return None
        return PackedLinearMethod(self.storage, prefix, self.parts(prefix))


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads the packed tensors of one, possibly merged, linear, and runs it on our kernels.

    Args:
        storage: How its checkpoint stores it.
        name: Full name of the layer.
        parts: Names in the checkpoint of the linears it is made of.
    """

    def __init__(self, storage: Storage, name: str, parts: tuple[str, ...]) -> None:
        """Prepare for one layer; vLLM makes a method per layer."""
        self.storage, self.name, self.parts = storage, name, parts
        self.loaded: set[tuple[str, int]] = set()
        self.is_dummy, self.is_traced = False, True

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate the stored tensors for this device.

        Raises:
            InputError: This device's share cuts through bytes, groups or blocks.
        """
        outputs, rank = tuple(output_partition_sizes), getattr(layer, "tp_rank", 0)
        is_cut = sum(outputs) != output_size
        names = self.parts if len(self.parts) == len(outputs) else _numbered(self.name, len(outputs))
        replicas = getattr(layer, "num_kv_head_replicas", 1)
        self.shares = MergedLinear(
            name=self.name,
            parts=names,
            out_features=outputs,
            replicas=(1, replicas, replicas) if len(outputs) == 3 else (1,) * len(outputs),
            in_features=input_size_per_partition,
            all_in_features=input_size,
            rank=rank,
            world_size=output_size // sum(outputs) if is_cut else 1,
            input_rank=rank if input_size != input_size_per_partition else 0,
        )
        self.tensors, self.dtype = self.storage.tensors(), params_dtype
        config = get_current_vllm_config()
        self.is_dummy = config.load_config.load_format == "dummy"
        self.is_traced = not graph_pass.install(config) and os.environ.get(packed_linear.FUSE_VARIABLE) != "0"
        self.shares.check(self.tensors)
        for tensor in self.tensors:
            shape = tensor.shape(sum(outputs), input_size_per_partition)
            data = torch.empty(shape, dtype=tensor.dtype)
            if self.is_dummy and tensor.legal is not None:  # vLLM itself fills only floating-point tensors
                low, high = tensor.legal
                data.random_(low, high + 1)
            parameter = nn.Parameter(data, requires_grad=False)
            parameter.weight_loader = partial(self.load, tensor)  # type: ignore[attr-defined]
            layer.register_parameter(tensor.name, parameter)

    def load(
        self, tensor: StoredTensor, parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None
    ) -> None:
        """Copy this device's share of a checkpoint's tensor; vLLM calls it with the part's index or letter."""
        part = _SHARDS[shard] if isinstance(shard, str) else shard
        part = 0 if len(self.shares.parts) == 1 else part
        fill_(parameter.data, loaded, tensor, self.shares, part)
        self.loaded |= {(tensor.name, index) for index in range(len(self.shares.parts)) if part in (None, index)}

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Lay the weight out for the kernels, and release the stored tensors.

        Raises:
            CheckpointError: A tensor was not in the checkpoint, or holds no legal values.
        """
        self._check_loaded()
        state = {tensor.name: getattr(layer, tensor.name).data for tensor in self.tensors}
        shape = (sum(self.shares.out_features), self.shares.in_features)
        weight = self.storage.weight(state, shape, self.name)
        self.facts, operand = packed_linear.prepare(
            weight, self.storage.activations, self.dtype, is_traced=self.is_traced
        )
        for tensor in self.tensors:
            delattr(layer, tensor.name)
        self.operand_names = tuple(f"{_PREFIX}{index}" for index in range(len(operand)))
        for name, value in zip(self.operand_names, operand.values(), strict=True):
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
        layer.qweight = getattr(layer, self.operand_names[0])  # where vLLM's LoRA layers look for the device

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x @ W.T (+ bias)."""
        operand = [getattr(layer, name) for name in self.operand_names]
        return packed_linear.linear(self.facts, operand, x, bias)

    def _check_loaded(self) -> None:
        if self.is_dummy:
            return
        for tensor in self.tensors:
            for index, part in enumerate(self.shares.parts):
                if (tensor.name, index) not in self.loaded:
                    raise CheckpointError(
                        compose(
                            subject=f"{part}.{tensor.name}",
                            value="missing",
                            constraint="was not in the checkpoint",
                            place="vLLM plugin",
                            remedy="download or write the checkpoint again",
                        )
                    )


def register_configs() -> None:
    """Register both methods with vLLM, unless it knows them already."""
    known: dict[str, Callable[..., Any]] = {QUANT_METHOD: QuattuorConfig, "qqq": QQQConfig}
    for name, config in known.items():
        if name not in QUANTIZATION_METHODS:
            register_quantization_config(name)(config)


def _numbered(name: str, count: int) -> tuple[str, ...]:
    """Return names for linears that the checkpoint stores merged."""
    return tuple(f"{name}[{index}]" for index in range(count))


def _describe(layout: LinearLayout | None) -> str:
    return "high precision" if layout is None else f"{layout.number_format} {layout.granularity}"


def _unservable(subject: str, value: str, constraint: str) -> UnsupportedError:
    return UnsupportedError(
        compose(
            subject=subject,
            value=value,
            constraint=constraint,
            place="vLLM plugin",
            remedy="serve it with transformers, or quantize it with one layout for all linears of a block",
        )
    )
