# SPDX-License-Identifier: Apache-2.0
"""ActivationAwareScale against a brute-force search written from the formulas, and its edge cases (2306.00978)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from quattuor.errors import CalibrationError, InputError
from quattuor.granularity import PerChannel, PerGroup
from quattuor.transforms import ActivationAwareScale

AUTHORS = ActivationAwareScale()


def brute_force(problem, group_size, *, last=19):
    """Search in NumPy float64, weight by weight, from the formulas alone."""
    inputs = problem.inputs.double().numpy().reshape(-1, problem.inputs.shape[-1])
    weight = problem.weight.double().numpy()
    highest = 2**problem.bits - 1

    def rounded(matrix):
        grouped = matrix.reshape(matrix.shape[0], -1, group_size or matrix.shape[1])
        low = np.minimum(grouped.min(axis=-1, keepdims=True), 0)
        high = np.maximum(grouped.max(axis=-1, keepdims=True), 0)
        step = ((high - low) / highest).astype(np.float32).astype(np.float64)
        zero = np.round(-low / step)
        codes = np.clip(np.round(grouped / step) + zero, 0, highest)
        return ((codes - zero) * step).reshape(matrix.shape)

    mean = np.abs(inputs).mean(axis=0)
    mean = np.maximum(mean, 1e-4 * np.median(mean))
    best_scale, best_loss = None, np.inf
    for step in range(last + 1):
        scale = mean ** (step / 20)
        scale = scale / np.sqrt(scale.max() * scale.min())
        error = inputs / scale @ rounded(weight * scale).T - inputs @ weight.T
        loss = (error**2).sum(axis=1).mean()
        if loss < best_loss:
            best_scale, best_loss = scale, loss
    return best_scale, best_loss


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [3, 4])
def test_search_agrees_with_brute_force(make_problem, seed, group_size, bits):
    granularity = PerChannel() if group_size is None else PerGroup(group_size)
    problem = make_problem(seed=seed, granularity=granularity, bits=bits, activations=None)
    expected, loss = brute_force(problem, group_size)
    found = AUTHORS.find(problem)
    assert np.allclose(found.numpy(), expected, rtol=1e-5)
    assert AUTHORS.losses(problem, [found]).item() == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_history_begins_with_rounding_and_the_choice_is_never_worse(make_problem, seed, bits, outlier):
    problem = make_problem(seed=seed, bits=bits, outlier=outlier, activations=None)
    candidates = AUTHORS.candidates(problem)
    losses = AUTHORS.losses(problem, candidates)
    assert AUTHORS.exponents()[0] == 0
    assert candidates[0].tolist() == [1.0] * 32, "alpha = 0 is plain rounding"
    assert AUTHORS.losses(problem, [AUTHORS.find(problem)]).item() == losses.min().item() <= losses[0].item()


def test_salient_channels_are_scaled_most_and_to_a_clear_gain(make_problem):
    """The outlier channels keep their weights, as salient channels do, unlike in the fixture's exact rescaling."""
    problem = make_problem(outlier=1.0, activations=None, bits=3, granularity=PerGroup(8))
    problem.inputs[..., 5] *= 50
    problem.abs_max[5] *= 50
    found = AUTHORS.find(problem)
    assert int(found.argmax()) == 5
    losses = AUTHORS.losses(problem, [torch.ones(32), found])
    assert losses[1] < 0.5 * losses[0]


def test_grid_of_exponents():
    assert AUTHORS.exponents() == [step / 20 for step in range(20)]
    assert ActivationAwareScale(num_steps=2, include_one=True).exponents() == [0, 0.5, 1]


def test_candidates_follow_the_formula(make_problem):
    problem = make_problem()
    mean = problem.inputs.abs().mean(dim=(0, 1))
    last = mean**0.95
    torch.testing.assert_close(AUTHORS.candidates(problem)[-1], last / (last.max() * last.min()).sqrt())


def test_equal_activations_leave_rounding_alone(make_problem):
    inputs = torch.full((2, 4, 32), 3.0)
    problem = make_problem(inputs=inputs, activations=None)
    for scale in AUTHORS.candidates(problem):
        torch.testing.assert_close(scale, torch.ones(32), rtol=0, atol=1e-6)
    assert AUTHORS.find(problem).tolist() == [1.0] * 32


@pytest.mark.parametrize("factor", [2.0**-6, 3.0, 1e3])
def test_the_size_of_all_activations_changes_nothing(make_problem, factor):
    problem = make_problem(activations=None)
    scaled = make_problem(inputs=problem.inputs * factor, activations=None)
    torch.testing.assert_close(AUTHORS.find(scaled), AUTHORS.find(problem), rtol=1e-5, atol=0)


def test_dead_channels_keep_one_and_nearly_dead_ones_do_not_set_the_range(make_problem):
    problem = make_problem(activations=None)
    inputs = problem.inputs.clone()
    inputs[..., 3] = 0
    inputs[..., 4] *= 1e-12
    live_mean = inputs.abs().mean(dim=(0, 1))[torch.arange(32) != 3]
    span = float(live_mean.max() / live_mean.median()) * 1e4  # without the clamp it would be 1e12 and more
    for exponent, scale in zip(AUTHORS.exponents(), AUTHORS.candidates(make_problem(inputs=inputs)), strict=True):
        assert scale[3] == 1
        assert scale.max() / scale[4] == pytest.approx(span**exponent, rel=1e-4)


def test_site_that_is_always_zero_is_left_alone(make_problem):
    assert AUTHORS.find(make_problem(inputs=torch.zeros(1, 4, 32))).tolist() == [1.0] * 32


def test_grouped_queries_are_skipped_unless_asked_for(make_problem):
    ties = (torch.arange(2)[:, None, None] * 8 + torch.arange(8)).expand(2, 2, 8).reshape(-1)
    problem = make_problem(ties=ties, activations=None)
    assert AUTHORS.find(problem).tolist() == [1.0] * 32
    shared = ActivationAwareScale(share_values=True)
    mean = problem.inputs.abs().mean(dim=(0, 1)).view(2, 2, 8).mean(dim=1, keepdim=True)
    last = mean.expand(2, 2, 8).reshape(-1) ** 0.95
    torch.testing.assert_close(shared.candidates(problem)[-1], last / (last.max() * last.min()).sqrt())
    alone = make_problem(ties=torch.arange(32), activations=None)
    assert torch.equal(AUTHORS.find(alone), AUTHORS.find(make_problem(activations=None)))


def test_symmetric_levels_are_another_search(make_problem):
    problem = make_problem(activations=None, bits=2)
    weight = problem.weight.abs()  # one sign: levels around zero waste half of them
    one_sided = make_problem(activations=None, bits=2, weight=weight)
    ones = [torch.ones(32)]
    asymmetric = AUTHORS.losses(one_sided, ones).item()
    assert ActivationAwareScale(symmetric=True).losses(one_sided, ones).item() > 2 * asymmetric


def test_first_sequences_measure_the_error_but_all_the_means(make_problem):
    problem = make_problem(num_sequences=4, activations=None)
    some = ActivationAwareScale(max_sequences=1)
    assert all(
        torch.equal(one, other)
        for one, other in zip(some.candidates(problem), AUTHORS.candidates(problem), strict=True)
    )
    first = make_problem(inputs=problem.inputs[:1], weight=problem.weight, activations=None)
    candidates = AUTHORS.candidates(problem)
    assert torch.equal(some.losses(problem, candidates), AUTHORS.losses(first, candidates))


@pytest.mark.parametrize("value", [0, 2.5, True])
@pytest.mark.usefixtures("unchecked")
def test_bad_steps_are_refused(value):
    with pytest.raises(
        InputError, match=r"ActivationAwareScale: num_steps=.* is not an integer of at least 1; use"
    ):
        ActivationAwareScale(num_steps=value)


def test_bad_sites_and_sequences_are_refused():
    with pytest.raises(InputError, match="ActivationAwareScale: sites="):
        ActivationAwareScale(sites=("nowhere",))
    with pytest.raises(InputError, match="ActivationAwareScale: max_sequences=0"):
        ActivationAwareScale(max_sequences=0)


def test_data_that_cannot_support_it_is_refused(make_problem):
    problem = make_problem()
    with pytest.raises(CalibrationError, match=r"ActivationAwareScale: inputs=\(0, 16, 32\) hold no token"):
        AUTHORS.find(replace(problem, inputs=problem.inputs[:0]))
    weight = problem.weight.clone()
    weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="ActivationAwareScale: weight=1 entries"):
        AUTHORS.find(make_problem(weight=weight))
