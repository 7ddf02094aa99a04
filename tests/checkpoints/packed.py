# SPDX-License-Identifier: Apache-2.0
"""Packed models for the tests of checkpoints: every linear of a tiny model rounded to nearest."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from quattuor.activations import ActivationQuantizer, DynamicQuantizer
from quattuor.checkpoints.layouts import quantization_config
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup, PerTensor
from quattuor.nn.linear import QuantizedLinear
from quattuor.recipe import Recipe
from quattuor.scales import AbsMax, ClipSearch, TwoLevel
from quattuor.solvers import Nearest, WeightQuantizer, WeightToQuantize


def _two_level(integer: bool) -> TwoLevel:
    """Return the fastest scale rule of the two-level grid: no search."""
    return TwoLevel(inner=ClipSearch(num_steps=1, smallest=1.0), integer=integer, refine=False)


LAYOUTS: Mapping[str, tuple[WeightQuantizer, ActivationQuantizer | None]] = {
    "int4 channel, int8 tokens": (
        WeightQuantizer(number_format=Integer(4), granularity=PerChannel(), scales=AbsMax(), solver=Nearest()),
        DynamicQuantizer(),
    ),
    "int4 group 32 two levels, int8 tokens": (
        WeightQuantizer(
            number_format=TwoLevelInteger(4), granularity=PerGroup(32), scales=_two_level(True), solver=Nearest()
        ),
        DynamicQuantizer(),
    ),
    "int4 group 64 two levels float16, int8 tokens": (
        WeightQuantizer(
            number_format=TwoLevelInteger(4),
            granularity=PerGroup(64),
            scales=_two_level(False),
            solver=Nearest(),
        ),
        DynamicQuantizer(),
    ),
    "int4 group 128 two levels float16, int8 tokens": (
        WeightQuantizer(
            number_format=TwoLevelInteger(4),
            granularity=PerGroup(128),
            scales=_two_level(False),
            solver=Nearest(),
        ),
        DynamicQuantizer(),
    ),
    "uint3 group 32": (
        WeightQuantizer(
            number_format=Integer(3, symmetric=False), granularity=PerGroup(32), scales=AbsMax(), solver=Nearest()
        ),
        None,
    ),
    "int5 tensor": (
        WeightQuantizer(number_format=Integer(5), granularity=PerTensor(), scales=AbsMax(), solver=Nearest()),
        None,
    ),
    "int8 channel": (
        WeightQuantizer(number_format=Integer(8), granularity=PerChannel(), scales=AbsMax(), solver=Nearest()),
        None,
    ),
}
"""One row per layout; the battery in `tests/contracts/test_checkpoints.py` runs over it."""

SMALL = tuple(name for name in LAYOUTS if "group 128" not in name)
"""The layouts that fit linears of 64 input features."""

DEFAULT = "int4 group 32 two levels, int8 tokens"


def recipe_of(layout: str) -> Recipe:
    """Return the recipe of a row of `LAYOUTS`."""
    weights, activations = LAYOUTS[layout]
    return Recipe(systems=("test",), weights=weights, activations=activations)


@torch.no_grad()
def pack_(model: PreTrainedModel, layout: str = DEFAULT) -> PreTrainedModel:
    """Replace every linear inside the blocks by its packed form, and describe it in the configuration."""
    weights, activations = LAYOUTS[layout]
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            solution = weights.solve([WeightToQuantize(name=name, weight=module.weight.float())], {})[0]
            packed = QuantizedLinear.from_tensor(
                solution.tensor, module.bias, activations, dtype=module.weight.dtype, name=name
            )
            model.set_submodule(name, packed)
    layouts = {name: m.layout for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    model.config.quantization_config = quantization_config(layouts, recipe_of(layout))
    return model
