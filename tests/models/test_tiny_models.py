# SPDX-License-Identifier: Apache-2.0
"""The tiny models are what the other tests take them for."""

import pytest
import torch
from tiny_models import END_OF_TEXT_ID, FAMILIES, OUTLIER_CHANNELS, TIED_FAMILIES, Float64, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from quattuor.models import describe


@pytest.fixture
def tokens(generator):
    """Two random sequences, longer than the sliding windows."""
    return torch.randint(0, 256, (2, 40), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outliers_show_in_activations_but_not_in_logits(family, tokens):
    plain = tiny_model(family, dtype=torch.float64, outliers=False)
    model = tiny_model(family, dtype=torch.float64)
    description = describe(model.config)
    seen = {}
    norm = model.get_submodule(f"{description.blocks}.1.{description.mlp_norm}")
    norm.register_forward_hook(lambda _, inputs, output: seen.update(output=output.flatten(0, -2)))
    with Float64():
        logits, expected = model(tokens).logits, plain(tokens).logits
    assert logits.dtype == torch.float64
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()
    magnitude = seen["output"].abs().mean(dim=0)
    assert magnitude[list(OUTLIER_CHANNELS)].min() > 4 * magnitude.median()
    assert expected.std() > 0.5, "logits are nearly constant, so that errors would not show"


@torch.no_grad()
def test_float64_mode_removes_float32_rounding(tokens):
    model = tiny_model("llama", dtype=torch.float64)
    norm = model.model.norm
    hidden = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = norm.weight * hidden / (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    with Float64():
        assert (norm(hidden) - exact).abs().max() < 1e-14
    assert (norm(hidden) - exact).abs().max() > 1e-9


def test_opt_has_a_shifted_channel(tokens):
    model = tiny_model("opt")
    assert model.model.decoder.layers[0].self_attn_layer_norm.bias[11] > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_depend_on_the_seed_alone(family):
    torch.manual_seed(1)
    first = tiny_model(family, seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second, other = tiny_model(family, seed=3), tiny_model(family, seed=4)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator moved"
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
        assert not torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_not_trivial(family):
    model = tiny_model(family)
    offset = describe(model.config).gain_offset
    gains = [offset + p for name, p in model.named_parameters() if p.ndim == 1 and name.endswith("weight")]
    assert len(gains) >= 5
    assert all(gain.std() > 0.1 and (gain - 1).abs().max() > 0.2 for gain in gains)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_families_share_one_parameter(family):
    model = tiny_model(family)
    shares = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shares == (family in TIED_FAMILIES)


def test_copies_are_independent(tiny):
    first, second = tiny("llama"), tiny("llama")
    with torch.no_grad():
        first.lm_head.weight.zero_()
    assert second.lm_head.weight.abs().max() > 0


def test_tokenizer_round_trips_any_text(tokenizer):
    text = "".join(map(chr, range(0x300))) + " 4-bit → “quantized” 𝄞\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) == 256
    assert END_OF_TEXT_ID not in ids
    assert tokenizer(tokenizer.eos_token)["input_ids"] == [END_OF_TEXT_ID] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("family", ["llama_tied", "opt"])
def test_saved_model_reloads_from_several_shards(tmp_path, family, tokens):
    folder = save_tiny(tmp_path / family, family)
    assert len(list(folder.glob("model-*.safetensors"))) >= 2
    assert (folder / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, tiny_model(family)(tokens).logits)
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]
