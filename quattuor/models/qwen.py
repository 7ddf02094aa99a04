# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen3: Llama blocks, with biases on query, key and value, or with norms over each head."""

from quattuor.models.description import Attention, DecoderDescription, Mlp

__all__ = ["QWEN2", "QWEN3"]

QWEN2 = DecoderDescription(
    family="qwen2",
    model_types=("qwen2",),
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

QWEN3 = DecoderDescription(
    family="qwen3",
    model_types=("qwen3",),
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
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
    ),
    mlp=Mlp(module="mlp", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
)
