# SPDX-License-Identifier: Apache-2.0
"""What every weight-only system promises as a whole, and that parts of different systems combine.

A model that it quantized is stored and reloaded to the same logits bit for bit, takes the bytes that it reports,
and is closer to the original than one rounded on the plainest grid of the same width.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from quattuor.checkpoints import PackedModel, write_native
from quattuor.errors import UnsupportedError
from quattuor.formats import BinaryCoding, Codebook
from quattuor.granularity import PerGroup
from quattuor.nn.linear import QuantizedLinear
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.scales import Alternating, OutputClip, WeightedKMeans
from quattuor.solvers import GPTQ, Nearest
from quattuor.systems import SYSTEMS

TOKENS = torch.randint(0, 255, (4, 32), generator=torch.Generator().manual_seed(5))
WEIGHT_ONLY: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 32, "symmetric": False},
    "awq": {"group_size": 32},
    "gptq": {"group_size": 32},
    "owq": {"group_size": 32},
    "spqr": {},
    "squeezellm": {},
    "quip": {},
    "lut_gemm": {"group_size": 32},
}
"""Options that suit the tiny model, whose input sizes are 64 and 192."""


def system(name: str, bits: int = 3) -> Recipe:
    return SYSTEMS[name](bits=bits, **WEIGHT_ONLY[name])


def one_block() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def reloaded(model: PreTrainedModel, recipe: Recipe, folder: Path) -> PreTrainedModel:
    write_native(PackedModel.from_model(model), folder, recipe=recipe)
    return AutoModelForCausalLM.from_pretrained(folder)


def error_of(model: PreTrainedModel, recipe: Recipe) -> float:
    """Quantize in place; return the relative squared error of the logits."""
    expected = logits(model)
    quantize(model, recipe, TOKENS)
    return float((logits(model) - expected).square().sum() / expected.square().sum())


def changed(recipe: Recipe, **choices: Any) -> Recipe:
    """Return a recipe with other parts for its weights."""
    assert recipe.weights is not None
    return replace(recipe, rules=(), weights=replace(recipe.weights, **choices))


def test_every_weight_only_system_is_here() -> None:
    assert WEIGHT_ONLY.keys() == SYSTEMS.keys() - {"qqq"}


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_reloaded_model_gives_the_same_bits_and_beats_rounding_per_channel(name: str, tmp_path: Path) -> None:
    model, recipe = one_block(), system(name)
    error = error_of(model, recipe)
    again = reloaded(model, recipe, tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    packed = {key: module for key, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(packed) == 7
    for key, module in packed.items():
        tensor, stored = module.tensor, again.get_submodule(key).tensor
        assert torch.equal(stored.decode(), tensor.decode()), key
        assert tensor.nbytes == sum(value.nbytes for value in tensor.state().values())
        assert math.isclose(tensor.bits_per_weight, 8 * tensor.nbytes / math.prod(tensor.shape))
    if name != "rtn":
        plain = error_of(one_block(), SYSTEMS["rtn"](bits=3, group_size=None, symmetric=False))
        assert error < 0.7 * plain


def combinations() -> dict[str, tuple[Recipe, Recipe]]:
    """Return pairs of recipes: two systems put together, and the one that the combination should improve."""
    awq, gptq, quip, spqr = system("awq"), system("gptq"), system("quip", 2), system("spqr")
    assert awq.weights is not None
    assert spqr.weights is not None
    assert quip.weights is not None
    feedback = GPTQ(order="natural")
    binary = {"number_format": BinaryCoding(3), "scales": Alternating()}
    clusters = {"number_format": Codebook(3), "scales": WeightedKMeans()}
    return {
        "AWQ scales, GPTQ codes": (changed(awq, solver=GPTQ()), awq),
        "AWQ scales, binary coding": (
            changed(awq, **binary),
            Recipe(weights=replace(awq.weights, **binary)),
        ),
        "QuIP basis, SpQR grid and outliers": (
            Recipe(weights=replace(spqr.weights, transform=quip.weights.transform, solver=feedback)),
            system("rtn"),
        ),
        "codebook in the column feedback": (
            changed(gptq, **clusters),
            changed(gptq, **clusters, solver=Nearest()),
        ),
        "QuIP basis, clipped groups": (
            Recipe(
                weights=replace(
                    awq.weights, granularity=PerGroup(32), transform=quip.weights.transform, scales=OutputClip()
                )
            ),
            system("rtn"),
        ),
    }


@pytest.mark.parametrize("name", combinations())
def test_parts_of_different_systems_combine(name: str, tmp_path: Path) -> None:
    combined, alone = combinations()[name]
    model = one_block()
    assert error_of(model, combined) < error_of(one_block(), alone)
    assert Recipe.from_dict(combined.to_dict()) == combined
    assert torch.equal(logits(reloaded(model, combined, tmp_path / "out")), logits(model))


def test_pairs_that_are_not_legal_say_why() -> None:
    spqr = system("spqr").weights
    assert spqr is not None
    with pytest.raises(UnsupportedError, match=r"outliers=.* cannot be kept by Nearest"):
        replace(spqr, solver=Nearest())
    quip, squeezellm = system("quip").weights, system("squeezellm").weights
    assert quip is not None
    assert squeezellm is not None
    with pytest.raises(UnsupportedError, match=r"transform=.* has no counterpart of fisher in its basis"):
        replace(squeezellm, transform=quip.transform)
    with pytest.raises(
        UnsupportedError, match=r"solver=.* orders inputs of its own, inside the basis of Incoherence"
    ):
        quantize(one_block(), Recipe(weights=replace(spqr, transform=quip.transform)), TOKENS)
    with pytest.raises(UnsupportedError, match=r"RootMeanSquare: format=.*; use MidRise"):
        changed(system("quip"), number_format=Codebook(3))
