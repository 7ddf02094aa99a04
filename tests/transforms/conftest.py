# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the transform tests."""

import jaxtyping
import pytest
import torch

from quattuor.activations import DynamicQuantizer
from quattuor.granularity import PerChannel
from quattuor.transforms.base import SiteProblem

OUTLIERS = (7, 23)


@pytest.fixture
def unchecked(monkeypatch):
    """Switch annotation checks off, so that bad input meets the library's own errors, as it does for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def linear_problem(*, num_sequences=4, in_features=32, out_features=24, seed=0, outlier=20.0, **fields):
    """Build a site: a linear's inputs, two channels of which are `outlier` times the others, and its weight.

    The weight's matching columns are as much smaller, as in a model whose function stayed the same.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_sequences, 16, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    inputs[..., OUTLIERS] *= outlier
    weight[:, OUTLIERS] /= outlier
    defaults = {
        "inputs": inputs,
        "weight": weight,
        "evaluate": lambda x, w: x @ w.T,
        "ties": None,
        "granularity": PerChannel(),
        "bits": 4,
        "activations": DynamicQuantizer(),
    }
    arguments = defaults | fields
    arguments.setdefault("abs_max", arguments["inputs"].abs().amax(dim=(0, 1)))
    return SiteProblem(**arguments)


@pytest.fixture
def make_problem():
    """Return the function that builds a site with outliers."""
    return linear_problem
