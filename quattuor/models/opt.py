# SPDX-License-Identifier: Apache-2.0
"""OPT, layers normalized before each sublayer: LayerNorm, biases, learned positions, two-layer feed-forward."""

from quattuor.models.description import Attention, DecoderDescription, Mlp

__all__ = ["OPT"]

OPT = DecoderDescription(
    family="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    norm="layer",
    attention=Attention(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
    ),
    mlp=Mlp(module=None, gate=None, up="fc1", down="fc2"),
    activation_key="activation_function",
    # A tuple in the first releases of transformers 5, the hidden state since.
    block_returns_tuple=None,
)
