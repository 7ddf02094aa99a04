# SPDX-License-Identifier: Apache-2.0
import pytest
from tiny_models import tiny_config
from transformers import BertConfig, Gemma3Config, GPTNeoXConfig, ModernBertConfig, PretrainedConfig, T5Config

from quattuor.errors import UnsupportedError
from quattuor.models import DESCRIPTIONS, describe


def test_unknown_type_names_what_is_missing_the_known_types_and_the_remedy():
    with pytest.raises(UnsupportedError) as caught:
        describe(GPTNeoXConfig())
    message = str(caught.value)
    assert message.startswith("GPTNeoXConfig: model_type=gpt_neox has no description")
    assert "norms, heads and linears" in message
    assert all(model_type in message for model_type in DESCRIPTIONS)
    assert "without transforms" in message
    assert "discover(model)" in message


@pytest.mark.parametrize("config", [PretrainedConfig(), Gemma3Config()], ids=["without type", "multimodal"])
def test_other_configurations_are_unknown(config):
    with pytest.raises(UnsupportedError, match="has no description"):
        describe(config)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (BertConfig(), "an encoder;"),
        (ModernBertConfig(), "an encoder;"),
        (T5Config(), "an encoder-decoder model;"),
    ],
    ids=["bert", "modernbert", "t5"],
)
def test_encoders_have_their_own_message(config, kind):
    with pytest.raises(UnsupportedError, match=rf"Config: model_type=\w+ is {kind}.*choose a causal") as caught:
        describe(config)
    assert "discover" not in str(caught.value), "discovery refuses encoders as well"


def test_bert_used_as_decoder_is_merely_unknown():
    with pytest.raises(UnsupportedError, match="has no description"):
        describe(BertConfig(is_decoder=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=False normalizes after the residual sum"),
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim=32 is not hidden_size=64"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False leaves its norms without"),
    ],
)
def test_opt_variants_are_refused_with_the_reason(overrides, message):
    with pytest.raises(UnsupportedError, match=rf"OPTConfig: {message}.*discover\(model\)"):
        describe(tiny_config("opt", **overrides))


def test_opt_without_final_norm_is_described_without_it():
    assert describe(tiny_config("opt")).final_norm == "model.decoder.final_layer_norm"
    assert describe(tiny_config("opt", _remove_final_layer_norm=True)).final_norm is None
