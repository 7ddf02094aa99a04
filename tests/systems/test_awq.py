# SPDX-License-Identifier: Apache-2.0
"""AWQ: which part each option is, that queries and keys are not clipped, the paper's inequality (2306.00978)."""

import pytest
import torch
from tiny_models import tiny_model

from quattuor.formats import Integer
from quattuor.granularity import PerChannel, PerGroup
from quattuor.quantize import quantize
from quattuor.scales import MinMax, OutputClip
from quattuor.solvers import Nearest
from quattuor.systems import awq, rtn
from quattuor.transforms import ActivationAwareScale

TOKENS = torch.randint(0, 255, (4, 32), generator=torch.Generator().manual_seed(5))


def logit_error(recipe, family="llama"):
    """Return the relative squared error of the logits of a quantized one-block model on its calibration tokens."""
    model = tiny_model(family, num_hidden_layers=1)
    with torch.no_grad():
        expected = model(TOKENS).logits
    report = quantize(model, recipe, TOKENS)
    with torch.no_grad():
        error = (model(TOKENS).logits - expected).square().sum() / expected.square().sum()
    return float(error), report


def test_defaults() -> None:
    recipe = awq()
    assert recipe.inputs == "original"
    assert recipe.transforms == (ActivationAwareScale(),)
    assert recipe.weights is not None
    assert recipe.weights.number_format == Integer(4, symmetric=False)
    assert recipe.weights.granularity == PerGroup(128)
    assert recipe.weights.scales == OutputClip(inner=MinMax())
    assert recipe.weights.solver == Nearest()
    (rule,) = recipe.rules
    assert rule.roles == ("query", "key")
    assert rule.weights is not None
    assert rule.weights.scales == MinMax()


def test_options() -> None:
    recipe = awq(3, None, clip=False, include_zero=False, include_one=True, share_values=True)
    assert recipe.rules == ()
    assert recipe.weights is not None
    assert recipe.weights.granularity == PerChannel()
    assert recipe.weights.scales == MinMax(include_zero=False)
    assert recipe.transforms == (ActivationAwareScale(include_one=True, share_values=True),)


@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("phi3", 3), ("qwen2", 3), ("opt", 4)])
def test_beats_rounding_on_the_same_grid(family, bits) -> None:
    rounded, _ = logit_error(rtn(bits, 32, symmetric=False), family)
    found, report = logit_error(awq(bits, 32), family)
    assert found < 0.8 * rounded
    assert all(layer.bits_per_weight == bits + 24 / 32 for layer in report.layers)


def test_clipping_serves_at_three_bits_and_leaves_queries_and_keys_alone() -> None:
    plain, without = logit_error(awq(3, 32, clip=False))
    clipped, with_clip = logit_error(awq(3, 32))
    assert clipped < plain
    same = {
        before.name: before.error == after.error
        for before, after in zip(without.layers, with_clip.layers, strict=True)
    }
    for name, is_same in same.items():
        assert is_same == name.endswith(("q_proj", "k_proj")), name


def test_planted_outlier_channels_are_scaled_most() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    before = model.model.layers[0].input_layernorm.weight.clone()
    quantize(model, awq(4, 32), TOKENS)
    scale = before / model.model.layers[0].input_layernorm.weight
    assert set(scale.topk(2).indices.tolist()) == {7, 23}


def test_grouped_values_are_skipped_by_default() -> None:
    """The value rows change only when their scales may be shared by the query heads that read them."""
    for share, changes in ((False, False), (True, True)):
        model = tiny_model("llama", num_hidden_layers=1)
        value = model.model.layers[0].self_attn.v_proj
        norm = model.model.layers[0].input_layernorm
        gain, weight = norm.weight.clone(), value.weight.clone()
        recipe = awq(8, 32, clip=False, share_values=share)
        quantize(model, recipe, TOKENS)
        packed = model.model.layers[0].self_attn.v_proj.tensor.decode()
        row_gain = (packed / (weight * (gain / norm.weight))).median(dim=1).values
        assert bool((row_gain - 1).abs().max() > 0.05) == changes
