# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 and 3 (text): norms with gain 1 + weight, before and after each sublayer; scaled embeddings."""

from quattuor.models.description import Attention, DecoderDescription, Mlp

__all__ = ["GEMMA2", "GEMMA3_TEXT"]

GEMMA2 = DecoderDescription(
    family="gemma2",
    model_types=("gemma2",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    attention_norm="input_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    gain_offset=1.0,
    attention=Attention(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
    ),
    mlp=Mlp(module="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
    activation_key="hidden_activation",
)

GEMMA3_TEXT = DecoderDescription(
    family="gemma3_text",
    model_types=("gemma3_text",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    attention_norm="input_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    gain_offset=1.0,
    attention=Attention(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
    ),
    mlp=Mlp(module="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
    activation_key="hidden_activation",
)
