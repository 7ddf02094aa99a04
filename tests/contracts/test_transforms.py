# SPDX-License-Identifier: Apache-2.0
"""What every transform promises: the model's function stays as it was, in float64, and nothing depends on chance.

A new transform is one row of `ROTATIONS` or `SITE_TRANSFORMS`; a table test fails until it has one.
"""

import pytest
import torch

from quattuor.activations import DynamicQuantizer
from quattuor.granularity import PerChannel, PerGroup
from quattuor.recipe import Recipe
from quattuor.transforms import (
    TRANSFORMS,
    ActivationAwareScale,
    AdaptiveSmoothing,
    FoldNorms,
    MigrateScale,
    RotateHeads,
    RotateResidual,
)
from quattuor.transforms.base import SITES, SiteProblem
from quattuor.transforms.rotation import (
    fold_gain,
    fold_norm_bias,
    rotate_embedding,
    rotate_heads_input,
    rotate_heads_output,
    rotate_input,
    rotate_output,
)

ROTATIONS = (
    RotateResidual(),
    RotateResidual(keep_mean=True),
    RotateResidual(kind="orthogonal"),
    RotateResidual(kind="orthogonal", keep_mean=True),
    RotateHeads(),
    RotateHeads(kind="hadamard"),
    RotateHeads(kind="orthogonal"),
)
SITE_TRANSFORMS = (
    MigrateScale(),
    MigrateScale(alpha=0.85, sites=SITES),
    AdaptiveSmoothing(num_candidates=20),
    AdaptiveSmoothing(num_candidates=20, max_sequences=1, sites=("down",)),
    ActivationAwareScale(share_values=True),
    ActivationAwareScale(num_steps=4, include_one=True, symmetric=True, share_values=True, max_sequences=1),
)
OTHERS = (FoldNorms(),)

HIDDEN, INNER, VOCABULARY = 48, 80, 32
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 12
EXACT = 1e-10

each_rotation = pytest.mark.parametrize("rotation", ROTATIONS, ids=repr)
each_site_transform = pytest.mark.parametrize("transform", SITE_TRANSFORMS, ids=repr)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deviation(one, other):
    return (one - other).abs().max().item()


def rms(x):
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def test_every_transform_of_the_table_is_in_the_battery():
    assert {type(member) for member in (*ROTATIONS, *SITE_TRANSFORMS, *OTHERS)} == set(TRANSFORMS)


@pytest.mark.parametrize("transform", [*ROTATIONS, *SITE_TRANSFORMS, *OTHERS], ids=repr)
def test_recipe_with_it_survives_a_round_trip(transform):
    recipe = Recipe(transforms=(transform,))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@each_rotation
@pytest.mark.parametrize("size", [1, 2, 12, 60, 64, 128, 576])
def test_rotation_is_orthogonal(rotation, size):
    matrix = rotation.matrix(size, 3)
    identity = torch.eye(size, dtype=torch.float64)
    assert matrix.dtype == torch.float64
    assert matrix.device.type == "cpu"
    assert deviation(matrix @ matrix.T, identity) < 1e-12
    assert deviation(matrix.T @ matrix, identity) < 1e-12


@each_rotation
def test_rotation_depends_on_the_seed_alone(rotation):
    torch.manual_seed(1)
    first = rotation.matrix(48, 3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(rotation.matrix(48, 3), first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "rotation",
    [member for member in ROTATIONS if member not in (RotateHeads(), RotateHeads(kind="hadamard"))],
    ids=repr,
)
def test_random_rotation_differs_between_seeds(rotation):
    assert deviation(rotation.matrix(48, 3), rotation.matrix(48, 4)) > 0.1


class TinyModel:
    """Embedding, then an RMS norm into a gated feed-forward on the residual stream, then a final norm and head."""

    def __init__(self):
        self.embedding = random(VOCABULARY, HIDDEN, seed=0)
        self.gain, self.final_gain = 1 + random(HIDDEN, seed=1), 1 + random(HIDDEN, seed=2)
        self.up, self.up_bias = random(INNER, HIDDEN, seed=3) / 7, random(INNER, seed=4)
        self.down, self.down_bias = random(HIDDEN, INNER, seed=5) / 9, random(HIDDEN, seed=6)
        self.head = random(VOCABULARY, HIDDEN, seed=7) / 7

    def logits(self):
        residual = self.embedding
        inner = torch.tanh(rms(residual) * self.gain @ self.up.T + self.up_bias)
        residual = residual + inner @ self.down.T + self.down_bias
        return rms(residual) * self.final_gain @ self.head.T

    def fold_norms_(self):
        self.up, self.head = fold_gain(self.up, self.gain), fold_gain(self.head, self.final_gain)
        self.gain, self.final_gain = torch.ones_like(self.gain), torch.ones_like(self.final_gain)

    def rotate_(self, reads, writes):
        self.embedding = rotate_embedding(self.embedding, writes)
        self.up, self.head = rotate_input(self.up, reads), rotate_input(self.head, reads)
        self.down, self.down_bias = rotate_output(self.down, self.down_bias, writes)


def test_folding_norms_keeps_the_function():
    model = TinyModel()
    before = model.logits()
    model.fold_norms_()
    assert deviation(model.logits(), before) < EXACT


def test_folding_a_norm_bias_after_the_gain_would_change_the_function():
    x, weight, gain, norm_bias = (random(*shape, seed=i) for i, shape in enumerate([(5, 8), (6, 8), (8,), (8,)]))
    before = (x * gain + norm_bias) @ weight.T
    folded = fold_gain(weight, gain)
    assert deviation(x @ folded.T + fold_norm_bias(weight, None, norm_bias), before) < EXACT
    assert deviation(x @ folded.T + fold_norm_bias(folded, None, norm_bias), before) > 1e-2


@each_rotation
def test_rotating_the_residual_stream_keeps_the_function(rotation):
    model = TinyModel()
    before = model.logits()
    model.fold_norms_()
    matrix = rotation.matrix(HIDDEN, 0)
    model.rotate_(matrix, matrix)
    assert deviation(model.logits(), before) < EXACT
    assert deviation(model.embedding, TinyModel().embedding) > 1e-2


@each_rotation
def test_rotating_with_the_transpose_on_one_side_changes_the_function(rotation):
    matrix = rotation.matrix(HIDDEN, 0)
    assert deviation(matrix, matrix.T) > 1e-3, "a symmetric matrix could not tell"
    model = TinyModel()
    before = model.logits()
    model.fold_norms_()
    model.rotate_(matrix.T, matrix)
    assert deviation(model.logits(), before) > 1e-2


def test_rotating_without_folding_norms_changes_the_function():
    model = TinyModel()
    before = model.logits()
    matrix = RotateResidual().matrix(HIDDEN, 0)
    model.rotate_(matrix, matrix)
    assert deviation(model.logits(), before) > 1e-2


def attention(x, value, value_bias, output, output_bias):
    """Grouped-query attention with fixed mixing weights: each value head serves two query heads."""
    mixing = torch.softmax(random(NUM_HEADS, x.shape[0], x.shape[0], seed=20), dim=-1)
    values = (x @ value.T + value_bias).unflatten(1, (NUM_KV_HEADS, HEAD_DIM)).transpose(0, 1)
    values = values.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=0)
    return (mixing @ values).transpose(0, 1).flatten(1) @ output.T + output_bias


def attention_tensors():
    return (
        random(6, HIDDEN, seed=10),
        random(NUM_KV_HEADS * HEAD_DIM, HIDDEN, seed=11) / 7,
        random(NUM_KV_HEADS * HEAD_DIM, seed=12),
        random(HIDDEN, NUM_HEADS * HEAD_DIM, seed=13) / 7,
        random(HIDDEN, seed=14),
    )


@each_rotation
def test_rotating_heads_keeps_the_function_with_grouped_queries(rotation):
    x, value, value_bias, output, output_bias = attention_tensors()
    before = attention(x, value, value_bias, output, output_bias)
    matrix = rotation.matrix(HEAD_DIM, 0)
    new_value, new_bias = rotate_heads_output(value, value_bias, matrix, NUM_KV_HEADS)
    right = rotate_heads_input(output, matrix, NUM_HEADS)
    wrong = rotate_heads_input(output, matrix.T, NUM_HEADS)
    assert deviation(attention(x, new_value, new_bias, right, output_bias), before) < EXACT
    assert deviation(attention(x, new_value, new_bias, wrong, output_bias), before) > 1e-3
    assert deviation(attention(x, new_value, value_bias, right, output_bias), before) > 1e-3


def site(*, in_features=HIDDEN, ties=None, granularity=None):
    """A site with the fixture's outliers: channels 7 and 23 are 20 times the others; channel 5 is dead."""
    inputs = random(3, 20, in_features, seed=30).float()
    weight = (random(40, in_features, seed=31) / 20).float()
    inputs[..., (7, 23)] *= 20
    weight[:, (7, 23)] /= 20
    inputs[..., 5] = 0
    return SiteProblem(
        inputs=inputs,
        weight=weight,
        evaluate=lambda x, w: x @ w.T,
        abs_max=inputs.abs().amax(dim=(0, 1)),
        ties=ties,
        granularity=granularity or PerChannel(),
        bits=4,
        activations=DynamicQuantizer(),
    )


def grouped_query_ties():
    """Channels of query heads that read the same value head have the same number."""
    kv_heads = torch.arange(NUM_KV_HEADS).repeat_interleave(NUM_HEADS // NUM_KV_HEADS)
    return (kv_heads[:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten()


@each_site_transform
def test_scale_is_positive_finite_float32_and_repeatable(transform):
    problem = site(granularity=PerGroup(16))
    scale = transform.find(problem)
    assert scale.shape == (HIDDEN,)
    assert scale.dtype == torch.float32
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())
    assert torch.equal(transform.find(problem), scale)


@each_site_transform
def test_outliers_are_scaled_down_most_and_dead_channels_not_at_all(transform):
    scale = transform.find(site())
    assert set(scale.topk(2).indices.tolist()) == {7, 23}
    assert scale[5] == 1


@each_site_transform
def test_scale_is_equal_within_ties(transform):
    scale = transform.find(site(ties=grouped_query_ties()))
    heads = scale.view(NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM)
    assert torch.equal(heads, heads[:, :1].expand_as(heads))
    assert scale.unique().numel() > 1


@each_site_transform
def test_site_is_left_as_it_was(transform):
    problem, untouched = site(), site()
    transform.find(problem)
    for name in ("inputs", "weight", "abs_max"):
        assert torch.equal(getattr(problem, name), getattr(untouched, name))


@each_site_transform
def test_scaling_a_norm_and_its_readers_keeps_the_function(transform):
    scale = transform.find(site()).double()
    x, gain, weight = random(5, HIDDEN, seed=32), random(HIDDEN, seed=33), random(40, HIDDEN, seed=34)
    before = rms(x) * gain @ weight.T
    assert deviation(rms(x) * (gain / scale) @ (weight * scale).T, before) < EXACT
    assert deviation(rms(x) * (gain * scale) @ (weight * scale).T, before) > 1e-2


@each_site_transform
def test_scaling_the_up_rows_of_a_gated_pair_keeps_the_function(transform):
    scale = transform.find(site()).double()
    x, gate = random(5, 30, seed=35), random(HIDDEN, 30, seed=36)
    up, down = random(HIDDEN, 30, seed=37), random(20, HIDDEN, seed=38)

    def network(up, down):
        return torch.nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T

    before = network(up, down)
    assert deviation(network(up / scale[:, None], down * scale), before) < EXACT
    assert deviation(network(up * scale[:, None], down * scale), before) > 1e-2


@each_site_transform
def test_scaling_value_heads_keeps_the_function_only_with_ties(transform):
    x, value, value_bias, output, output_bias = attention_tensors()
    before = attention(x, value, value_bias, output, output_bias)

    def fold(scale):
        first = scale.double().view(NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM)[:, 0].flatten()
        return attention(x, value / first[:, None], value_bias / first, output * scale.double(), output_bias)

    assert deviation(fold(transform.find(site(ties=grouped_query_ties()))), before) < EXACT
    assert deviation(fold(transform.find(site())), before) > 1e-3
