# SPDX-License-Identifier: Apache-2.0
"""Loading with transformers: after `import quattuor`, plain `AutoModelForCausalLM.from_pretrained` works.

Registers the quantization method "quattuor" as transformers lets third parties do. Packed weights and their scales
are buffers that keep the dtype they are stored in, whatever `dtype=` the rest of the model is loaded in.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quattuor.checkpoints.layouts import FORMAT_VERSION, QUANT_METHOD, check_version, read_layouts
from quattuor.checkpoints.skeleton import install_layouts, quantized_linears
from quattuor.checkpoints.tensors import SafetensorsStore
from quattuor.errors import CheckpointError, UnsupportedError, compose
from quattuor.nn.gated_mlp import join_gates
from quattuor.nn.layout import LinearLayout
from quattuor.nn.sharing import share_inputs
from quattuor.recipe import Recipe

__all__ = ["QuattuorConfig", "QuattuorQuantizer", "register"]


class QuattuorConfig(QuantizationConfigMixin):
    """The `quantization_config` of a Quattuor checkpoint, as transformers handles it.

    Args:
        format_version: Version of the layout on disk.
        recipe: What was done, as `Recipe.to_dict` gives it.
        layouts: Distinct layouts of linears, as plain data.
        modules: Index into `layouts` of every quantized module.
        quant_method: Always "quattuor".

    Raises:
        UnsupportedError: The format is newer than this version reads.
        CheckpointError: The layouts are damaged.
    """

    def __init__(
        self,
        *,
        recipe: Mapping[str, Any],
        layouts: Sequence[Mapping[str, Any]],
        modules: Mapping[str, int],
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        """Keep the plain data, checked."""
        check_version(format_version, "config.json: quantization_config")
        self.quant_method = quant_method  # type: ignore[assignment]  # an enumeration of the built-in methods
        self.format_version = format_version
        self.recipe = dict(recipe)
        self.layouts = [dict(layout) for layout in layouts]
        self.modules = dict(modules)
        self.linear_layouts()

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "QuattuorConfig | tuple[QuattuorConfig, dict[str, Any]]":
        """Read the plain data; the version is checked before any other key, which a newer format may rename."""
        check_version(config_dict.get("format_version"), "config.json: quantization_config")
        known = ("recipe", "layouts", "modules", "format_version", "quant_method")
        missing = [key for key in known if key not in config_dict]
        if missing:
            raise CheckpointError(
                compose(
                    subject="quantization_config",
                    value=", ".join(missing),
                    constraint="is missing",
                    place="config.json",
                    remedy="use the config.json that was written with the weights",
                )
            )
        config = cls(**{key: config_dict[key] for key in known})
        return (config, kwargs) if return_unused_kwargs else config

    def linear_layouts(self) -> dict[str, LinearLayout]:
        """Return the layout of every quantized module."""
        return read_layouts(self.to_dict())

    def parsed_recipe(self) -> Recipe:
        """Return the recipe that the model was quantized with."""
        return Recipe.from_dict(self.recipe)


class QuattuorQuantizer(HfQuantizer):
    """Puts packed linears into a model before transformers loads its tensors."""

    requires_calibration = True
    quantization_config: QuattuorConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every environment: the reference kernels run everywhere."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Nothing is quantized while loading."""
        return False

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype to load a tensor in: that of the module's own buffer or parameter, which `dtype` is."""
        name = str(param.get_dtype()) if hasattr(param, "get_dtype") else str(param.dtype)
        is_float = name.startswith(("F", "BF", "torch.float", "torch.bfloat"))
        return dtype if is_float else None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        install_layouts(model, self.quantization_config.linear_layouts())
        files = kwargs.get("checkpoint_files")
        if files:
            _check_stored(model, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in quantized_linears(model).items():
            unfilled = [leaf for leaf, buffer in module.named_buffers() if buffer.device.type == "meta"]
            if unfilled and not hasattr(module, "_hf_hook"):
                raise CheckpointError(
                    compose(
                        subject=f"{name}.{unfilled[0]}",
                        value="missing",
                        constraint="was not loaded",
                        place=str(model.config.name_or_path),
                        remedy="download or write the checkpoint again",
                    )
                )
        share_inputs(model)
        join_gates(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Whether `save_pretrained` works: it does."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the decoding step by itself: no packed linear breaks the graph."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the packed weights have gradients: they do not."""
        return False


def _check_stored(model: nn.Module, files: Sequence[str | os.PathLike[str]]) -> None:
    """Check names, shapes and dtypes of all packed tensors against the headers of the files.

    transformers itself fills a missing buffer with whatever is in memory, after no more than a warning.
    """
    stores = [SafetensorsStore(Path(file)) for file in files]
    found = {name: (store.shape(name), store.dtype(name)) for store in stores for name in store.names()}
    for name, module in quantized_linears(model).items():
        for leaf, buffer in module.named_buffers():
            full = f"{name}.{leaf}"
            shape, dtype = found.get(full, (None, None))
            dtype_agrees = dtype == buffer.dtype or leaf == "bias"
            if shape != tuple(buffer.shape) or not dtype_agrees:
                value = "missing" if shape is None else f"{dtype} {shape}"
                raise CheckpointError(
                    compose(
                        subject=full,
                        value=value,
                        constraint=f"is not the {buffer.dtype} {tuple(buffer.shape)} that config.json promises",
                        place=str(Path(files[0]).parent),
                        remedy="download or write the checkpoint again",
                    )
                )


def register() -> None:
    """Make transformers know the method "quattuor"; a second call changes nothing.

    Raises:
        UnsupportedError: Another package has taken the name.
    """
    existing = AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD)
    if existing is None:
        register_quantization_config(QUANT_METHOD)(QuattuorConfig)
        register_quantizer(QUANT_METHOD)(QuattuorQuantizer)
        return
    if (
        existing is not QuattuorQuantizer
        or AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD) is not QuattuorConfig
    ):
        raise UnsupportedError(
            compose(
                subject="quantization method",
                value=QUANT_METHOD,
                constraint=f"is registered with transformers by {existing.__module__}",
                place="import quattuor",
                remedy="remove the other package from this environment",
            )
        )
