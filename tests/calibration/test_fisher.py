# SPDX-License-Identifier: Apache-2.0
"""Fisher information: equals autograd exactly, and leaves the model as it was."""

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from torch.nn import functional as F

from quattuor.calibration.fisher import collect_fisher
from quattuor.errors import CalibrationError, UnsupportedError

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def by_autograd(model: torch.nn.Module, tokens: Tensor, name: str) -> Tensor:
    """Return the sum of squared gradients, one sequence at a time, from plain autograd."""
    weight = model.get_submodule(name).weight
    total = torch.zeros_like(weight)
    for sequence in tokens:
        logits = model(input_ids=sequence[None]).logits[0]
        loss = -F.log_softmax(logits[:-1], dim=-1).gather(1, sequence[1:, None]).mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        total += gradient.square()
    return total


@pytest.mark.parametrize("family", ["llama", "llama_tied", "opt"])
def test_sum_of_squared_gradients_equals_autograd(family: str, generator: torch.Generator) -> None:
    model = tiny_model(family).float()
    tokens = torch.randint(0, 256, (3, 12), generator=generator)
    names = NAMES if family != "opt" else ["model.decoder.layers.0.self_attn.k_proj", "model.decoder.layers.1.fc2"]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    expected = {name: by_autograd(model, tokens, name) for name in names}
    found = collect_fisher(model, names, tokens)
    assert set(found) == set(names)
    for name in names:
        assert found[name].dtype == torch.float32
        assert float(found[name].max()) > 0
        # cross_entropy and the explicit sum round their softmax differently
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].max()))


def test_sequences_add_up(generator: torch.Generator) -> None:
    model, tokens = tiny_model("llama").float(), torch.randint(0, 256, (3, 10), generator=generator)
    whole = collect_fisher(model, NAMES, tokens)
    parts = [collect_fisher(model, NAMES, part) for part in tokens.split(1)]
    for name in NAMES:
        torch.testing.assert_close(whole[name], sum(part[name] for part in parts), rtol=1e-6, atol=0)
    # the square of the sum would be another number: sequences are squared on their own
    doubled = collect_fisher(model, NAMES, tokens[:1].repeat(2, 1))
    torch.testing.assert_close(doubled[NAMES[0]], 2 * parts[0][NAMES[0]])


def test_model_is_left_as_it_was(generator: torch.Generator) -> None:
    model, tokens = tiny_model("llama").float().train(), torch.randint(0, 256, (2, 8), generator=generator)
    parameters = list(model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index % 2 == 0)
    parameters[0].grad = torch.ones_like(parameters[0])
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():  # as the pipeline calls it
        collect_fisher(model, NAMES, tokens)
    assert model.training
    assert [parameter.requires_grad for parameter in parameters] == [i % 2 == 0 for i in range(len(parameters))]
    assert bool((parameters[0].grad == 1).all())
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)


def test_refusals(generator: torch.Generator) -> None:
    model, tokens = tiny_model("llama").float(), torch.randint(0, 256, (2, 8), generator=generator)
    for none in (tokens[:0], tokens[:, :1]):
        with pytest.raises(CalibrationError, match="hold no token to predict; pass sequences of at least two"):
            collect_fisher(model, NAMES, none)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(CalibrationError, match="loss of sequence 0=nan is not finite"):
        collect_fisher(model, NAMES, tokens)
    with pytest.raises(UnsupportedError, match="is read block by block; load the whole model"):
        collect_fisher(model.to("meta"), NAMES, tokens)
