# SPDX-License-Identifier: Apache-2.0
"""A recipe: one choice per axis, as a value that can be stored, compared, changed and combined."""

import dataclasses
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from quattuor.activations import ActivationQuantizer, DynamicQuantizer
from quattuor.errors import InputError, compose
from quattuor.formats import (
    BilevelInteger,
    BinaryCoding,
    Codebook,
    Integer,
    MidRise,
    TwoLevelInteger,
)
from quattuor.granularity import PerChannel, PerGroup, PerTensor, PerToken
from quattuor.outliers import (
    ErrorThreshold,
    SensitiveAndLarge,
    WeakColumns,
)
from quattuor.rules import Rule
from quattuor.scales import (
    AbsMax,
    Alternating,
    Bilevel,
    ClipSearch,
    MinMax,
    OutputClip,
    RootMeanSquare,
    TwoLevel,
    UniformPlanes,
    WeightedKMeans,
    WindowSearch,
)
from quattuor.solvers import (
    GPTQ,
    OBQ,
    CoordinateDescent,
    Nearest,
    TargetCorrection,
    WeightQuantizer,
)
from quattuor.transforms import TRANSFORMS, Incoherence
from quattuor.transforms.base import Transform

__all__ = ["PARTS", "InputPolicy", "Recipe", "part_from_dict", "part_to_dict"]

InputPolicy = Literal["original", "quantized", "rounded"]
INPUT_POLICIES = ("original", "quantized", "rounded")

_PART_TYPES: tuple[type, ...] = (
    *(BinaryCoding, Codebook, Integer, MidRise, TwoLevelInteger),
    *(PerTensor, PerChannel, PerGroup, PerToken),
    *(AbsMax, ClipSearch, MinMax, OutputClip, RootMeanSquare, TwoLevel),
    *(Alternating, UniformPlanes, WeightedKMeans),
    SensitiveAndLarge,
    *(GPTQ, CoordinateDescent, Nearest, TargetCorrection, WeightQuantizer),
    *(BilevelInteger, Bilevel, WindowSearch, OBQ, ErrorThreshold, WeakColumns),
    DynamicQuantizer,
    Rule,
    *TRANSFORMS,
    Incoherence,
)
PARTS: dict[str, type] = {part.__name__: part for part in _PART_TYPES}
"""Every part that a stored recipe may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is done to a model. Never changed by being run; variants are `dataclasses.replace` of a recipe.

    Args:
        systems: Names of the systems it was made from, for reports; no effect on the result.
        transforms: Function-preserving changes, applied in order.
        weights: How every linear inside the decoder blocks is quantized; None leaves weights alone.
        activations: How the inputs of those linears are quantized at run time; None leaves them alone.
        rules: Exceptions per module pattern, first match wins.
        inputs: What statistics are computed from: the "original" model's activations, those of the "quantized"
            blocks so far, or the latter "rounded" by the activation quantizer as the layer will see them.
        sequential: Collect the statistics of each site with the earlier sites of the same block already
            quantized, instead of all sites of a block at once.
    """

    systems: tuple[str, ...] = ()
    transforms: tuple[Transform, ...] = ()
    weights: WeightQuantizer | None = None
    activations: ActivationQuantizer | None = None
    rules: tuple[Rule, ...] = field(default=())
    inputs: InputPolicy = "quantized"
    sequential: bool = False

    def __post_init__(self) -> None:
        """Reject policies that do not exist and combinations without meaning."""
        if self.inputs not in INPUT_POLICIES:
            raise InputError(
                compose(
                    subject="inputs",
                    value=self.inputs,
                    constraint=f"is not one of {INPUT_POLICIES}",
                    place="Recipe",
                    remedy='use inputs="quantized"',
                )
            )
        if self.inputs == "rounded" and self.activations is None:
            raise InputError(
                compose(
                    subject="inputs",
                    value=self.inputs,
                    constraint="needs an activation quantizer to round with",
                    place="Recipe",
                    remedy='set activations, or use inputs="quantized"',
                )
            )
        if self.activations is not None and self.weights is None:
            raise InputError(
                compose(
                    subject="activations",
                    value=self.activations,
                    constraint="would be quantized for linears that stay in high precision",
                    place="Recipe",
                    remedy="set weights as well, for example 8-bit ones",
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that the weights of some linear need."""
        quantizers = (self.weights, *(rule.weights for rule in self.rules))
        return frozenset[str]().union(*(weights.needs for weights in quantizers if weights is not None))

    def __or__(self, other: "Recipe") -> "Recipe":
        """Combine two recipes; an axis that both set to different values is a conflict."""
        if not isinstance(other, Recipe):
            return NotImplemented
        default = Recipe()
        merged: dict[str, Any] = {"systems": self.systems + other.systems}
        for axis in ("transforms", "weights", "activations", "rules", "inputs", "sequential"):
            mine, theirs, unset = getattr(self, axis), getattr(other, axis), getattr(default, axis)
            if mine != unset and theirs != unset and mine != theirs:
                raise InputError(
                    compose(
                        subject="axis",
                        value=axis,
                        constraint=f"is set by both {_label(self)} and {_label(other)}",
                        place="Recipe |",
                        remedy=f"clear it on one side with dataclasses.replace(recipe, {axis}=...)",
                    )
                )
            merged[axis] = mine if mine != unset else theirs
        return Recipe(**merged)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (JSON or YAML) that `from_dict` turns back into an equal recipe."""
        return {item.name: part_to_dict(getattr(self, item.name)) for item in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """Undo `to_dict`.

        Raises:
            InputError: An unknown key or part, with the nearest name that exists, or a value a part refuses.
        """
        if not isinstance(data, dict):
            raise InputError(
                compose(
                    subject="recipe",
                    value=repr(data),
                    constraint="is not a mapping",
                    place="Recipe",
                    remedy=f"write its fields as keys: {', '.join(item.name for item in dataclasses.fields(cls))}",
                )
            )
        return cast(Recipe, _build(cls, data, "Recipe"))


def _label(recipe: Recipe) -> str:
    return " | ".join(recipe.systems) or "an unnamed recipe"


def part_to_dict(value: Any) -> Any:
    """Turn a part into {"part": its name, field: value, ...}; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: part_to_dict(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {"part": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [part_to_dict(item) for item in value]
    return value


def part_from_dict(value: Any, place: str) -> Any:
    """Undo `part_to_dict`."""
    if isinstance(value, list):
        return tuple(part_from_dict(item, f"{place}[{index}]") for index, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    name = value.get("part")
    if not isinstance(name, str) or name not in PARTS:
        nearest = get_close_matches(str(name), PARTS, n=1)
        raise InputError(
            compose(
                subject="part",
                value=name,
                constraint="is not a known part",
                place=place,
                remedy=f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(sorted(PARTS))}",
            )
        )
    arguments = {key: item for key, item in value.items() if key != "part"}
    return _build(PARTS[name], arguments, f"{place} ({name})")


def _build(part: type, arguments: dict[str, Any], place: str) -> Any:
    """Construct a part from plain data whose names and types are checked against its fields."""
    fields = {item.name: item for item in dataclasses.fields(part)}
    _reject_unknown(arguments, fields, place)
    _reject_missing(arguments, fields, place)
    hints = get_type_hints(part)
    values = {key: part_from_dict(item, f"{place}.{key}") for key, item in arguments.items()}
    for key, value in values.items():
        if not _accepts(hints[key], value):
            wanted = (
                hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).replace("typing.", "")
            )
            raise InputError(
                compose(
                    subject=key,
                    value=repr(value),
                    constraint=f"is not of type {wanted}",
                    place=place,
                    remedy="correct its value in the recipe",
                )
            )
    return part(**values)


def _accepts(hint: Any, value: Any) -> bool:
    """Tell whether a value has the type of a field; an integer also is a float, a bool is neither."""
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return value in options
    if get_origin(hint) in (Union, UnionType):
        return any(_accepts(option, value) for option in options)
    if get_origin(hint) is tuple:
        kinds = (
            [options[0]] * len(value) if isinstance(value, tuple) and options[-1] is Ellipsis else list(options)
        )
        return (
            isinstance(value, tuple)
            and len(value) == len(kinds)
            and all(_accepts(kind, item) for kind, item in zip(kinds, value, strict=True))
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _reject_missing(given: dict[str, Any], fields: dict[str, Any], place: str) -> None:
    required = [
        name
        for name, item in fields.items()
        # A field that implements an abstract property inherits the property as if it were its default.
        if isinstance(item.default, property)
        or (item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING)
    ]
    missing = [name for name in required if name not in given]
    if missing:
        raise InputError(
            compose(
                subject="key",
                value=missing[0],
                constraint="is missing",
                place=place,
                remedy=f"give a value for {' and '.join(missing)}",
            )
        )


def _reject_unknown(given: dict[str, Any], known: dict[str, Any], place: str) -> None:
    for key in given:
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1)
            raise InputError(
                compose(
                    subject="key",
                    value=key,
                    constraint="is not a field",
                    place=place,
                    remedy=f"did you mean {nearest[0]}?" if nearest else f"use one of {', '.join(known)}",
                )
            )
