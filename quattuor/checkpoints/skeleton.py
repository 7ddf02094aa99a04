# SPDX-License-Identifier: Apache-2.0
"""The model that a checkpoint fills: built from its configuration, without memory for its parameters."""

import copy
from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quattuor.errors import CheckpointError, UnsupportedError, compose
from quattuor.nn.layout import LinearLayout
from quattuor.nn.linear import QuantizedLinear

__all__ = [
    "empty_model",
    "expected_tensors",
    "install_layouts",
    "quantized_linears",
    "quantized_skeleton",
    "tied_names",
]


def empty_model(config: Any) -> PreTrainedModel:
    """Build the causal language model of a configuration with parameters on the meta device and real buffers.

    Raises:
        UnsupportedError: The configuration is not one of a causal language model.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedError(
            compose(
                subject="model_type",
                value=config.model_type,
                constraint="is not a causal language model",
                place="config.json",
                remedy="use a decoder such as Llama, Qwen, Mistral, Gemma, Phi-3 or OPT",
            )
        ) from error
    model.tie_weights()
    model.train(False)
    model.requires_grad_(False)
    return model


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the parameters that are no storage of their own, each with the one it shares.

    The library's list of what may be tied is compared with what is: a transform may have untied the head.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: target
        for name, target in model.all_tied_weights_keys.items()
        if name in parameters and parameters[name] is parameters.get(target)
    }


def install_layouts(model: nn.Module, layouts: Mapping[str, LinearLayout]) -> None:
    """Replace each named linear by an unfilled `QuantizedLinear` on the same device.

    Raises:
        CheckpointError: A name is not that of a linear of the model.
    """
    modules = dict(model.named_modules())
    for name, layout in layouts.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "missing" if linear is None else type(linear).__name__
            raise CheckpointError(
                compose(
                    subject=name,
                    value=found,
                    constraint="is not a linear of this model, but the checkpoint quantizes it",
                    place="config.json: quantization_config.modules",
                    remedy="use the config.json that was written with the weights",
                )
            )
        packed = QuantizedLinear(
            layout,
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
            name=name,
        )
        packed.train(linear.training)
        model.set_submodule(name, packed)


def quantized_skeleton(config: Any, layouts: Mapping[str, LinearLayout]) -> PreTrainedModel:
    """Build the model that a checkpoint of this configuration fills, with nothing in memory but buffers."""
    model = empty_model(config)
    install_layouts(model, layouts)
    return model


def expected_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every tensor that a checkpoint of this model stores; names that share storage appear once."""
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return every packed linear of a model by its full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
