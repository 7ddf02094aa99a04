# SPDX-License-Identifier: Apache-2.0
"""Which linear gets which quantizer, what is refused beforehand, and what is put in a linear's place."""

from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import nn

import quattuor
from quattuor.activations import DynamicQuantizer
from quattuor.apply import LinearChoice, check, choose, linear_names, place_
from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.models import describe
from quattuor.nn.linear import QuantizedLinear
from quattuor.recipe import Recipe
from quattuor.rules import Rule
from quattuor.scales import AbsMax, ClipSearch, TwoLevel
from quattuor.solvers import Nearest, TargetCorrection, WeightQuantizer, WeightToQuantize
from quattuor.systems import qqq, rtn
from quattuor.transforms import FoldNorms, RotateHeads, RotateResidual


def weights(bits=4, granularity=None):
    return WeightQuantizer(
        number_format=Integer(bits), granularity=granularity or PerGroup(32), scales=AbsMax(), solver=Nearest()
    )


def two_level(bits=4, group_size=32):
    return WeightQuantizer(
        number_format=TwoLevelInteger(bits),
        granularity=PerGroup(group_size),
        scales=TwoLevel(inner=ClipSearch(num_steps=1, smallest=1.0)),
        solver=Nearest(),
    )


def check_model(model, recipe):
    check(recipe, describe(model.config), model, model.config.to_dict())


FOUR, EIGHT = weights(4), weights(8)
PLAIN = Recipe(weights=FOUR)


def test_without_rules_every_linear_gets_the_recipes_quantizers():
    recipe = Recipe(weights=two_level(), activations=DynamicQuantizer())
    assert choose(recipe, "model.layers.0.mlp.up_proj") == LinearChoice(
        weights=two_level(), activations=DynamicQuantizer()
    )
    assert choose(Recipe(), "model.layers.0.mlp.up_proj") is None


def test_first_matching_rule_wins():
    skip, widen = Rule(pattern="*.mlp.*", skip=True), Rule(pattern="*.down_proj", weights=EIGHT)
    name = "model.layers.0.mlp.down_proj"
    assert choose(replace(PLAIN, rules=(widen, skip)), name) == LinearChoice(weights=EIGHT, activations=None)
    assert choose(replace(PLAIN, rules=(skip, widen)), name) is None
    assert choose(replace(PLAIN, rules=(widen, skip)), "model.layers.0.mlp.up_proj") is None
    assert choose(replace(PLAIN, rules=(widen, skip)), "model.layers.0.self_attn.q_proj").weights == FOUR


def test_rule_replaces_one_axis_and_keeps_the_other():
    recipe = Recipe(
        weights=weights(4, PerChannel()),
        activations=DynamicQuantizer(),
        rules=(Rule(pattern="*.down_proj", weights=weights(8, PerChannel())),),
    )
    choice = choose(recipe, "model.layers.1.mlp.down_proj")
    assert (choice.weights.number_format.bits, choice.activations) == (8, DynamicQuantizer())
    recipe = replace(PLAIN, rules=(Rule(pattern="*.up_proj", activations=DynamicQuantizer()),))
    choice = choose(recipe, "model.layers.1.mlp.up_proj")
    assert (choice.weights, choice.activations) == (FOUR, DynamicQuantizer())
    assert choose(recipe, "model.layers.1.mlp.down_proj").activations is None


def test_rule_quantizes_what_the_recipe_leaves_alone():
    recipe = Recipe(rules=(Rule(pattern="*.q_proj", weights=EIGHT),))
    assert choose(recipe, "model.layers.0.self_attn.q_proj").weights == EIGHT
    assert choose(recipe, "model.layers.0.self_attn.k_proj") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_all_linears_inside_the_blocks(tiny, family):
    model = tiny(family)
    description = describe(model.config)
    sites = description.sites(description.activation(model.config.to_dict()))
    names = list(linear_names(description, sites, 2))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted([*names, description.head]) == sorted(linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_that_fit_pass(tiny, family):
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotates = family in ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "phi3")
    for recipe in (
        rtn(group_size=32),
        qqq(rotation=rotates),
        qqq(group_size=32, rotation=rotates, smoothing=True),
    ):
        check_model(model, recipe)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_group_size_that_does_not_divide_names_the_layer(tiny):
    model = tiny("llama")
    with pytest.raises(InputError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*group_size=128.*64"):
        check_model(model, Recipe(weights=weights(granularity=PerGroup(128))))
    only_down = (Rule(pattern="model.layers.1.mlp.down_proj", weights=weights(granularity=PerGroup(128))),)
    with pytest.raises(InputError, match=r"^model\.layers\.1\.mlp\.down_proj: .*group_size=128.*192"):
        check_model(model, replace(PLAIN, rules=only_down))
    kept = (Rule(pattern="*_proj", skip=True),)
    check_model(model, Recipe(weights=weights(granularity=PerGroup(128)), rules=kept))


@pytest.mark.parametrize(
    ("patterns", "unused"),
    [
        (("model.layers.7.*",), "model.layers.7.*"),
        (("lm_head",), "lm_head"),
        (("*.mlp.*", "*.down_proj"), "*.down_proj"),
    ],
    ids=["no such block", "outside the blocks", "shadowed by an earlier rule"],
)
def test_rule_that_is_never_used_is_refused(tiny, patterns, unused):
    rules = tuple(Rule(pattern=pattern, skip=True) for pattern in patterns)
    with pytest.raises(InputError) as caught:
        check_model(tiny("llama"), replace(PLAIN, rules=rules))
    message = str(caught.value)
    assert message.startswith(f"Recipe.rules: rule pattern={unused} matches none of the 14 linears")
    assert "such as model.layers.0.self_attn.q_proj" in message


def test_target_correction_needs_sequential(tiny):
    model = tiny("llama")
    with pytest.raises(InputError, match=r"self_attn\.q_proj: sequential=False .*set sequential=True"):
        check_model(model, qqq(rotation=False, correct_targets=True))
    check_model(model, qqq(rotation=False, correct_targets=True, sequential=True))
    corrected = replace(weights(4, PerChannel()), solver=TargetCorrection())
    by_rule = Recipe(weights=weights(4, PerChannel()), rules=(Rule(pattern="*.1.mlp.up_proj", weights=corrected),))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj: sequential=False"):
        check_model(model, by_rule)


def test_rotations_are_checked_against_the_architecture(tiny):
    with pytest.raises(UnsupportedError, match=r"^gemma2: transform=RotateResidual"):
        check_model(tiny("gemma2"), qqq())
    with pytest.raises(UnsupportedError, match=r"^opt: transform=RotateResidual.*mean"):
        check_model(tiny("opt"), replace(PLAIN, transforms=(FoldNorms(), RotateResidual(keep_mean=False))))
    check_model(tiny("opt"), qqq())
    check_model(
        tiny("opt"), replace(PLAIN, transforms=(FoldNorms(), RotateResidual(keep_mean=True), RotateHeads()))
    )


@torch.no_grad()
def placed(model, block_index, path, quantizer, activations, dtype=torch.float32):
    """Put a rounded linear in place; return the linear that was there and the packed module."""
    model.to(dtype)
    block = model.get_submodule(describe(model.config).blocks)[block_index]
    linear = block.get_submodule(path)
    solution = quantizer.solve([WeightToQuantize(name=path, weight=linear.weight.float())], {})[0]
    module = place_(block, path, solution, activations, name=f"blocks.{block_index}.{path}")
    assert block.get_submodule(path) is module
    return linear.requires_grad_(False), module, solution


@pytest.mark.parametrize("path", ["self_attn.q_proj", "fc1"])
def test_placed_linear_keeps_name_bias_and_sizes(tiny, path):
    model = tiny("opt")
    before = {name for name, _ in model.named_modules()}
    linear, module, solution = placed(model, 1, path, weights(), None)
    assert isinstance(module, QuantizedLinear)
    assert {name for name, _ in model.named_modules()} == before
    assert module.name == f"blocks.1.{path}"
    assert (module.in_features, module.out_features) == (linear.in_features, linear.out_features)
    assert torch.equal(module.bias, linear.bias)
    assert torch.equal(module.tensor.codes, solution.tensor.codes)
    assert isinstance(model.model.decoder.layers[0].get_submodule(path), nn.Linear), "other blocks stay"


def test_linear_without_bias_stays_without(tiny):
    _, module, _ = placed(tiny("llama"), 0, "mlp.up_proj", weights(), None)
    assert module.bias is None


def test_bias_keeps_the_dtype_of_the_linear(tiny):
    linear, module, _ = placed(tiny("opt"), 0, "fc2", weights(), None, dtype=torch.bfloat16)
    assert module.bias.dtype == torch.bfloat16
    assert torch.equal(module.bias, linear.bias)
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["opt", "qwen2"])
def test_without_activations_it_computes_the_decoded_weight_times_x(tiny, family, generator):
    path = "fc2" if family == "opt" else "self_attn.q_proj"
    linear, module, solution = placed(tiny(family), 0, path, weights(), None)
    x = torch.randn(2, 5, linear.in_features, generator=generator)
    expected = x.double() @ solution.tensor.decode().double().T + linear.bias.double()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantizer", [weights(4, PerChannel()), two_level()], ids=["per channel", "per group"])
def test_with_activations_it_computes_the_product_of_integers(tiny, quantizer, generator):
    linear, module, solution = placed(tiny("opt"), 0, "fc1", quantizer, DynamicQuantizer())
    x = torch.randn(2, 5, 64, generator=generator)
    x[..., 7] *= 20
    step = x.abs().amax(-1, keepdim=True).double() / 127
    rounded = (x.double() / step).round().clamp(-127, 127) * step
    expected = rounded @ solution.tensor.decode().double().T + linear.bias.double()
    scale = expected.abs().max().item()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5 * scale)
    unrounded = x.double() @ solution.tensor.decode().double().T + linear.bias.double()
    assert (module(x) - unrounded).abs().max() > 1e-4 * scale, "the activations are rounded"


def test_weights_that_no_kernel_computes_are_refused_before_any_work():
    weights = replace(rtn(symmetric=False, group_size=None).weights, scales=AbsMax())
    recipe = Recipe(weights=weights, activations=DynamicQuantizer())
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match=r"q_proj: weights=Integer.* have no kernel"):
        quattuor.quantize(model, recipe, None)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
