# SPDX-License-Identifier: Apache-2.0
"""Llama: RMSNorm before each sublayer, gated feed-forward, shared key and value heads."""

from quattuor.models.description import Attention, DecoderDescription, Mlp

__all__ = ["LLAMA"]

LLAMA = DecoderDescription(
    family="llama",
    model_types=("llama",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    attention=Attention(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
    ),
    mlp=Mlp(module="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
)
