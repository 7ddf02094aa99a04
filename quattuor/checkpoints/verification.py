# SPDX-License-Identifier: Apache-2.0
"""Checks that a checkpoint holds what it promises, and shows what it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from quattuor.checkpoints.behaviour import divergence_from
from quattuor.checkpoints.layouts import read_layouts
from quattuor.checkpoints.manifest import read_manifest
from quattuor.checkpoints.skeleton import expected_tensors, quantized_linears, quantized_skeleton
from quattuor.checkpoints.source import ModelSource
from quattuor.checkpoints.tensors import SafetensorsStore
from quattuor.checkpoints.writing import sha256
from quattuor.errors import CheckpointError, compose
from quattuor.formats.two_level import TwoLevelInteger
from quattuor.nn.linear import QuantizedLinear
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.recipe import Recipe
from quattuor.solvers import Nearest

__all__ = ["LayerRow", "VerifiedRow", "inspect", "verify"]

BEHAVIOUR = "(logits)"
"""Name of the row that is about no tensor."""

_LARGEST_SHARE = 0.5
"""Of KL(original || uniform). On SmolLM2-135M: 4 bits reach 0.03, 3 bits 0.2, lost rotations 1.0 to 1.7."""

_GRID_SLACK = 1e-5
"""Relative rounding of float32 arithmetic when the nearest representable number is computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRow:
    """What was checked about one packed linear or one other tensor; a failed check raises instead."""

    name: str
    checks: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One packed linear: what it is, what it takes on disk, and how far it is from the original when known."""

    name: str
    out_features: int
    in_features: int
    format: str
    granularity: str
    activations: str | None
    bits_per_weight: float
    error: float | None


def inspect(folder: str | Path) -> list[LayerRow]:
    """List the packed linears of a checkpoint; bits per weight are measured from the files' headers.

    Raises:
        CheckpointError: The folder is not a whole native checkpoint.
    """
    folder = Path(folder)
    errors = {row["name"]: row["error"] for row in read_manifest(folder)["layers"]}
    config = AutoConfig.from_pretrained(folder)
    store = SafetensorsStore(folder)
    rows = []
    for name, module in quantized_linears(quantized_skeleton(config, read_layouts(config))).items():
        nbytes = 0
        for leaf in module.layout.tensor_names:
            full = f"{name}.{leaf}"
            _require(full in store.names(), full, "missing", "is not stored", folder)
            nbytes += torch.empty(store.shape(full), dtype=store.dtype(full), device="meta").nbytes
        layout = module.layout
        rows.append(
            LayerRow(
                name=name,
                out_features=module.out_features,
                in_features=module.in_features,
                format=str(layout.number_format),
                granularity=str(layout.granularity),
                activations=None if layout.activations is None else str(layout.activations),
                bits_per_weight=8 * nbytes / (module.out_features * module.in_features),
                error=errors.get(name),
            )
        )
    return rows


def verify(folder: str | Path, against: ModelSource | None = None) -> list[VerifiedRow]:
    """Check every tensor of a native checkpoint.

    Always: presence, shape, dtype and SHA-256 against the manifest and the model; codes within the format's range;
    scales finite and not zero; on the two-level grid code * group_scale within int8, beyond which kernels wrap.

    With `against`, the original model. A recipe without transforms leaves the dense tensors as they were, and
    every weight rounded to nearest must be as close as its grid allows: |W - decode| <= |W - fake_quantize(W)|.
    A solver that compensates errors may move single weights further, so the relative error of the whole matrix is
    reported and must stay below 1, which is what zeros would reach.

    Transforms change the weights themselves; then only names and shapes are compared tensor by tensor, and the
    rows say so. Instead both models read a short text, and the last row reports KL(original || checkpoint). It
    must stay below half of KL(original || uniform). A head or an embedding that did not absorb a rotation leaves a
    model that knows nothing or worse, and reaches the whole of it; rounding to 3 bits stays below.

    Raises:
        CheckpointError: The first check that fails, with the tensor's name.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    manifest = read_manifest(folder)
    model = quantized_skeleton(config, read_layouts(config))
    store = SafetensorsStore(folder)
    _check_names(set(expected_tensors(model)), set(manifest["tensors"]), set(store.names()), folder)
    recipe = Recipe.from_dict(config.quantization_config["recipe"])
    linears = quantized_linears(model)
    rows, packed = [], set()
    for name, module in linears.items():
        state = {leaf: f"{name}.{leaf}" for leaf in module.layout.tensor_names}
        packed |= set(state.values())
        tensors = {
            leaf: _check_stored(store, full, manifest["tensors"][full], module.get_buffer(leaf), folder)
            for leaf, full in state.items()
        }
        rows.append(_check_linear(name, module, tensors, recipe, against, folder))
    reference = model.state_dict()
    for name in sorted(store.names() - packed):
        tensor = _check_stored(store, name, manifest["tensors"][name], None, folder)
        expected = tuple(reference[name].shape)
        _require(tuple(tensor.shape) == expected, name, tuple(tensor.shape), f"is not {expected}", folder)
        rows.append(_check_dense(name, tensor, recipe, against, folder))
    if against is not None and recipe.transforms:
        rows.append(_check_behaviour(against, folder))
    return rows


def _require(holds: bool, subject: str, value: object, constraint: str, folder: Path) -> None:
    if not holds:
        raise CheckpointError(
            compose(
                subject=subject,
                value=value,
                constraint=constraint,
                place=str(folder),
                remedy="download or write the checkpoint again; do not use it",
            )
        )


def _check_names(expected: set[str], promised: set[str], stored: set[str], folder: Path) -> None:
    for name in sorted(expected | promised | stored):
        _require(name in stored, name, "missing", "is not stored", folder)
        _require(name in promised, name, "unknown", "is not in the manifest", folder)
        _require(name in expected, name, "unknown", "is no tensor of this model", folder)


def _check_stored(
    store: SafetensorsStore, name: str, entry: Mapping[str, Any], reference: Tensor | None, folder: Path
) -> Tensor:
    """Read a tensor and compare it with its manifest entry and with the buffer that it fills."""
    tensor = store.read(name)
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = list(tensor.shape)
    _require(shape == entry["shape"], name, shape, f"is not the shape {entry['shape']} of the manifest", folder)
    _require(dtype == entry["dtype"], name, dtype, f"is not the dtype {entry['dtype']} of the manifest", folder)
    if reference is not None:
        fits = tensor.shape == reference.shape and tensor.dtype == reference.dtype
        wanted = f"{reference.dtype} {tuple(reference.shape)}"
        _require(fits, name, f"{tensor.dtype} {tuple(shape)}", f"is not the {wanted} of config.json", folder)
    digest = sha256(tensor)
    _require(digest == entry["sha256"], name, digest[:12], f"is not the SHA-256 {entry['sha256'][:12]}...", folder)
    if tensor.is_floating_point():
        _require(bool(torch.isfinite(tensor).all()), name, "NaN or infinity", "is not a finite number", folder)
    return tensor


def _check_linear(
    name: str,
    module: QuantizedLinear,
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    against: ModelSource | None,
    folder: Path,
) -> VerifiedRow:
    layout = module.layout
    tensor = layout.read(tensors, module.out_features, module.in_features, name=name)
    checks = ["stored", "hash", "codes", "scales"]
    codes, (lowest, highest) = tensor.codes, layout.number_format.code_range
    span = f"{int(codes.min())}..{int(codes.max())}"
    legal = bool((codes >= lowest).all() and (codes <= highest).all())
    _require(legal, f"{name}.packed", span, f"leaves the codes {lowest}..{highest}", folder)
    for leaf, value in tensor.parameters.items():
        if leaf.endswith("scale"):
            _require(bool((value != 0).all()), f"{name}.{leaf}", 0, "is a scale of zero", folder)
    if isinstance(layout.number_format, TwoLevelInteger):
        steps = tensor.granularity.split(codes).float() * tensor.parameters["group_scale"].float().unsqueeze(-1)
        lowest_step, highest_step = float(steps.min()), float(steps.max())
        worst = highest_step if highest_step >= 127.5 else lowest_step
        fits = highest_step < 127.5 and lowest_step >= -128
        _require(fits, f"{name}.group_scale", worst, "times its code leaves int8 and would wrap", folder)
        checks.append("int8 range")
    note = ""
    if against is not None:
        note = _compare_weight(name, tensor, recipe, against, folder)
        checks.append("reconstruction")
    return VerifiedRow(name=name, checks=tuple(checks), note=note)


def _compare_weight(name: str, tensor: QuantizedTensor, recipe: Recipe, against: ModelSource, folder: Path) -> str:
    original = against.read(f"{name}.weight").float()
    same_shape = tuple(original.shape) == tensor.shape
    _require(same_shape, name, tensor.shape, f"is not the shape {tuple(original.shape)} of the original", folder)
    if recipe.transforms:
        return "shape only: transforms changed the weight before it was rounded"
    difference = (original - tensor.decode()).abs()
    relative = float(difference.norm() / original.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if recipe.weights is not None and isinstance(recipe.weights.solver, Nearest) and not recipe.rules:
        grouped = tensor.granularity.split(original)
        nearest = tensor.number_format.fake_quantize(grouped, tensor.parameters)
        bound = (original - tensor.granularity.merge(nearest, tensor.shape)).abs()
        excess = difference - bound - _GRID_SLACK * original.abs().amax()
        worst = int(excess.argmax())
        where = f"{name}[{worst // tensor.shape[1]}, {worst % tensor.shape[1]}]"
        far = float(difference.flatten()[worst])
        limit = f"exceeds the {float(bound.flatten()[worst]):.3g} that its grid allows"
        _require(bool(excess.max() <= 0), where, f"off by {far:.3g}", limit, folder)
        return f"relative error {relative:.4f}; every weight is a nearest number of its grid"
    _require(relative < 1, name, f"{relative:.3f}", "is a relative error of 1 or more: not this weight", folder)
    return f"relative error {relative:.4f}; the solver may move single weights, so no bound per element"


def _check_dense(
    name: str, tensor: Tensor, recipe: Recipe, against: ModelSource | None, folder: Path
) -> VerifiedRow:
    checks = ("stored", "hash", "finite")
    if against is None:
        return VerifiedRow(name=name, checks=checks)
    original = against.read(name)
    is_same = tensor.shape == original.shape and torch.equal(tensor.float(), original.to(tensor.dtype).float())
    if recipe.transforms:
        note = "as in the original" if is_same else "changed by transforms, not compared"
        return VerifiedRow(name=name, checks=checks, note=note)
    _require(is_same, name, "altered", "differs from the original although nothing transformed it", folder)
    return VerifiedRow(name=name, checks=(*checks, "original"), note="as in the original")


def _check_behaviour(against: ModelSource, folder: Path) -> VerifiedRow:
    """Compare predictions, which a transform must not change however it changes the weights."""
    divergence = divergence_from(against, folder)
    if not divergence.nats < _LARGEST_SHARE * divergence.uniform_nats:
        raise CheckpointError(
            compose(
                subject="KL(original || checkpoint)",
                value=str(divergence),
                constraint="lost half of what the original knows: a transform is not absorbed, or bits too few",
                place=str(folder),
                remedy="quantize again, with other transforms or more bits; do not use it",
            )
        )
    return VerifiedRow(name=BEHAVIOUR, checks=("behaviour",), note=f"KL from the original {divergence}")
