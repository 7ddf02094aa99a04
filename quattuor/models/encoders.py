# SPDX-License-Identifier: Apache-2.0
"""Models that are not decoders, told apart by their configuration."""

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from quattuor.errors import UnsupportedError, compose

__all__ = ["refuse_encoder"]


def refuse_encoder(config: PretrainedConfig) -> None:
    """Raise UnsupportedError when a configuration is of an encoder or an encoder-decoder.

    A masked language model counts as an encoder unless its configuration sets `is_decoder`.
    """
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = "an encoder"
    else:
        return
    raise UnsupportedError(
        compose(
            subject="model_type",
            value=config.model_type,
            constraint=f"is {kind}; only decoder-only language models are quantized",
            place=type(config).__name__,
            remedy="choose a causal language model such as Llama, Qwen, Mistral, Gemma, Phi-3 or OPT",
        )
    )
