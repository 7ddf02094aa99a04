# SPDX-License-Identifier: Apache-2.0
"""Folds leave the function of real models as it was, in float64; incomplete or illegal ones are seen."""

import pytest
import torch
from tiny_models import FAMILIES, TIED_FAMILIES, Float64, tiny_model
from transformers import AutoModelForCausalLM, OlmoConfig

from quattuor.errors import UnsupportedError
from quattuor.folding import (
    fold_block_norms_,
    fold_final_norm_,
    fold_scale_,
    linear_at,
    rotate_block_heads_,
    rotate_block_residual_,
    rotate_ends_,
    untie_head_,
)
from quattuor.models import SiteKind, describe
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.transforms import AdaptiveSmoothing, FoldNorms, MigrateScale, RotateHeads, RotateResidual

EXACT = 1e-10
VISIBLE = 1e-3
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 251
ROTATED = [family for family in FAMILIES if not family.startswith(("gemma", "opt"))]
FOLDABLE = [(family, name) for family in FAMILIES for name in ("qkv", "output", "gate_up", "down")]


def logits(model):
    with torch.no_grad(), Float64():
        return model(TOKENS, use_cache=False).logits


def deviation(model, expected):
    return ((logits(model) - expected).abs().max() / expected.abs().max()).item()


def transform_(model, *transforms):
    with Float64():
        quantize(model, Recipe(transforms=transforms), None)


def parts_of(model):
    """Return what the folds ask for: description, heads, sites by name, blocks."""
    config = model.config.to_dict()
    description = describe(model.config)
    sites = {site.name: site for site in description.sites(description.activation(config))}
    return description, description.heads(config), sites, list(model.get_submodule(description.blocks))


def double(family, **overrides):
    model = tiny_model(family, dtype=torch.float64, **overrides)
    return model, logits(model)


def tied_scale(heads, name, width, generator):
    """Return random factors between 1/4 and 4, equal over the query heads of a kv head at "output"."""
    if name != "output":
        return 4 ** (2 * torch.rand(width, generator=generator) - 1)
    per_kv = 4 ** (2 * torch.rand(heads.num_kv_heads, 1, heads.head_dim, generator=generator) - 1)
    return per_kv.expand(-1, heads.num_heads // heads.num_kv_heads, -1).reshape(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_norms_keep_the_function_and_have_no_gain_left(family):
    model, expected = double(family)
    transform_(model, FoldNorms())
    assert deviation(model, expected) < EXACT
    description, _, _, blocks = parts_of(model)
    norms = [
        block.get_submodule(path)
        for block in blocks
        for path in (description.attention_norm, description.mlp_norm)
    ]
    for norm in (*norms, model.get_submodule(description.final_norm)):
        assert bool((norm.weight + description.gain_offset == 1).all())
    if description.norm == "layer":
        assert all(bool((norm.bias == 0).all()) for norm in norms), "linears with a bias take the norm's"


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("family", [*ROTATED, "opt"])
def test_rotated_residual_stream_and_heads_keep_the_function(family, kind):
    model, expected = double(family)
    before = linear_at(parts_of(model)[3][1], parts_of(model)[2]["down"].consumers[0]).weight.clone()
    transform_(model, FoldNorms(), RotateResidual(kind=kind, keep_mean=family == "opt"), RotateHeads(kind=kind))
    assert deviation(model, expected) < EXACT
    after = linear_at(parts_of(model)[3][1], parts_of(model)[2]["down"].consumers[0]).weight
    assert (after - before).norm() / before.norm() > 0.1, "nothing was rotated"


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_heads_alone_keep_the_function(family):
    model, expected = double(family)
    _, _, sites, blocks = parts_of(model)
    outputs = [linear_at(block, sites["output"].consumers[0]) for block in blocks]
    before = [linear.weight.clone() for linear in outputs]
    transform_(model, RotateHeads())
    assert deviation(model, expected) < EXACT
    assert all(
        (linear.weight - old).norm() > 0.1 * old.norm() for linear, old in zip(outputs, before, strict=True)
    )


@pytest.mark.parametrize("folded_first", [False, True], ids=["", "after FoldNorms"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_at_every_site_keep_the_function(family, folded_first, generator):
    model, expected = double(family)
    if folded_first:
        transform_(model, FoldNorms())
    description, heads, sites, blocks = parts_of(model)
    for block in blocks:
        for name, site in sites.items():
            consumer = linear_at(block, site.consumers[0])
            before = consumer.weight.clone()
            scale = tied_scale(heads, name, consumer.in_features, generator)
            fold_scale_(block, description, heads, site, scale)
            assert torch.equal(consumer.weight, before * scale.double())
    assert deviation(model, expected) < EXACT


@pytest.mark.parametrize(("family", "name"), FOLDABLE)
def test_scale_that_one_consumer_forgets_changes_the_function(family, name, generator):
    model, expected = double(family)
    description, heads, sites, blocks = parts_of(model)
    consumer = linear_at(blocks[1], sites[name].consumers[-1])
    before = consumer.weight.detach().clone()
    scale = tied_scale(heads, name, consumer.in_features, generator)
    fold_scale_(blocks[1], description, heads, sites[name], scale)
    consumer.weight.data.copy_(before)
    assert deviation(model, expected) > VISIBLE


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_factors_that_differ_within_a_kv_head_are_refused(family, generator):
    model, _ = double(family)
    description, heads, sites, blocks = parts_of(model)
    scale = 0.5 + torch.rand(heads.num_heads * heads.head_dim, generator=generator)
    before = {name: value.clone() for name, value in blocks[0].named_parameters()}
    with pytest.raises(AssertionError, match="share a kv head differ"):
        fold_scale_(blocks[0], description, heads, sites["output"], scale)
    assert all(torch.equal(value, before[name]) for name, value in blocks[0].named_parameters())


@pytest.mark.parametrize("forgotten", ["qkv", "output", "gate_up", "down"])
def test_rotation_that_one_site_forgets_changes_the_function(forgotten):
    model, expected = double("llama")
    transform_(model, FoldNorms())
    description, _, sites, blocks = parts_of(model)
    rotation = RotateResidual().matrix(64, seed=0)
    rotate_ends_(model, description, rotation)
    rotate_block_residual_(blocks[0], tuple(sites.values()), rotation)
    kept = tuple(site for name, site in sites.items() if name != forgotten)
    rotate_block_residual_(blocks[1], kept, rotation)
    assert deviation(model, expected) > VISIBLE
    rotate_block_residual_(blocks[1], (sites[forgotten],), rotation)
    assert deviation(model, expected) < EXACT


def test_gains_that_the_head_forgets_change_the_function():
    model, expected = double("qwen2")
    description, _, sites, blocks = parts_of(model)
    for block in blocks:
        fold_block_norms_(block, description, tuple(sites.values()))
    assert deviation(model, expected) < EXACT
    head = model.lm_head.weight.detach().clone()
    fold_final_norm_(model, description)
    assert deviation(model, expected) < EXACT
    model.lm_head.weight.data.copy_(head)
    assert deviation(model, expected) > VISIBLE


def test_rotating_the_wrong_rows_of_a_fused_linear_would_change_the_function():
    model, expected = double("phi3")
    description, heads, _, blocks = parts_of(model)
    rotation = RotateHeads().matrix(heads.head_dim, seed=0)
    rotate_block_heads_(blocks[0], description, heads, rotation)
    assert deviation(model, expected) < EXACT
    keys = linear_at(blocks[0], description.attention.key).weight.data[description.attention.rows("key", heads)]
    keys.copy_((rotation.T @ keys.reshape(heads.num_kv_heads, heads.head_dim, -1)).flatten(0, 1))
    assert deviation(model, expected) > VISIBLE, "keys meet rotary tables, which a rotation does not pass"


@pytest.mark.parametrize("family", TIED_FAMILIES)
def test_untied_head_has_a_weight_of_its_own(family):
    model, expected = double(family)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    untie_head_(model)
    assert head.weight.untyped_storage().data_ptr() != embedding.weight.untyped_storage().data_ptr()
    assert torch.equal(head.weight, embedding.weight)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(logits(model), expected)
    model.tie_weights()
    assert head.weight is not embedding.weight, "nothing ties them again"


def test_untied_and_rotated_model_survives_saving(tmp_path):
    model, expected = double("llama_tied")
    transform_(model, FoldNorms(), RotateResidual())
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.tie_word_embeddings is False
    # Rotary tables are rebuilt in float32 by loading, and are not rounded to it again by `Float64`.
    assert deviation(again, expected) < 1e-6


def test_untying_an_untied_head_copies_nothing():
    model, _ = double("llama")
    weight = model.lm_head.weight
    untie_head_(model)
    assert model.lm_head.weight is weight


def test_opt_without_biases_rotates_the_bias_that_stays_in_the_norm():
    model, expected = double("opt", enable_bias=False, outliers=False)
    transform_(model, FoldNorms())
    assert deviation(model, expected) < EXACT
    assert bool((model.model.decoder.layers[0].final_layer_norm.bias != 0).any())
    model, _ = double("opt", enable_bias=False, outliers=False)
    transform_(model, FoldNorms(), RotateResidual(keep_mean=True), RotateHeads())
    assert deviation(model, expected) < EXACT


def test_zero_gain_beside_a_bias_without_a_place_is_refused():
    model, _ = double("opt", enable_bias=False, outliers=False)
    model.model.decoder.layers[0].final_layer_norm.weight.data[3] = 0
    with pytest.raises(UnsupportedError, match=r"norm gain=0 cannot be folded.*leave FoldNorms out"):
        transform_(model, FoldNorms())


def test_dead_channel_of_a_norm_folds():
    model, _ = double("llama")
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    expected = logits(model)
    transform_(model, FoldNorms())
    assert deviation(model, expected) < EXACT


def test_folds_round_once_to_the_dtype_of_the_weight():
    exact, _ = double("llama")
    model = tiny_model("llama").bfloat16()
    for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        parameter.data.copy_(rounded)
    for one in (exact, model):
        description, _, sites, blocks = parts_of(one)
        fold_block_norms_(blocks[0], description, tuple(sites.values()))
    for (name, parameter), rounded in zip(exact.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.bfloat16(), rounded), name


@pytest.mark.parametrize(
    ("family", "transforms", "reason"),
    [
        ("gemma2", (FoldNorms(), RotateResidual()), "norms between a sublayer and the residual sum"),
        ("gemma3_text", (FoldNorms(), RotateResidual()), "norms between a sublayer and the residual sum"),
        ("opt", (FoldNorms(), RotateResidual(keep_mean=False)), "keeps the mean"),
        ("llama", (RotateResidual(),), r"needs FoldNorms\(\) before it"),
        ("llama", (RotateResidual(), FoldNorms()), r"needs FoldNorms\(\) before it"),
        ("opt", (RotateResidual(keep_mean=True),), r"needs FoldNorms\(\) before it"),
    ],
)
def test_illegal_rotation_is_refused_before_any_change(family, transforms, reason):
    model = tiny_model(family)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UnsupportedError, match=f"{family.split('_')[0]}.*{reason}.*leave it out of Recipe"):
        quantize(model, Recipe(transforms=transforms), None)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("transform", [AdaptiveSmoothing(), MigrateScale(sites=("qkv", "down"))], ids=repr)
def test_site_transform_at_an_opaque_site_is_refused(transform):
    model = tiny_model("opt", activation_function="gelu")
    with pytest.raises(UnsupportedError, match=r"no place at site 'down' .*\['gate_up', 'output', 'qkv'\]"):
        quantize(model, Recipe(transforms=(transform,)), TOKENS)


def test_scale_of_an_opaque_site_is_refused():
    model, _ = double("opt", activation_function="gelu")
    description, heads, sites, blocks = parts_of(model)
    assert sites["down"].kind is SiteKind.OPAQUE
    with pytest.raises(UnsupportedError, match=r"site=down is opaque: nothing before it can take a scale"):
        fold_scale_(blocks[0], description, heads, sites["down"], torch.ones(256))


def test_undescribed_architecture_is_refused_with_any_transform():
    config = OlmoConfig(vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedError, match="olmo"):
        quantize(model, Recipe(transforms=(FoldNorms(),)), None)
