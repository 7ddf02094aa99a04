# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: a Llama block with query, key and value in one linear, and gate and up in another."""

from quattuor.models.description import Attention, DecoderDescription, Mlp

__all__ = ["PHI3"]

PHI3 = DecoderDescription(
    family="phi3",
    model_types=("phi3",),
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    final_norm="model.norm",
    head="lm_head",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    attention=Attention(
        module="self_attn",
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        output="self_attn.o_proj",
    ),
    mlp=Mlp(module="mlp", gate="mlp.gate_up_proj", up="mlp.gate_up_proj", down="mlp.down_proj"),
)
