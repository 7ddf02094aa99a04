# SPDX-License-Identifier: Apache-2.0
"""AdaptiveSmoothing against a brute-force search written from the formulas, and its edge cases."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from quattuor.errors import CalibrationError, InputError
from quattuor.granularity import PerChannel, PerGroup
from quattuor.transforms import smoothing
from quattuor.transforms.smoothing import (
    AdaptiveSmoothing,
    candidate_thresholds,
    smoothing_scale,
    threshold_losses,
)

SMALL = AdaptiveSmoothing(num_candidates=25)


def gated(x, w):
    """silu(gate) * up for a weight of stacked gate and up rows."""
    gate, up = (x @ w.T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def identity_loss(problem):
    return threshold_losses(problem, problem.abs_max, [float(problem.abs_max.max())]).item()


def loss_of(problem, scale):
    """L of a scale that the search returned: a threshold of 1 with a_j = s_j gives s_j back."""
    return threshold_losses(problem, scale, [1.0]).item()


def brute_force(problem, group_size):
    """Search thresholds one by one and token by token, in NumPy float64, from the formulas alone."""
    inputs = problem.inputs.double().numpy().reshape(-1, problem.inputs.shape[-1])
    weight = problem.weight.double().numpy()
    levels = 2 ** (problem.bits - 1) - 1

    def round_rows(rows, top):
        step = np.abs(rows).max(axis=-1, keepdims=True) / top
        return np.round(rows / step) * step

    def round_weight(matrix):
        grouped = matrix.reshape(matrix.shape[0], -1, group_size or matrix.shape[1])
        return round_rows(grouped, levels).reshape(matrix.shape)

    largest = max(inputs.max(), -inputs.min())
    num_steps = max(100, int(np.floor(max(inputs.max(), 0) / 0.5)))
    best_threshold, best_loss = None, np.inf
    for index in range(num_steps + 1):
        threshold = largest - index * (largest - 0.1) / num_steps
        scale = np.maximum(1, np.abs(inputs).max(axis=0) / threshold)
        rounded_weight = round_weight(weight * scale)
        loss = 0.0
        for token in inputs:
            error = rounded_weight @ round_rows(token / scale, 127) - weight @ token
            loss += float(error @ error)
        if loss / len(inputs) < best_loss:
            best_threshold, best_loss = threshold, loss / len(inputs)
    return best_threshold, best_loss


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_search_agrees_with_brute_force(make_problem, seed, group_size):
    granularity = PerChannel() if group_size is None else PerGroup(group_size)
    problem = make_problem(seed=seed, granularity=granularity)
    threshold, loss = brute_force(problem, group_size)
    found = AdaptiveSmoothing().find(problem)
    assert threshold < float(problem.abs_max.max())
    assert torch.allclose(found, smoothing_scale(problem.abs_max, threshold), rtol=1e-6)
    assert loss_of(problem, found) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("outlier", [1.0, 20.0])
@pytest.mark.parametrize("evaluate", [gated, lambda x, w: x @ w.T])
def test_never_worse_than_no_smoothing(make_problem, seed, bits, outlier, evaluate):
    problem = make_problem(seed=seed, bits=bits, outlier=outlier, evaluate=evaluate)
    assert loss_of(problem, SMALL.find(problem)) <= identity_loss(problem)


def test_outliers_are_smoothed_to_a_clear_gain(make_problem):
    problem = make_problem(in_features=64)
    scale = AdaptiveSmoothing().find(problem)
    assert loss_of(problem, scale) < 0.7 * identity_loss(problem)
    assert scale[[7, 23]].min() > 2
    assert scale[[index for index in range(64) if index not in (7, 23)]].max() < scale[[7, 23]].min()


def test_only_channels_above_the_threshold_are_touched():
    assert smoothing_scale(torch.tensor([0.0, 0.5, 2.0, 8.0]), 2.0).tolist() == [1.0, 1.0, 1.0, 4.0]


def test_largest_threshold_is_exactly_no_smoothing(make_problem):
    problem = make_problem()
    first = candidate_thresholds(problem.abs_max, problem.inputs, None)[0]
    assert smoothing_scale(problem.abs_max, first).tolist() == [1.0] * 32


@pytest.mark.parametrize(
    ("lowest", "highest", "count"),
    [
        (-3.0, 7.0, 101),
        (-3.0, 49.9, 101),
        (-3.0, 50.5, 102),
        (-3.0, 100.0, 201),
        (-100.0, 7.0, 101),
        (-9.0, -1.0, 101),
    ],
)
def test_authors_rule_counts_by_the_signed_maximum(lowest, highest, count):
    inputs = torch.tensor([[[lowest, highest]]])
    thresholds = candidate_thresholds(inputs.abs().flatten(), inputs, None)
    largest = max(abs(lowest), abs(highest))
    assert len(thresholds) == count
    assert thresholds[0] == pytest.approx(largest, rel=1e-7)
    assert thresholds[-1] == 0.1
    assert np.allclose(np.diff(thresholds), -(largest - 0.1) / (count - 1), rtol=1e-6)


def test_given_number_of_candidates_is_kept():
    inputs = torch.tensor([[[4.1, -2.0]]])
    thresholds = candidate_thresholds(inputs.abs().flatten(), inputs, 5)
    assert thresholds == pytest.approx([4.1, 3.1, 2.1, 1.1, 0.1], rel=1e-6)


def test_small_activations_are_left_alone_without_a_search(make_problem):
    def refuse(x, w):
        raise AssertionError("no candidate exists, so nothing is evaluated")

    inputs = torch.full((1, 2, 32), 0.0999)
    assert AdaptiveSmoothing().find(make_problem(inputs=inputs, evaluate=refuse)).tolist() == [1.0] * 32
    zeros = torch.zeros(1, 2, 32)
    assert AdaptiveSmoothing().find(make_problem(inputs=zeros, evaluate=refuse)).tolist() == [1.0] * 32


def test_dead_channels_and_zero_tokens_keep_one(make_problem):
    problem = make_problem()
    inputs, weight = problem.inputs.clone(), problem.weight.clone()
    inputs[..., 3] = 0
    inputs[0, 2] = 0
    weight[:, 4] = 0
    scale = SMALL.find(make_problem(inputs=inputs, weight=weight))
    assert torch.isfinite(scale).all()
    assert scale[3] == 1


def test_equal_losses_keep_the_largest_threshold(make_problem):
    problem = make_problem(evaluate=lambda x, w: torch.zeros(1))
    assert SMALL.find(problem).tolist() == [1.0] * 32


def test_tied_channels_share_the_scale_of_the_largest(make_problem):
    """Two query heads of eight channels read each of two value heads."""
    ties = (torch.arange(2)[:, None, None] * 8 + torch.arange(8)).expand(2, 2, 8).reshape(-1)
    scale = SMALL.find(make_problem(ties=ties)).view(2, 2, 8)
    assert torch.equal(scale[:, 0], scale[:, 1])
    assert scale[0, :, 7].min() > 1
    assert scale[1, :, 7].min() > 1


def test_loss_is_the_mean_over_tokens_of_summed_squares(make_problem):
    problem = make_problem(activations=None, bits=8)
    threshold = 3.0
    scale = smoothing_scale(problem.abs_max, threshold)
    scaled = problem.weight * scale
    step = scaled.abs().amax(dim=1, keepdim=True) / 127
    error = problem.inputs / scale @ (torch.round(scaled / step) * step).T - problem.inputs @ problem.weight.T
    expected = error.square().sum(dim=-1).mean().item()
    assert threshold_losses(problem, problem.abs_max, [threshold]).item() == pytest.approx(expected, rel=1e-4)


def test_each_target_is_computed_and_each_weight_rounded_once(make_problem, monkeypatch):
    evaluated, rounded = [], []
    round_weight = smoothing.round_weight

    def evaluate(x, w):
        evaluated.append(w)
        return x @ w.T

    def count_rounding(*arguments):
        rounded.append(arguments)
        return round_weight(*arguments)

    monkeypatch.setattr(smoothing, "round_weight", count_rounding)
    problem = make_problem(evaluate=evaluate, num_sequences=3)
    monkeypatch.setattr(smoothing, "TOKENS_AT_ONCE", 2 * problem.inputs.shape[1])
    SMALL.find(problem)
    assert len(rounded) == 25
    assert len(evaluated) == 2 * (25 + 1), "three sequences make two batches"
    assert sum(weight is problem.weight for weight in evaluated) == 2


def test_losses_do_not_depend_on_the_memory_budget(make_problem, monkeypatch):
    problem = make_problem()
    thresholds = candidate_thresholds(problem.abs_max, problem.inputs, 25)
    at_once = threshold_losses(problem, problem.abs_max, thresholds)
    for num_weights in (0, 1, 7):
        monkeypatch.setattr(smoothing, "STACKED_WEIGHT_BYTES", num_weights * problem.weight.numel() * 4)
        assert torch.equal(threshold_losses(problem, problem.abs_max, thresholds), at_once)


def test_max_sequences_measures_on_the_first_but_bounds_by_all(make_problem):
    problem = make_problem(num_sequences=4)
    first_two = replace(problem, inputs=problem.inputs[:2])
    some = AdaptiveSmoothing(num_candidates=25, max_sequences=2)
    assert torch.equal(some.find(problem), SMALL.find(first_two))
    assert torch.equal(AdaptiveSmoothing(num_candidates=25, max_sequences=9).find(problem), SMALL.find(problem))


def test_weights_alone_can_be_searched(make_problem):
    """Without an activation quantizer only the weights' error counts; larger scales then cost without a gain."""
    with_activations, without = make_problem(), make_problem(activations=None)
    assert identity_loss(without) < identity_loss(with_activations)
    assert loss_of(without, SMALL.find(without)) <= identity_loss(without)


def test_nothing_it_was_given_is_changed(make_problem):
    problem = make_problem()
    before = [tensor.clone() for tensor in (problem.inputs, problem.weight, problem.abs_max)]
    SMALL.find(problem)
    after = (problem.inputs, problem.weight, problem.abs_max)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_candidates", 1), ("num_candidates", 2.5), ("num_candidates", True), ("max_sequences", 0)],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_counts_are_refused(field, value):
    with pytest.raises(
        InputError, match=rf"AdaptiveSmoothing: {field}=.* is not an integer of at least .*; use None"
    ):
        AdaptiveSmoothing(**{field: value})


def test_unknown_site_is_refused():
    with pytest.raises(InputError, match=r"AdaptiveSmoothing: sites=\('mlp',\)"):
        AdaptiveSmoothing(sites=("mlp",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_activations_are_refused(make_problem, value):
    inputs = make_problem().inputs.clone()
    inputs[0, 0, 5] = value
    with pytest.raises(CalibrationError, match="AdaptiveSmoothing: abs_max=1 entries are NaN or infinite"):
        SMALL.find(make_problem(inputs=inputs))


def test_no_sequences_are_refused(make_problem):
    problem = replace(make_problem(), inputs=torch.zeros(0, 16, 32))
    with pytest.raises(
        CalibrationError, match=r"AdaptiveSmoothing: loss=.* 0 calibration tokens; give at least one"
    ):
        SMALL.find(problem)


def test_overflowing_output_is_refused(make_problem):
    problem = make_problem(evaluate=lambda x, w: (x @ w.T).half() * 60000)
    with pytest.raises(CalibrationError, match=r"AdaptiveSmoothing: loss=.* is not finite"):
        SMALL.find(problem)
