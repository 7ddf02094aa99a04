# SPDX-License-Identifier: Apache-2.0
"""Weak-column tuning: gradients of the dense layer, codes that stay, a loss that falls, a file that holds it."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from quattuor.checkpoints import PackedModel, write_native
from quattuor.errors import InputError
from quattuor.nn import QuantizedLinear
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.solvers import WeightToQuantize
from quattuor.systems import gptq, owq
from quattuor.training import TunableColumns, keep_columns_, make_tunable_, tune_weak_columns

TOKENS = torch.randint(0, 255, (8, 32), generator=torch.Generator().manual_seed(5))
PERMUTED = {"group_size": 32, "act_order": True, "groups": "fresh"}


def packed_linear(generator: torch.Generator, *, bias: bool = True, **options: object) -> QuantizedLinear:
    weight, x = torch.randn(12, 64, generator=generator), torch.randn(200, 64, generator=generator)
    recipe = owq(3, num_columns=5, **options)
    assert recipe.weights is not None
    item = WeightToQuantize(name="linear", weight=weight)
    tensor = recipe.weights.solve([item], {"hessian": x.T @ x / 200})[0].tensor
    shift = torch.randn(12, generator=generator) if bias else None
    return QuantizedLinear.from_tensor(tensor, shift, None, dtype=torch.float32, name="linear")


def tuned_model() -> tuple[torch.nn.Module, Recipe]:
    model, recipe = tiny_model("llama", num_hidden_layers=1), owq(3, num_columns=4)
    quantize(model, recipe, TOKENS)
    return model, recipe


@pytest.mark.parametrize("options", [{}, PERMUTED], ids=["plain", "permuted"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_dense_layer(
    options: dict[str, object], bias: bool, generator: torch.Generator
) -> None:
    linear = packed_linear(generator, bias=bias, **options)
    tunable = TunableColumns(linear)
    x = torch.randn(2, 7, 64, generator=generator, requires_grad=True)
    target = torch.randn(2, 7, 12, generator=generator)
    y = tunable(x)
    torch.testing.assert_close(y, linear(x.detach()), rtol=1e-5, atol=1e-5)
    (y * target).sum().backward()

    dense = linear.tensor.decode().requires_grad_()
    again = x.detach().clone().requires_grad_()
    (torch.nn.functional.linear(again, dense) * target).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
    stored = linear.tensor
    assert dense.grad is not None
    gradient = dense.grad
    if stored.input_map is not None:
        gradient = stored.input_map.apply(gradient)
    torch.testing.assert_close(tunable.values.grad, gradient[:, stored.delta.indices.long()], rtol=1e-4, atol=1e-4)


def test_only_the_columns_change_and_the_loss_falls() -> None:
    model, _ = tuned_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = tune_weak_columns(model, TOKENS, steps=12, learning_rate=3e-3, batch_size=8)
    assert losses[-1] < losses[0] - 0.02
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert {name.rsplit(".", 1)[1] for name in changed} == {"delta_values"}
    assert all(value.dtype == before[name].dtype for name, value in after.items())


def test_what_is_stored_is_what_was_trained(tmp_path: Path) -> None:
    model, recipe = tuned_model()
    parameters = make_tunable_(model)
    with torch.no_grad():
        for value in parameters.values():
            value.add_(0.013)
        tuned = model(TOKENS).logits
        keep_columns_(model)
        kept = model(TOKENS).logits
        torch.testing.assert_close(kept, tuned, rtol=1e-4, atol=1e-4)
        write_native(PackedModel.from_model(model), tmp_path / "out", recipe=recipe)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits, kept)


def test_small_updates_survive_in_the_master(generator: torch.Generator) -> None:
    tunable = TunableColumns(packed_linear(generator))
    start = tunable.values.detach().clone()
    with torch.no_grad():
        for _ in range(64):
            tunable.values += start.abs() * 2.0**-15  # below half a unit in the last place of float16
    moved: Tensor = tunable.stored_values().float() - start
    assert (moved[start.abs() > 1e-3] > 0).all()


def test_the_same_seed_trains_alike() -> None:
    model, _ = tuned_model()
    other = copy.deepcopy(model)
    first = tune_weak_columns(model, TOKENS, steps=3, batch_size=2, seed=1)
    assert first == tune_weak_columns(other, TOKENS, steps=3, batch_size=2, seed=1)


def test_refusals(generator: torch.Generator) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    quantize(model, gptq(4, 32), TOKENS)
    with pytest.raises(InputError, match=r"7 packed linears have no whole columns .*; quantize it with owq"):
        make_tunable_(model)
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}):
        with pytest.raises(InputError, match="are not all positive"):
            tune_weak_columns(model, TOKENS, **wrong)
    tunable = TunableColumns(packed_linear(generator))
    with torch.no_grad():
        tunable.values[0, 0] = 1e6
    with pytest.raises(InputError, match=r"tuned column=.* beyond the range of float16; use a smaller"):
        tunable.stored_values()
