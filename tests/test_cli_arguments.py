# SPDX-License-Identifier: Apache-2.0
"""From words to a recipe: literals, types, names, files."""

import json
from typing import Literal

import pytest

from quattuor import cli_arguments
from quattuor.cli_arguments import build_recipe, describe_parameters, parse_settings, read_recipe
from quattuor.errors import InputError
from quattuor.recipe import Recipe
from quattuor.systems import qqq, rtn


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """Add a system with an argument of every kind."""

    def made_up(
        bits: int = 4,
        group_size: int | None = None,
        *,
        ratio: float = 0.5,
        limit: float | None = None,
        flag: bool = True,
        mode: Literal["none", "plain", 2] = "none",
        label: str = "x",
    ) -> Recipe:
        """Made up."""
        return Recipe(systems=("made_up",))

    monkeypatch.setitem(cli_arguments.SYSTEMS, "made_up", made_up)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bits=8", 8),
        ("group_size=None", None),
        ("group_size=null", None),
        ("group_size=64", 64),
        ("ratio=1", 1.0),
        ("ratio=1e-2", 0.01),
        ("limit=0.5", 0.5),
        ("flag=False", False),
        ("flag=false", False),
        ("mode=plain", "plain"),
        ("mode=none", "none"),
        ("mode=2", 2),
        ("label='3'", "3"),
        ("label=a=b", "a=b"),
    ],
)
def test_values_are_python_or_yaml_literals(setting, value):
    (parsed,) = parse_settings("made_up", [setting]).values()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bits=4.0", "bits=4.0 is float, not int"),
        ("bits=true", "bits=True is bool, not int"),
        ("group_size=none", "is str, not int or None"),
        ("ratio=half", "ratio=half is str, not float"),
        ("ratio=true", "ratio=True is bool, not float"),
        ("flag=1", "flag=1 is int, not bool"),
        ("mode=other", "not 'none' or 'plain' or 2; give 'none' or 'plain' or 2, for example mode=none"),
        ("mode=2.0", "mode=2.0 is float"),
        ("label=3", "label=3 is int, not str"),
        ("label=[1", "is neither a Python nor a YAML literal"),
        ("bitts=4", "did you mean bits?; keys with defaults: bits=4, group_size=None, ratio=0.5"),
        ("zzz=4", "use one of bits, group_size"),
        ("bits", "is not key=value"),
    ],
)
def test_wrong_settings_are_input_errors(setting, message):
    with pytest.raises(InputError) as error:
        parse_settings("made_up", [setting])
    assert message in str(error.value)


def test_a_key_twice_is_refused():
    with pytest.raises(InputError, match="sets bits a second time"):
        parse_settings("made_up", ["bits=4", "bits=8"])


def test_a_system_and_its_settings_make_its_recipe():
    assert build_recipe("qqq", ["group_size=64", "rotation=false"], None) == qqq(group_size=64, rotation=False)
    assert build_recipe("qqq", [], None, with_transforms=False).transforms == ()
    assert qqq().transforms != ()


def test_a_recipe_file_reads_back_in_yaml_and_json(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(qqq(group_size=64).to_dict()))
    assert read_recipe(path) == build_recipe(None, [], path) == qqq(group_size=64)
    path.write_text("rules:\n- part: Rule\n  pattern: '*.down_proj'\n  skip: true\n")
    combined = build_recipe("rtn", [], path)
    assert combined.weights == rtn().weights
    assert combined.rules[0].pattern == "*.down_proj"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "recipe=list is not a mapping"),
        ("a: [", "is not YAML"),
        ("weigths: null", "did you mean weights?"),
        ("weights: {part: WeightQuantiser}", "did you mean WeightQuantizer?"),
    ],
)
def test_files_that_hold_no_recipe_are_input_errors(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(path)
    assert message in str(error.value)


def test_both_ways_must_not_set_the_same_axis(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(qqq().to_dict()))
    with pytest.raises(InputError, match="is set by both"):
        build_recipe("rtn", [], path)
    with pytest.raises(InputError, match="add --system"):
        build_recipe(None, ["bits=4"], path)


def test_parameters_are_described_with_type_and_default():
    described = describe_parameters(cli_arguments.SYSTEMS["made_up"])
    assert described["group_size"] == {"type": "int or None", "default": None}
    assert described["mode"] == {"type": "'none' or 'plain' or 2", "default": "none"}
    assert describe_parameters(rtn)["bits"] == {"type": "int", "default": 4}
