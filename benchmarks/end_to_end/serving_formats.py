# SPDX-License-Identifier: Apache-2.0
"""What `serve_vllm` compares: shapes of models, and formats as vLLM reads them from a config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quattuor.activations import DynamicQuantizer
from quattuor.checkpoints.layouts import quantization_config
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.nn import LinearLayout, ParameterLayout
from quattuor.recipe import Recipe
from quattuor.serving.packed_linear import FUSE_VARIABLE

__all__ = ["FORMATS", "SHAPES", "Format", "model_config"]

_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-2-13b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
}
"""Configurations without weights; vLLM fills them at random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One column of the comparison.

    Args:
        quantization: From the number of blocks to the `quantization_config`; None for floating point.
        environment: Variables that the engine needs.
        kv_cache_dtype: How the engine stores keys and values; "auto" is the type of the activations.
        dtype: Of the activations; the engine's attention reads 8-bit keys and values for bfloat16 alone.
    """

    quantization: Callable[[int], Mapping[str, Any]] | None = None
    kv_cache_dtype: str = "auto"
    dtype: str = "float16"
    environment: Mapping[str, str] = field(default_factory=dict)


def _ours(num_blocks: int, group_size: int | None = None, activation_bits: int = 8) -> Mapping[str, Any]:
    """Return the configuration of a native checkpoint with 4-bit weights."""
    if activation_bits == 16:
        assert group_size is not None
        layout = LinearLayout(
            number_format=Integer(4),
            granularity=PerGroup(group_size),
            activations=None,
            parameters=(ParameterLayout(name="scale", dtype="float16", per_group=True),),
        )
    elif group_size is None:
        layout = LinearLayout(
            number_format=Integer(4),
            granularity=PerChannel(),
            activations=DynamicQuantizer(),
            parameters=(ParameterLayout(name="scale", dtype="float32", per_group=False),),
        )
    else:
        layout = LinearLayout(
            number_format=TwoLevelInteger(4),
            granularity=PerGroup(group_size),
            activations=DynamicQuantizer(),
            parameters=(
                ParameterLayout(name="group_scale", dtype="int8", per_group=True),
                ParameterLayout(name="channel_scale", dtype="float32", per_group=False),
            ),
        )
    layouts = {f"model.layers.{block}.{linear}": layout for block in range(num_blocks) for linear in _LINEARS}
    return quantization_config(layouts, Recipe(systems=("dummy",)))


def _gptq(_: int) -> Mapping[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        # the engine reads from the weights which layers are quantized, and random ones have no file
        "modules_in_block_to_quantize": list(_LINEARS),
    }


def _compressed(weights: Mapping[str, Any], activations: Mapping[str, Any], form: str) -> Mapping[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _side(bits: int, kind: str, strategy: str, *, dynamic: bool) -> Mapping[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": dynamic}


def _eight_bits(kind: str, form: str) -> Callable[[int], Mapping[str, Any]]:
    weights = _side(8, kind, "channel", dynamic=False)
    return lambda _: _compressed(weights, _side(8, kind, "token", dynamic=True), form)


def _humming(_: int) -> Mapping[str, Any]:
    return {"quant_method": "humming", "a_dtype": "int8", "b_dtype": "int4", "weight_scale_group_size": 0}


FORMATS: dict[str, Format] = {
    "quattuor_w4a8": Format(quantization=_ours),
    "quattuor_w4a8_g128": Format(quantization=lambda blocks: _ours(blocks, 128)),
    "quattuor_w4a16": Format(quantization=lambda blocks: _ours(blocks, 128, activation_bits=16)),
    "quattuor_w4a8_kv8": Format(quantization=_ours, kv_cache_dtype="fp8", dtype="bfloat16"),
    "quattuor_w4a8_unfused": Format(quantization=_ours, environment={FUSE_VARIABLE: "0"}),
    "quattuor_w4a8_compiler": Format(quantization=_ours, environment={FUSE_VARIABLE: "compiler"}),
    "fp16": Format(),
    "w8a8": Format(quantization=_eight_bits("int", "int-quantized")),
    "fp8": Format(quantization=_eight_bits("float", "float-quantized")),
    "fp8_kv8": Format(
        quantization=_eight_bits("float", "float-quantized"), kv_cache_dtype="fp8", dtype="bfloat16"
    ),
    "w4a16": Format(quantization=_gptq),
    "w4a8_marlin": Format(
        quantization=_gptq,
        environment={"VLLM_MARLIN_INPUT_DTYPE": "int8", "VLLM_DISABLED_KERNELS": "MacheteLinearKernel"},
    ),
    "w4a8_humming": Format(quantization=_humming),
}
"""By name in the record; the first is measured first."""


def model_config(shape: str, name: str) -> dict[str, Any]:
    """Return the config.json of a shape in a format."""
    config = {**_COMMON, **SHAPES[shape], "bos_token_id": 1, "eos_token_id": 2}
    config["torch_dtype"] = FORMATS[name].dtype
    make = FORMATS[name].quantization
    if make is not None:
        config["quantization_config"] = dict(make(config["num_hidden_layers"]))
    return config
