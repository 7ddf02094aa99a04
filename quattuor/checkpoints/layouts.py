# SPDX-License-Identifier: Apache-2.0
"""The `quantization_config` of a checkpoint: which module has which layout, as plain data.

{"quant_method": "quattuor", "format_version": 1, "recipe": {...},
 "layouts": [layout, ...], "modules": {module name: index into layouts}}

layout = {"number_format": part, "granularity": part, "activations": part or null,
          "parameters": [{"name": "scale", "dtype": "float32", "per_group": true}, ...],
          "extras": [{"role": "delta", "kind": "ColumnDelta", "name": "indices",
                      "dtype": "int32", "shape": [2]}, ...]}

Fields with their default value, and `extras` where there are none, are left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from quattuor.errors import CheckpointError, InputError, UnsupportedError, compose
from quattuor.nn.layout import ExtraLayout, LinearLayout, ParameterLayout
from quattuor.recipe import Recipe, part_from_dict, part_to_dict

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "check_version",
    "expected_bytes",
    "layout_from_dict",
    "layout_to_dict",
    "quantization_config",
    "read_layouts",
    "stored_names",
]

QUANT_METHOD = "quattuor"
FORMAT_VERSION = 1


def stored_names(name: str, layout: LinearLayout) -> tuple[str, ...]:
    """Return the full names of the tensors of a packed weight, without its bias."""
    return tuple(f"{name}.{leaf}" for leaf in layout.tensor_names)


def expected_bytes(layout: LinearLayout, out_features: int, in_features: int) -> int:
    """Bytes that the packed weight of one linear takes on disk, without its bias.

    N * ceil(K * b / 8)  +  sum over parameters of  R * (G or 1) * bytes of the parameter's dtype
    """
    state = layout.empty_state(out_features, in_features, "meta")
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def layout_to_dict(layout: LinearLayout) -> dict[str, Any]:
    """Return a layout as plain data."""
    return {
        "number_format": part_to_dict(layout.number_format),
        "granularity": part_to_dict(layout.granularity),
        "activations": part_to_dict(layout.activations),
        "parameters": [_changed_fields(item) for item in layout.parameters],
        **({"extras": [_changed_fields(item) for item in layout.extras]} if layout.extras else {}),
    }


def _changed_fields(item: ParameterLayout | ExtraLayout) -> dict[str, Any]:
    """Return the fields that have no default or another value; tuples become lists."""
    values = {field.name: (getattr(item, field.name), field.default) for field in dataclasses.fields(item)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in values.items()
        if value != default
    }


def _with_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def layout_from_dict(data: Mapping[str, Any], place: str) -> LinearLayout:
    """Undo `layout_to_dict`.

    Raises:
        CheckpointError: A key is missing or a part is refused.
    """
    try:
        return LinearLayout(
            number_format=part_from_dict(data["number_format"], f"{place}.number_format"),
            granularity=part_from_dict(data["granularity"], f"{place}.granularity"),
            activations=part_from_dict(data["activations"], f"{place}.activations"),
            parameters=tuple(ParameterLayout(**_with_tuples(item)) for item in data["parameters"]),
            extras=tuple(ExtraLayout(**_with_tuples(item)) for item in data.get("extras", ())),
        )
    except (KeyError, TypeError, InputError) as error:
        raise CheckpointError(
            compose(
                subject="layout",
                value=dict(data),
                constraint=f"cannot be read: {error}",
                place=place,
                remedy="write the checkpoint again, or update quattuor",
            )
        ) from error


def quantization_config(layouts: Mapping[str, LinearLayout], recipe: Recipe) -> dict[str, Any]:
    """Return the plain data that `config.json` stores; equal layouts are stored once."""
    distinct = list(dict.fromkeys(layouts.values()))
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": recipe.to_dict(),
        "layouts": [layout_to_dict(layout) for layout in distinct],
        "modules": {name: distinct.index(layout) for name, layout in layouts.items()},
    }


def check_version(version: object, place: str) -> None:
    """Refuse a format that this version cannot read.

    Raises:
        UnsupportedError: The version is newer, or no version at all.
    """
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UnsupportedError(
            compose(
                subject="format_version",
                value=version,
                constraint=f"is not one of 1..{FORMAT_VERSION}, which this version of quattuor reads",
                place=place,
                remedy="update quattuor, or quantize the model again",
            )
        )


def read_layouts(config: Any) -> dict[str, LinearLayout]:
    """Return the layout of every quantized module.

    Args:
        config: A model's configuration, its dictionary, or the `quantization_config` inside it.

    Raises:
        CheckpointError: There is no Quattuor quantization, or it is damaged.
        UnsupportedError: It was written in a newer format.
    """
    data = config if isinstance(config, Mapping) else config.to_dict()
    if "quantization_config" in data:
        data = data["quantization_config"]
    data = data if isinstance(data, Mapping) else data.to_dict()
    if data.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            compose(
                subject="quant_method",
                value=data.get("quant_method"),
                constraint=f"is not {QUANT_METHOD!r}",
                place="config.json",
                remedy="open a folder that quattuor wrote",
            )
        )
    check_version(data.get("format_version"), "config.json")
    layouts = [
        layout_from_dict(item, f"config.json: layouts[{index}]") for index, item in enumerate(data["layouts"])
    ]
    modules: Mapping[str, Any] = data["modules"]
    for name, index in modules.items():
        if not isinstance(index, int) or not 0 <= index < len(layouts):
            raise CheckpointError(
                compose(
                    subject="layout index",
                    value=index,
                    constraint=f"of {name} is not one of the {len(layouts)} layouts",
                    place="config.json",
                    remedy="write the checkpoint again",
                )
            )
    return {name: layouts[index] for name, index in modules.items()}
