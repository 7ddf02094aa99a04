# SPDX-License-Identifier: Apache-2.0
"""The layout "pack-quantized" of compressed-tensors, which stock vLLM and transformers read.

For the weight [N, K] of a linear, G groups:

    weight_packed  int32 [N, K * bits / 32]   words along K of code + 2^(bits-1)
    weight_scale   [N, G]                     in the dtype of the model
    weight_shape   int64 [2]                  N, K

`config.json` groups linears with equal settings; the format stands inside each group. "int-quantized" (int8 codes
in `weight`) is read as well.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quattuor.activations import ActivationQuantizer, DynamicQuantizer
from quattuor.checkpoints.foreign import ForeignLayout, Grid, Settings, damaged, refused, require
from quattuor.checkpoints.int32_words import codes_per_word, pack_words, unpack_words
from quattuor.checkpoints.tensors import TensorStore
from quattuor.formats import Integer, Parameters
from quattuor.granularity import PerChannel, PerGroup
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["CompressedTensors"]

_PACKED, _NAIVE = "pack-quantized", "int-quantized"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class CompressedTensors(ForeignLayout):
    """Symmetric integers per channel or group; activations in floating point, or int8 per token."""

    @property
    def name(self) -> str:
        """Its `quant_method`."""
        return "compressed-tensors"

    @property
    def leaves(self) -> tuple[str, ...]:
        """Last parts of the names of every tensor that belongs to a packed weight."""
        return "weight_packed", "weight_scale", "weight_shape", "weight", "weight_zero_point", "weight_g_idx"

    def scale_dtype(self, dense: torch.dtype) -> torch.dtype:
        """Return the model's own dtype: readers create the scale in it."""
        return dense

    def refuses(self, grid: Grid, activations: ActivationQuantizer | None) -> str | None:
        """Return why a weight does not fit."""
        if grid.bits not in (4, 8):
            return f"has {grid.bits} bits; kernels read 4 and 8"
        if grid.zero_point is not None:
            return "has zero points; this layout is written for symmetric weights"
        if grid.codes.shape[1] % codes_per_word(grid.bits):
            return (
                f"has in_features={grid.codes.shape[1]}, no multiple of the {codes_per_word(grid.bits)} of a word"
            )
        if activations not in (None, DynamicQuantizer()):
            return f"has activations {activations}; the layout knows int8 per token, or none"
        return None

    def encode(self, grid: Grid, scale: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a weight."""
        unsigned = grid.codes + 2 ** (grid.bits - 1)
        return {
            "weight_packed": pack_words(unsigned, grid.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(grid.codes.shape, dtype=torch.int64),
        }

    def settings(
        self, grids: Mapping[str, Grid], activations: Mapping[str, ActivationQuantizer | None], others: list[str]
    ) -> dict[str, Any]:
        """Return one group for each distinct choice; a single one is for all linears that are not ignored."""
        members: dict[tuple[int, int | None, bool], list[str]] = {}
        for name, grid in grids.items():
            members.setdefault((grid.bits, grid.group_size, activations[name] is not None), []).append(name)
        groups = {}
        for index, ((bits, group_size, is_integer), names) in enumerate(members.items()):
            weights = _side(bits, "channel" if group_size is None else "group", dynamic=False)
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if len(members) == 1 else names,
                "weights": weights | {"group_size": group_size},
                "input_activations": _side(8, "token", dynamic=True) if is_integer else None,
                "output_activations": None,
                "format": _PACKED,
            }
        return {
            "quant_method": self.name,
            "format": _PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": others,
            "kv_cache_scheme": None,
        }

    def linears(self, store: TensorStore) -> list[str]:
        """Return the packed linears: those with a scale."""
        return sorted(
            name.removesuffix(".weight_scale") for name in store.names() if name.endswith(".weight_scale")
        )

    def decode(
        self, name: str, store: TensorStore, settings: Settings
    ) -> tuple[QuantizedTensor, ActivationQuantizer | None]:
        """Read one weight."""
        group = _group_of(name, settings)
        weights = group.get("weights") or {}
        bits, group_size = int(weights.get("num_bits", 8)), weights.get("group_size")
        _check_weights(name, weights, store)
        codes = _read_codes(name, store, bits, group.get("format") or settings.get("format"))
        is_grouped = weights.get("strategy") == "group"
        granularity = PerGroup(int(group_size)) if is_grouped and group_size else PerChannel()
        wanted = (codes.shape[0], granularity.num_groups(codes.shape[1]))
        scale = require(store, f"{name}.weight_scale", _FLOATS, wanted)
        scale = scale.float() if scale.dtype == torch.bfloat16 else scale
        tensor = QuantizedTensor.from_codes(codes, Parameters(scale=scale), Integer(bits), granularity)
        return tensor, _read_activations(name, group.get("input_activations"))


def _side(bits: int, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


def _group_of(name: str, settings: Settings) -> Mapping[str, Any]:
    """Return the settings of a linear: by its name or a pattern first, then by its class."""
    groups: Mapping[str, Mapping[str, Any]] = settings.get("config_groups", {})
    for matches in (lambda target: _names(target, name), lambda target: target == "Linear"):
        for group in groups.values():
            if any(matches(target) for target in group.get("targets", [])):
                return group
    raise damaged(name, "packed", "is in no group of quantization_config.config_groups", "config.json")


def _names(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _check_weights(name: str, weights: Mapping[str, Any], store: TensorStore) -> None:
    """Refuse weights that are no symmetric integers in their own order."""
    strategy = weights.get("strategy")
    checks = {
        f"type {weights.get('type')}": weights.get("type", "int") == "int",
        "zero points": bool(weights.get("symmetric", True)),
        f"strategy {strategy}": strategy in ("channel", "group"),
        "a column order (weight_g_idx)": f"{name}.weight_g_idx" not in store.names(),
    }
    for what, holds in checks.items():
        if not holds:
            raise refused("compressed-tensors", name, f"has {what}, which is not read")


def _read_codes(name: str, store: TensorStore, bits: int, form: object) -> Tensor:
    if form == _NAIVE:
        return require(store, f"{name}.weight", (torch.int8,))
    if form != _PACKED:
        raise refused("compressed-tensors", name, f"is stored as {form}, neither {_PACKED} nor {_NAIVE}")
    shape = require(store, f"{name}.weight_shape", (torch.int64, torch.int32), (2,)).tolist()
    per_word = codes_per_word(bits)
    words = require(store, f"{name}.weight_packed", (torch.int32,), (shape[0], -(-shape[1] // per_word)))
    codes: Tensor = unpack_words(words, bits)[:, : shape[1]] - 2 ** (bits - 1)
    return codes.to(torch.int8)


def _read_activations(name: str, side: Mapping[str, Any] | None) -> ActivationQuantizer | None:
    if side is None:
        return None
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    different = {key: side.get(key) for key, value in wanted.items() if side.get(key) != value}
    if different:
        raise refused("compressed-tensors", name, f"has activations with {different}; int8 per token are read")
    return DynamicQuantizer()
