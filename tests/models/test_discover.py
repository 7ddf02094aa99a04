# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaModel,
    MixtralConfig,
)

from quattuor.errors import UnsupportedError
from quattuor.models import SiteKind, discover, returns_tuple

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_an_undescribed_decoder_is_discovered():
    config = GPTNeoXConfig(**SIZES, intermediate_size=128)
    model = AutoModelForCausalLM.from_config(config)
    found = discover(model)
    assert found.blocks == "gpt_neox.layers"
    assert found.embeddings == ("gpt_neox.embed_in",)
    assert model.get_submodule(found.head) is model.get_output_embeddings()
    assert set(found.linears) == {
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    }
    assert {site.kind for site in found.sites()} == {SiteKind.OPAQUE}
    assert "discovered" in found.reason_against_residual_rotation(keeps_mean=True)
    assert found.block_returns_tuple is None


def test_a_post_norm_opt_is_discovered_although_it_is_not_described():
    config = tiny_config("opt", do_layer_norm_before=False)
    found = discover(AutoModelForCausalLM.from_config(config))
    assert found.blocks == "model.decoder.layers"
    assert len(found.linears) == 6


def test_conv1d_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256))
    with pytest.raises(UnsupportedError, match=r"transformer\.h\.0\.\S+: module=Conv1D stores.*weight\.T"):
        discover(model)


def test_stacked_experts_are_refused():
    config = MixtralConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2
    )
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.\S+: module=\w*Experts stacks.*dense model"):
        discover(AutoModelForCausalLM.from_config(config))


def test_encoder_is_refused():
    model = BertModel(BertConfig(**SIZES, intermediate_size=64))
    with pytest.raises(UnsupportedError, match="is an encoder; only decoder-only"):
        discover(model)


def test_model_without_head_is_refused():
    config = tiny_config("llama")
    with pytest.raises(UnsupportedError, match=r"LlamaModel: get_output_embeddings\(\)=None is no module"):
        discover(LlamaModel(config))


def test_model_without_list_of_blocks_is_refused():
    model = tiny_model("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM: model_type=llama has no nn\.ModuleList"):
        discover(model)


def test_blocks_that_differ_are_refused_by_name():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj = nn.Identity()
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1: linears=mlp\.gate_proj are in this block or"):
        discover(model)


class Scaled(nn.Linear):
    """A linear that is not nn.Linear."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_subclass_of_linear_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = Scaled(64, 192, bias=False)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.up_proj: module=Scaled is a subclass"):
        discover(model)


def test_block_whose_weights_lie_elsewhere_is_refused():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.table = nn.Embedding(2000, 64)
    with pytest.raises(
        UnsupportedError, match=r"block=LlamaDecoderLayer holds 49152 weights in 7 .* 128000 elsewhere"
    ):
        discover(model)


def test_router_beside_linears_stays_in_high_precision():
    model = tiny_model("llama")
    for block in model.model.layers:
        block.router = nn.Embedding(4, 64)
    assert "router" not in discover(model).linears


def test_largest_list_wins_over_smaller_ones_and_lists_inside_it():
    model = tiny_model("llama")
    model.adapters = nn.ModuleList(nn.Linear(4, 4) for _ in range(20))
    for block in model.model.layers:
        block.mlp = nn.ModuleList([block.mlp])
    found = discover(model)
    assert found.blocks == "model.layers"
    assert "mlp.0.down_proj" in found.linears


@torch.no_grad()
def test_a_block_that_returns_a_tuple_is_probed(generator):
    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)
    ).eval()
    found = discover(model)
    assert "self_attention.query_key_value" in found.linears
    seen = {}
    block = model.get_submodule(found.blocks)[0]
    block.register_forward_hook(
        lambda _, arguments, keywords, output: seen.update(
            hidden=arguments[0], keywords=keywords, is_tuple=isinstance(output, tuple)
        ),
        with_kwargs=True,
    )
    model(torch.randint(0, 256, (1, 8), generator=generator), use_cache=False)
    assert seen["is_tuple"], "this release no longer shows the case; take another architecture"
    assert returns_tuple(block, seen["hidden"], seen["keywords"])
