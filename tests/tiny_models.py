# SPDX-License-Identifier: Apache-2.0
"""Random models of every described family, small enough for unit tests, with activations like those of real ones.

Norm gains and biases are far from one and zero, so that forgetting to fold them shows. Two channels of every
norm's output are 20 times larger than the others, and one channel of OPT is shifted, without changing the
function: what a norm gains its consumers lose.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from quattuor.models import DecoderDescription, SiteKind, describe

__all__ = ["FAMILIES", "TIED_FAMILIES", "Float64", "save_tiny", "tiny_config", "tiny_model", "tiny_tokenizer"]

OUTLIER_CHANNELS = (7, 23)
OUTLIER_FACTOR = 20.0
SHIFTED_CHANNEL = 11
SHIFT = 6.0
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 255

_SHARED: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_LLAMA: dict[str, Any] = {**_SHARED, "num_key_value_heads": 2, "intermediate_size": 192}
_GEMMA: dict[str, Any] = {
    **_LLAMA,
    "tie_word_embeddings": True,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}

_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**_LLAMA, "head_dim": 16}),
    "llama_tied": (LlamaConfig, {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, _LLAMA),
    "qwen3": (Qwen3Config, {**_LLAMA, "head_dim": 32}),
    "mistral": (MistralConfig, {**_LLAMA, "head_dim": 16, "sliding_window": 16}),
    "gemma2": (Gemma2Config, _GEMMA),
    "gemma3_text": (Gemma3TextConfig, _GEMMA),
    "phi3": (Phi3Config, _LLAMA),
    "opt": (OPTConfig, {**_SHARED, "ffn_dim": 256, "dropout": 0.0}),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
TIED_FAMILIES: tuple[str, ...] = ("llama_tied", "gemma2", "gemma3_text")


class Float64(TorchFunctionMode):
    """Compute in float64 where a model asks for float32, as norms, softmax and rotary embeddings do.

    Without it a float64 model is exact only to about 1e-7. Use as `with Float64(): model(tokens)`.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace every request for float32."""
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        keywords = {
            name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()
        }
        return function(*args, **keywords)


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Return the configuration of a family's tiny model; keywords replace its fields."""
    config_class, fields = _CONFIGS[family]
    return config_class(**{**fields, **overrides})


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    outliers: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Return a random model in evaluation mode, the same for the same arguments.

    Args:
        family: A member of `FAMILIES`.
        seed: Of every parameter; the global generator is neither read nor changed.
        dtype: Of every parameter, drawn in float64.
        outliers: Whether to inject outlier channels; the function is the same either way.
        overrides: Fields of the configuration.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).double().eval()
    _draw_(model, torch.Generator().manual_seed(seed))
    if outliers:
        _inject_outliers_(model, describe(config))
    return model.to(dtype)


@torch.no_grad()
def _draw_(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every parameter: weights that keep the variance, gains between 0.5 and 1.5, small biases."""
    one_plus_weight = model.config.model_type.startswith("gemma")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if isinstance(module, nn.Embedding):
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name == "bias":
                parameter.copy_(0.1 * noise)
            else:
                gain = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(gain - 1.0 if one_plus_weight else gain)


@torch.no_grad()
def _inject_outliers_(model: PreTrainedModel, description: DecoderDescription) -> None:
    """Scale two channels of each norm that feeds linears, shift one of a LayerNorm; undo both in the linears."""
    channels = list(OUTLIER_CHANNELS)
    for block in model.get_submodule(description.blocks):
        for site in description.sites():
            if site.kind is not SiteKind.NORM_LINEAR or site.producer is None:
                continue
            norm = block.get_submodule(site.producer)
            linears = [block.get_submodule(path) for path in site.consumers]
            offset = description.gain_offset
            norm.weight[channels] = (norm.weight[channels] + offset) * OUTLIER_FACTOR - offset
            for linear in linears:
                linear.weight[:, channels] /= OUTLIER_FACTOR
            if description.norm == "layer":
                norm.bias[channels] *= OUTLIER_FACTOR
                _shift_(norm, linears)


def _shift_(norm: nn.Module, linears: Sequence[nn.Module]) -> None:
    norm.bias[SHIFTED_CHANNEL] += SHIFT
    for linear in linears:
        linear.bias -= SHIFT * linear.weight[:, SHIFTED_CHANNEL]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with 256 tokens: any text round-trips.

    The byte 0xFF never occurs in UTF-8, so the end-of-text token takes its place.
    """
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\u00ff"})
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary[END_OF_TEXT] = END_OF_TEXT_ID
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def save_tiny(folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model, in several safetensors shards, and its tokenizer; return the folder."""
    tiny_model(family, seed=seed, dtype=dtype).save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder
