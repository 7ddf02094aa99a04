# SPDX-License-Identifier: Apache-2.0
"""From the words of a command line to a recipe."""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from quattuor.errors import InputError, compose
from quattuor.recipe import Recipe
from quattuor.systems import SYSTEMS

__all__ = ["build_recipe", "describe_parameters", "parse_settings", "read_recipe", "system_named"]


def build_recipe(
    system: str | None, settings: Sequence[str], recipe_file: Path | None, *, with_transforms: bool = True
) -> Recipe:
    """Return the recipe of a system, of a file, or of both combined with `|`.

    Args:
        system: Name in `SYSTEMS`, or None.
        settings: "key=value" arguments of the system.
        recipe_file: YAML or JSON of `Recipe.to_dict`, or None.
        with_transforms: False drops all transforms, for an architecture without a description.

    Raises:
        InputError: Neither is given, a name is unknown, a value has the wrong type, or both set the same axis.
    """
    if system is None and recipe_file is None:
        raise _error(
            "system", None, "and --recipe are both missing", "--system", f"use one of {', '.join(SYSTEMS)}"
        )
    if system is None and settings:
        raise _error(
            "--set", settings[0], "needs a system that takes it", "--set", "add --system, or edit the recipe"
        )
    recipe = Recipe()
    if system is not None:
        recipe = system_named(system)(**parse_settings(system, settings))
    if recipe_file is not None:
        recipe = recipe | read_recipe(recipe_file)
    return recipe if with_transforms else dataclasses.replace(recipe, transforms=())


def system_named(name: str) -> Callable[..., Recipe]:
    """Return a system. Raises InputError with the nearest name."""
    if name not in SYSTEMS:
        raise _error("system", name, "is not a known system", "--system", _nearest(name, list(SYSTEMS)))
    return SYSTEMS[name]


def parse_settings(system: str, settings: Sequence[str]) -> dict[str, Any]:
    """Turn "key=value" words into arguments of a system, checked against its signature.

    Values are Python or YAML literals: 64, 0.01, None or null, True or true, plain words.

    Raises:
        InputError: A word without "=", a key twice, an unknown key or a value of another type.
    """
    function = system_named(system)
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    arguments: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise _error("--set", setting, "is not key=value", system, f"write {setting}=VALUE")
        if key in arguments:
            raise _error("--set", setting, f"sets {key} a second time", system, "give each key once")
        if key not in parameters:
            defaults = ", ".join(f"{name}={item.default}" for name, item in parameters.items())
            remedy = f"{_nearest(key, list(parameters))}; keys with defaults: {defaults}"
            raise _error("key", key, f"is not an argument of {system}", "--set", remedy)
        value = _literal(text, place=f"--set {setting}")
        if not _fits(value, hints[key]):
            wanted = _type_name(hints[key])
            remedy = f"give {wanted}, for example {key}={parameters[key].default}"
            raise _error(key, value, f"is {type(value).__name__}, not {wanted}", f"--set, {system}", remedy)
        arguments[key] = float(value) if hints[key] is float else value
    return arguments


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML or JSON file. Raises InputError when the file does not hold one."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _error(
            "recipe", str(path), f"cannot be read ({error.strerror})", "--recipe", "check the path"
        ) from error
    except yaml.YAMLError as error:
        summary = " ".join(str(error).split())
        raise _error("recipe", str(path), f"is not YAML ({summary})", "--recipe", "correct the file") from error
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise _error("recipe", kind, "is not a mapping", str(path), "start from the recipe in a report.json")
    return Recipe.from_dict(data)


def _literal(text: str, *, place: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass  # not Python: YAML reads plain words, true and null
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        remedy = "quote the value, for example key='text'"
        raise _error("value", text, "is neither a Python nor a YAML literal", place, remedy) from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type; an int serves as a float, a bool never as an int."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, member) for member in members)
    if origin is Literal:
        return any(type(value) is type(member) and value == member for member in members)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _type_name(hint: Any) -> str:
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_name(member) for member in members)
    if origin is Literal:
        return " or ".join(map(repr, members))
    return "None" if hint is types.NoneType else str(hint.__name__)


def _nearest(name: str, known: Sequence[str]) -> str:
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(known)}"


def describe_parameters(system: Callable[..., Recipe]) -> Mapping[str, dict[str, Any]]:
    """Return type and default of every argument of a system."""
    hints = typing.get_type_hints(system)
    parameters = inspect.signature(system).parameters
    return {
        name: {"type": _type_name(hints[name]), "default": parameter.default}
        for name, parameter in parameters.items()
    }


def _error(subject: str, value: object, constraint: str, place: str, remedy: str) -> InputError:
    return InputError(compose(subject=subject, value=value, constraint=constraint, place=place, remedy=remedy))
