# SPDX-License-Identifier: Apache-2.0
"""What every published system promises: a recipe that survives storage, from a short file named after it."""

import ast
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import quattuor.systems
from quattuor.errors import InputError
from quattuor.recipe import PARTS, Recipe
from quattuor.solvers import WeightQuantizer
from quattuor.systems import SYSTEMS

FOLDER = Path(quattuor.systems.__file__).parent

# Beside the defaults, which every system has: options that take each branch of a system.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "rtn": [
        *({"bits": bits, "group_size": size} for bits in range(2, 9) for size in (None, 32, 64, 128)),
        {"symmetric": False},
        {"group_size": None, "symmetric": False},
        *({"bits": bits, "activation_bits": 8} for bits in (2, 4, 8)),
        *({"bits": bits, "activation_bits": 8, "group_size": None} for bits in (2, 4, 8)),
    ],
    "qqq": [
        *({"bits": bits, "group_size": size} for bits in range(2, 8) for size in (None, 32, 64, 128)),
        {"bits": 8},
        {"bits": 8, "group_size": 128, "integer_group_scales": False},
        {"group_size": 64, "integer_group_scales": False, "choose_sign": False},
        {"choose_sign": False},
        {"rotation": False, "smoothing": True},
        {"rotation": True, "smoothing": True},
        {"rotation": False, "smoothing": False},
        *({"clip": clip} for clip in ("none", "plain", "weighted")),
        *({"inputs": inputs} for inputs in ("original", "quantized", "rounded")),
        {"sequential": True, "damping": 0.1},
    ],
    "awq": [
        *({"bits": bits, "group_size": size} for bits in range(2, 9) for size in (None, 32, 64)),
        {"clip": False},
        {"include_zero": False, "include_one": True},
        {"share_values": True, "max_sequences": 4},
    ],
    "quip": [
        *({"bits": bits} for bits in range(2, 9)),
        {"kind": "hadamard", "multiple": 2.0},
        {"order": "activation", "num_passes": 2, "multiple": None, "sequential": True},
        {"outputs": False},
        {"damping": 0.1},
    ],
    "gptq": [
        *({"bits": bits, "group_size": size} for bits in range(2, 9) for size in (None, 32, 64, 128)),
        *({"symmetric": symmetric, "clip": clip} for symmetric in (False, True) for clip in ("plain", "weighted")),
        {"symmetric": True},
        {"act_order": False, "groups": "fresh"},
        {"act_order": False, "groups": "stale"},
        {"groups": "fresh", "sequential": False, "damping": 0.1},
    ],
    "owq": [
        *({"bits": bits, "group_size": size} for bits in range(2, 9) for size in (None, 64)),
        {"bits": 4, "target_bits": 4.01},
        {"target_bits": 3.0},
        {"num_columns": 8, "weighted_by_error": False},
        *({"clip": clip} for clip in ("none", "plain")),
        {"act_order": True, "groups": "fresh", "group_size": 64, "sequential": True},
    ],
    "spqr": [
        *({"bits": bits, "group_size": size} for bits in range(2, 9) for size in (None, 8, 16, 64)),
        {"scale_bits": None, "zero_bits": None},
        {"scale_bits": 4, "zero_bits": 2, "row_group": 64},
        {"outlier_threshold": None},
        {"outlier_threshold": 1.0, "leave_one_out": False},
        {"act_order": False, "sequential": True, "damping": 0.01},
        {"groups": "static"},
    ],
    "squeezellm": [
        *({"bits": bits, "group_size": size} for bits in range(1, 9) for size in (None, 64)),
        {"sensitive_share": 0.0, "large_share": 0.0},
        {"large_share": 0.01, "exact": True},
    ],
    "lut_gemm": [
        *({"bits": bits, "group_size": size} for bits in range(1, 9) for size in (None, 32, 128)),
        {"rounds": 0},
        {"offset": False},
        {"uniform": True},
        *({"rounding": rounding} for rounding in ("weighted", "nearest")),
        {"sequential": False, "damping": 0.1},
    ],
}

HAVE_ONE_BIT = {"squeezellm", "lut_gemm"}

every_system = pytest.mark.parametrize("name", SYSTEMS)
every_recipe = pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in SYSTEMS for options in ({}, *VARIANTS.get(name, []))],
    ids=lambda value: (
        value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "default"
    ),
)


@every_recipe
def test_round_trip_through_json_and_yaml(name: str, options: dict[str, Any]) -> None:
    recipe = SYSTEMS[name](**options)
    assert recipe.systems == (name,)
    stored = json.dumps(recipe.to_dict())
    assert Recipe.from_dict(json.loads(stored)) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert json.dumps(Recipe.from_dict(json.loads(stored)).to_dict()) == stored


@every_recipe
def test_options_reach_the_recipe(name: str, options: dict[str, Any]) -> None:
    recipe = SYSTEMS[name](**options)
    assert isinstance(recipe.weights, WeightQuantizer)
    if "bits" in options:
        assert recipe.weights.number_format.bits == options["bits"]
    if "group_size" in options:
        assert recipe.weights.granularity.num_groups(768) == 768 // (options["group_size"] or 768)
    defaults = {key: item.default for key, item in inspect.signature(SYSTEMS[name]).parameters.items()}
    if any(defaults[key] != value for key, value in options.items()):
        # integer group scales have no meaning per channel, and only there may an option change nothing
        assert recipe != SYSTEMS[name]()


@every_system
def test_every_documented_option_exists(name: str) -> None:
    system = SYSTEMS[name]
    documented = inspect.getdoc(system)
    assert documented is not None
    assert "References" in documented or name == "rtn"
    for option, parameter in inspect.signature(system).parameters.items():
        assert f"\n    {option}: " in documented, option
        assert parameter.default is not parameter.empty, "a system runs without arguments"
        assert parameter.kind is not parameter.VAR_KEYWORD
    assert set(VARIANTS) == set(SYSTEMS), "give a new system its variants here"


@every_system
def test_file_is_named_after_the_system_and_only_composes(name: str) -> None:
    file = FOLDER / f"{name}.py"
    text = file.read_text()
    assert SYSTEMS[name].__name__ == name
    assert SYSTEMS[name].__module__ == f"quattuor.systems.{name}"
    assert len(text.splitlines()) <= 100
    tree = ast.parse(text)
    loops = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    assert not [node for node in ast.walk(tree) if isinstance(node, loops)]
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(module and module.split(".")[0] == "torch" for module in imported)


def test_table_holds_every_file() -> None:
    assert set(SYSTEMS) == {file.stem for file in FOLDER.glob("*.py")} - {"__init__"}
    assert set(SYSTEMS) <= set(quattuor.systems.__all__)


@every_system
def test_calls_do_not_share_state(name: str) -> None:
    assert SYSTEMS[name]() == SYSTEMS[name]()
    with pytest.raises(dataclasses.FrozenInstanceError):
        SYSTEMS[name]().inputs = "original"


@every_system
@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -64}], ids=str)
def test_values_that_do_not_exist(name: str, options: dict[str, Any]) -> None:
    if options == {"bits": 1} and name in HAVE_ONE_BIT:
        options = {"bits": 0}
    if options.keys() - inspect.signature(SYSTEMS[name]).parameters.keys():
        pytest.skip(f"{name} has no such option")
    with pytest.raises(InputError, match=r": (bits|group_size)=.* is not .*; "):
        SYSTEMS[name](**options)


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_frozen_data_under_its_own_name(name: str) -> None:
    part = PARTS[name]
    assert part.__name__ == name
    assert dataclasses.is_dataclass(part)
    assert part.__dataclass_params__.frozen
    assert part.__dataclass_params__.eq
