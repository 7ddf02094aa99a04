# SPDX-License-Identifier: Apache-2.0
"""The schema of a run: everything that a report shows, as values that JSON keeps exactly."""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quattuor.errors import InputError, compose
from quattuor.evaluation.generation import GenerationResult
from quattuor.evaluation.perplexity import PerplexityResult
from quattuor.quantization_report import LayerReport, QuantizationReport
from quattuor.reports.environment import hardware, versions
from quattuor.reports.files import write_text_atomically

__all__ = [
    "Calibration",
    "Evaluation",
    "Generation",
    "RunResult",
    "Verification",
    "format_bytes",
    "mean_bits_per_weight",
    "now",
    "site_errors",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The text that statistics were computed from.

    Args:
        source: Name or path, as `load_text` takes it.
        num_samples: Windows of text.
        length: Tokens of a window.
        seed: Of the places of the windows.
        num_tokens: num_samples * length.
    """

    source: str
    num_samples: int
    length: int
    seed: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Metrics of one model on one text.

    Args:
        label: Which model: "original" or "quantized".
        source: Name or path of the text, as `load_text` takes it.
        perplexity: The measured perplexity.
    """

    label: str
    source: str
    perplexity: PerplexityResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A text that one model wrote.

    Args:
        label: Which model: "original" or "quantized".
        result: Prompt, text and speed.
    """

    label: str
    result: GenerationResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was checked in a checkpoint on disk; a check that fails raises instead of being listed.

    Args:
        folder: The checkpoint.
        num_tensors: Rows of the verification: packed linears and other tensors.
        checks: How many rows passed each kind of check.
        size_bytes: All files of the folder.
    """

    folder: str
    num_tensors: int
    checks: dict[str, int]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run of a command.

    Args:
        command: Which command: "quantize", "evaluate", "generate" or "demo".
        date: Start of the run, UTC, ISO 8601.
        model: What was read: a folder, a hub id or a file.
        model_name: Its short name.
        output: The folder that was written; None when nothing was.
        recipe: `Recipe.to_dict` of what was done; None when nothing was quantized.
        device: Where blocks were computed.
        hardware: `environment.hardware()`.
        versions: `environment.versions()`.
        calibration: The text behind the statistics; None when nothing was quantized.
        quantization: Each layer's format, error and seconds, seconds by phase, peak memory.
        verification: What was checked on disk.
        evaluations: One per model and text.
        generations: One per model and prompt.
        warnings: What a reader must know to read the numbers rightly.
    """

    command: str
    date: str
    model: str
    model_name: str
    output: str | None = None
    recipe: dict[str, Any] | None = None
    device: str = "cpu"
    hardware: dict[str, str | int] = dataclasses.field(default_factory=hardware)
    versions: dict[str, str] = dataclasses.field(default_factory=versions)
    calibration: Calibration | None = None
    quantization: QuantizationReport | None = None
    verification: Verification | None = None
    evaluations: tuple[Evaluation, ...] = ()
    generations: tuple[Generation, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def systems(self) -> tuple[str, ...]:
        """Names of the systems behind the recipe; empty when nothing was quantized or the recipe has no name."""
        return tuple((self.recipe or {}).get("systems", ()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `from_dict` turns back into an equal result."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RunResult":
        """Undo `to_dict`.

        Raises:
            InputError: A field is missing, unknown or of another type; the message says where.
        """
        return typing.cast(RunResult, _build(cls, data, "result"))

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunResult":
        """Undo `to_json`.

        Raises:
            InputError: The text is not JSON, or not of this schema.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise _mismatch("text", text[:40], f"is not JSON ({error})", "result") from error
        return cls.from_dict(data)

    def write(self, path: Path) -> None:
        """Write the JSON text to a file, as a whole or not at all."""
        write_text_atomically(path, self.to_json())


def now() -> str:
    """Return the time as `RunResult.date` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def site_errors(layers: Sequence[LayerReport]) -> dict[str, float]:
    """Return the mean relative error of the linears that share a last name, such as "down_proj"."""
    by_site: dict[str, list[float]] = {}
    for layer in layers:
        by_site.setdefault(layer.name.rpartition(".")[2], []).append(layer.error)
    return {site: sum(errors) / len(errors) for site, errors in by_site.items()}


def mean_bits_per_weight(layers: Sequence[LayerReport]) -> float:
    """Return the bits of all packed linears divided by their weights."""
    return sum(item.bits_per_weight * item.num_weights for item in layers) / sum(
        item.num_weights for item in layers
    )


def format_bytes(count: int) -> str:
    """Return a size for people, in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _build(hint: Any, data: Any, place: str) -> Any:
    """Turn plain data into a value of an annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        return _build_union(arguments, data, place)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build_dataclass(hint, data, place)
    if origin in (tuple, list) and isinstance(data, list | tuple):
        return origin(_build(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _build(arguments[1], item, f"{place}.{key}") for key, item in data.items()}
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(hint, type) and isinstance(data, hint) and (hint is bool or not isinstance(data, bool)):
        return data
    raise _mismatch(place.rpartition(".")[2], data, f"is not {_type_name(hint)}", place)


def _build_union(members: tuple[Any, ...], data: Any, place: str) -> Any:
    if data is None and type(None) in members:
        return None
    others = [member for member in members if member is not type(None)]
    if len(others) == 1:
        return _build(others[0], data, place)
    exact = next((member for member in others if type(data) is member), None)
    if exact is None:
        raise _mismatch(place.rpartition(".")[2], data, f"is not {' or '.join(map(_type_name, others))}", place)
    return data


def _build_dataclass(cls: type[Any], data: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise _mismatch(place.rpartition(".")[2], data, f"is not an object of {cls.__name__}", place)
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for key in (*data, *fields):
        if key not in fields or key not in data:
            constraint = "is missing" if key in fields else f"is no field of {cls.__name__}"
            raise _mismatch("field", key, constraint, place)
    return cls(**{key: _build(hint, data[key], f"{place}.{key}") for key, hint in fields.items()})


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _mismatch(subject: str, value: object, constraint: str, place: str) -> InputError:
    remedy = "read a report that this version of Quattuor wrote"
    return InputError(compose(subject=subject, value=value, constraint=constraint, place=place, remedy=remedy))
