# SPDX-License-Identifier: Apache-2.0
"""Recipes as values: storage, combination, and what is refused in a recipe file."""

import dataclasses
from typing import Any

import pytest

from quattuor.activations import DynamicQuantizer
from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.recipe import Recipe, part_from_dict, part_to_dict
from quattuor.rules import Rule
from quattuor.scales import AbsMax, ClipSearch, TwoLevel
from quattuor.solvers import GPTQ, CoordinateDescent, WeightQuantizer
from quattuor.transforms import FoldNorms, RotateResidual

WEIGHTS = WeightQuantizer(
    number_format=TwoLevelInteger(4),
    granularity=PerGroup(64),
    scales=TwoLevel(inner=ClipSearch(norm=2.4, choose_sign=True), integer=False),
    solver=CoordinateDescent(start=GPTQ(damping=0.02, order="natural"), num_passes=3),
)
OTHER = WeightQuantizer(number_format=Integer(8), granularity=PerChannel(), scales=AbsMax())


def test_nested_parts_and_rules_survive() -> None:
    recipe = Recipe(
        systems=("one", "two"),
        transforms=(FoldNorms(), RotateResidual()),
        weights=WEIGHTS,
        activations=DynamicQuantizer(),
        rules=(Rule(pattern="*.down_proj", weights=OTHER), Rule(pattern="*.0.*", skip=True)),
        inputs="rounded",
        sequential=True,
    )
    data = recipe.to_dict()
    assert data["weights"]["scales"]["inner"] == {
        "part": "ClipSearch",
        "num_steps": 50,
        "smallest": 0.2,
        "norm": 2.4,
        "weighted": True,
        "choose_sign": True,
        "scale_dtype": "float32",
    }
    assert data["rules"][1] == {
        "part": "Rule",
        "pattern": "*.0.*",
        "roles": [],
        "skip": True,
        "weights": None,
        "activations": None,
    }
    assert Recipe.from_dict(data) == recipe
    assert Recipe.from_dict({}) == Recipe()


def test_absent_keys_take_the_defaults() -> None:
    data = {"weights": {"part": "WeightQuantizer", "number_format": {"part": "Integer", "bits": 4}}}
    data["weights"] |= {"granularity": {"part": "PerChannel"}, "scales": {"part": "AbsMax"}}
    weights = WeightQuantizer(number_format=Integer(4), granularity=PerChannel(), scales=AbsMax())
    assert Recipe.from_dict(data) == Recipe(weights=weights)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weight": None}, r"Recipe: key=weight is not a field; did you mean weights\?"),
        ({"zzz": None}, r"Recipe: key=zzz is not a field; use one of systems, transforms, weights"),
        ({"weights": {"part": "GTPQ"}}, r"Recipe.weights: part=GTPQ is not a known part; did you mean GPTQ\?"),
        ({"weights": {"part": "Zzz"}}, r"part=Zzz is not a known part; use one of AbsMax"),
        ({"weights": {"bits": 4}}, r"Recipe.weights: part=None is not a known part"),
        ({"weights": {"part": ["GPTQ"]}}, r"Recipe.weights: part=\['GPTQ'\] is not a known part"),
        ({"weights": {"part": "GPTQ"}}, r"Recipe: weights=GPTQ\(.*\) is not of type .*WeightQuantizer"),
        ({"weights": "gptq"}, r"Recipe: weights='gptq' is not of type .*WeightQuantizer"),
        ({"transforms": {"part": "FoldNorms"}}, r"Recipe: transforms=FoldNorms\(\) is not of type tuple"),
        ({"transforms": [{"part": "GPTQ"}]}, r"Recipe: transforms=\(GPTQ\(.*\),\) is not of type tuple"),
        (
            {"transforms": [{"part": "FoldNorm"}]},
            r"Recipe.transforms\[0\]: part=FoldNorm .* did you mean FoldNorms\?",
        ),
        ({"sequential": 1}, r"Recipe: sequential=1 is not of type bool"),
        (
            {"inputs": "rouned"},
            r"Recipe: inputs='rouned' is not of type Literal\['original', 'quantized', 'rounded'\]",
        ),
    ],
)
def test_recipe_files_that_do_not_mean_anything(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"part": "GPTQ", "dampening": 0.1}, r"x \(GPTQ\): key=dampening is not a field; did you mean damping\?"),
        (
            {"part": "GPTQ", "damping": "1e-2"},
            r"x \(GPTQ\): damping='1e-2' is not of type float; correct its value",
        ),
        ({"part": "GPTQ", "column_block": 12.5}, r"column_block=12.5 is not of type int"),
        ({"part": "GPTQ", "column_block": True}, r"column_block=True is not of type int"),
        ({"part": "GPTQ", "order": "descending"}, r"order='descending' is not of type Literal"),
        ({"part": "GPTQ", "damping": -1}, r"GPTQ: damping, order, column_block=.* are out of range"),
        ({"part": "Integer"}, r"x \(Integer\): key=bits is missing; give a value for bits"),
        ({"part": "Integer", "bits": "4"}, r"bits='4' is not of type int"),
        ({"part": "Integer", "bits": 40}, r"Integer: bits=40 is not an integer from 2 to 8"),
        ({"part": "TwoLevel", "inner": {"part": "AbsMax"}}, r"inner=AbsMax\(.*\) is not of type ClipSearch"),
        ({"part": "TwoLevel", "inner": {"part": "ClipSearch", "nrom": 2}}, r"x \(TwoLevel\).inner \(ClipSearch\)"),
    ],
)
def test_parts_that_do_not_exist_so(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        part_from_dict(data, "x")


def test_a_recipe_is_a_mapping() -> None:
    for data in ([], "qqq", None):
        with pytest.raises((InputError, TypeError), match=r"Recipe|data"):
            Recipe.from_dict(data)


def test_an_integer_is_a_float() -> None:
    assert part_from_dict({"part": "GPTQ", "damping": 1}, "x") == GPTQ(damping=1.0)
    assert part_to_dict((GPTQ(), 3)) == [part_to_dict(GPTQ()), 3]


def test_disjoint_axes_merge() -> None:
    transforms = Recipe(systems=("rotate",), transforms=(FoldNorms(),))
    weights = Recipe(systems=("gptq",), weights=WEIGHTS, sequential=True)
    merged = transforms | weights
    assert merged == Recipe(
        systems=("rotate", "gptq"), transforms=(FoldNorms(),), weights=WEIGHTS, sequential=True
    )
    assert dataclasses.replace(weights | transforms, systems=()) == dataclasses.replace(merged, systems=())
    assert (merged | Recipe()) == merged


def test_equal_choices_are_no_conflict() -> None:
    one, two = (Recipe(systems=(name,), weights=WEIGHTS) for name in ("one", "two"))
    assert (one | two).weights == WEIGHTS


def test_conflicts_name_the_axis_and_both_systems() -> None:
    one, two = Recipe(systems=("one",), weights=WEIGHTS), Recipe(systems=("two",), weights=OTHER)
    with pytest.raises(InputError, match=r"axis=weights is set by both one and two; clear it .*weights="):
        one | two
    with pytest.raises(InputError, match=r"set by both one \| three and an unnamed recipe"):
        (one | Recipe(systems=("three",))) | Recipe(weights=OTHER)


def test_only_recipes_merge() -> None:
    with pytest.raises(TypeError):
        Recipe() | "qqq"


def test_policies_without_meaning() -> None:
    with pytest.raises(
        InputError, match=r"Recipe: inputs=rounded needs an activation quantizer.*; set activations"
    ):
        Recipe(weights=WEIGHTS, inputs="rounded")
    with pytest.raises(InputError, match=r"Recipe: activations=.*stay in high precision; set weights as well"):
        Recipe(activations=DynamicQuantizer())


def test_activation_formats_without_a_kernel() -> None:
    with pytest.raises(UnsupportedError, match=r"DynamicQuantizer: .*is not symmetric int8 per token"):
        DynamicQuantizer(number_format=Integer(4, narrow=True))
