# SPDX-License-Identifier: Apache-2.0
"""What every weight-only system promises as a whole, and that parts of different systems combine.

A model that it quantized is stored and reloaded to the same logits bit for bit, takes the bytes that it reports,
and is closer to the original than one rounded on the plainest grid of the same width.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from quattuor.checkpoints import PackedModel, write_native
from quattuor.checkpoints.skeleton import expected_tensors
from quattuor.errors import UnsupportedError
from quattuor.formats import BinaryCoding, Codebook
from quattuor.granularity import PerGroup
from quattuor.nn.linear import QuantizedLinear
from quattuor.quantize import quantize
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.recipe import Recipe
from quattuor.scales import Alternating, OutputClip, WeightedKMeans
from quattuor.solvers import GPTQ, Nearest
from quattuor.systems import SYSTEMS
from quattuor.transforms.incoherence import balanced_factors

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


def uniform_bits(tensor: QuantizedTensor, bits: int, group_size: int) -> float:
    """Codes, float16 scales and zero points of 8 bits."""
    return (bits + 24 / group_size) * math.prod(tensor.shape)


def owq_bits(tensor: QuantizedTensor) -> float:
    num_rows = tensor.shape[0]
    num_columns = tensor.delta.indices.numel() if tensor.delta is not None else 0
    return uniform_bits(tensor, 3, 32) + num_columns * (16 * num_rows + 32)


def entries_bits(tensor: QuantizedTensor) -> float:
    """Single entries: value and column of 16 bits each, and where each row begins."""
    return 32 * tensor.delta.values.numel() + 32 * (tensor.shape[0] + 1) if tensor.delta is not None else 0.0


def spqr_bits(tensor: QuantizedTensor) -> float:
    num_rows, num_columns = tensor.shape
    num_groups = num_columns // 16
    codes = 2 * 8 * math.ceil(3 * num_groups / 8) * num_rows  # of a row, in whole bytes
    second_level = 64 * num_groups * num_rows / 16
    permutation = 32 * num_columns
    return 3 * num_rows * num_columns + codes + second_level + permutation + entries_bits(tensor)


def squeezellm_bits(tensor: QuantizedTensor) -> float:
    num_rows, num_columns = tensor.shape
    return 3 * num_rows * num_columns + 16 * 2**3 * num_rows + entries_bits(tensor)


def quip_bits(tensor: QuantizedTensor) -> float:
    num_rows, num_columns = tensor.shape
    squares = sum(factor**2 for size in tensor.shape for factor in balanced_factors(size))
    maps = 16 * num_columns + 16 * squares + 16 * (num_rows + num_columns)
    return 3 * num_rows * num_columns + 32 + maps


FORMULAS: dict[str, Callable[[QuantizedTensor], float]] = {
    "rtn": lambda tensor: uniform_bits(tensor, 3, 32),
    "awq": lambda tensor: uniform_bits(tensor, 3, 32),
    "gptq": lambda tensor: uniform_bits(tensor, 3, 32),
    "owq": owq_bits,
    "spqr": spqr_bits,
    "squeezellm": squeezellm_bits,
    "quip": quip_bits,
    "lut_gemm": lambda tensor: (3 + 16 * (3 + 1) / 32) * math.prod(tensor.shape),
}
"""Bits of a weight as docs/systems states them, for 3-bit codes and the options above."""


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


def stored_bytes(folder: Path) -> int:
    """Return the bytes of all tensors in the files of a folder, behind their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


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
        assert 8 * tensor.nbytes == FORMULAS[name](tensor), key
    names = {f"{key}.{leaf}" for key, module in packed.items() for leaf in module.layout.tensor_names}
    rest = sum(value.nbytes for key, value in expected_tensors(model).items() if key not in names)
    expected_bytes = rest + sum(module.tensor.nbytes for module in packed.values())
    assert stored_bytes(tmp_path / "out") == expected_bytes
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
