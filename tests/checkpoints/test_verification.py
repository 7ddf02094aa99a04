# SPDX-License-Identifier: Apache-2.0
"""Verification passes what was written and names the tensor of every kind of damage."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed import DEFAULT, SMALL, pack_, recipe_of
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from quattuor.checkpoints import ModelSource, inspect, save_pretrained, verify
from quattuor.checkpoints.skeleton import quantized_linears
from quattuor.checkpoints.writing import sha256, write_safetensors
from quattuor.errors import CheckpointError
from quattuor.formats.packing import pack_rows
from quattuor.quantize import quantize_to_folder
from quattuor.seeds import derive_seed
from quattuor.solvers import GPTQ
from quattuor.systems import qqq
from quattuor.transforms import RotateResidual
from quattuor.transforms.rotation import rotate_input

Tiny = Callable[[str], PreTrainedModel]
SEED = 3
LINEAR = "model.layers.1.mlp.gate_proj"


def stored(folder: Path) -> dict[str, Tensor]:
    """Read all tensors into memory, so that their file may be written."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def damage(folder: Path, name: str, change: Callable[[Tensor], Tensor], *, rehash: bool) -> None:
    """Change a stored tensor, and with `rehash` its manifest entry too, as a faulty writer would."""
    state = stored(folder)
    state[name] = change(state[name])
    write_safetensors(folder / "model.safetensors", state)
    if rehash:
        file = folder / "quattuor_manifest.json"
        manifest = json.loads(file.read_text())
        manifest["tensors"][name] |= {"sha256": sha256(state[name]), "shape": list(state[name].shape)}
        manifest["tensors"][name]["dtype"] = str(state[name].dtype).removeprefix("torch.")
        file.write_text(json.dumps(manifest))


def put(value: float) -> Callable[[Tensor], Tensor]:
    """Return a change of one element."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return change


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    return save_pretrained(pack_(tiny("llama")), tmp_path / "packed")


@pytest.mark.parametrize("layout", SMALL)
def test_what_was_written_passes_with_and_without_the_original(layout: str, tiny: Tiny, tmp_path: Path) -> None:
    original = tiny("llama")
    folder = save_pretrained(pack_(tiny("llama"), layout), tmp_path / "packed")
    rows = verify(folder, ModelSource(original))
    assert len(rows) == len(verify(folder)) == 14 + 7
    linear = next(row for row in rows if row.name == LINEAR)
    assert {"hash", "codes", "scales", "reconstruction"} <= set(linear.checks)
    assert "nearest number of its grid" in linear.note
    assert next(row for row in rows if row.name == "model.norm.weight").note == "as in the original"


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("packed", put(17), r"is not the SHA-256"),
        ("channel_scale", put(0.5), r"is not the SHA-256"),
    ],
)
def test_a_changed_byte_is_found(
    leaf: str, change: Callable[[Tensor], Tensor], message: str, folder: Path
) -> None:
    damage(folder, f"{LINEAR}.{leaf}", change, rehash=False)
    with pytest.raises(CheckpointError, match=rf"{LINEAR}.{leaf}=\w+ {message}"):
        verify(folder)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("channel_scale", put(float("nan")), r"is not a finite number"),
        ("channel_scale", put(0), r"is a scale of zero"),
        ("channel_scale", lambda t: t.half(), r"is not the torch.float32 \(192, 1\) of config.json"),
        ("channel_scale", lambda t: t[:5], r"is not the torch.float32 \(192, 1\) of config.json"),
        ("group_scale", put(100), r"times its code leaves int8 and would wrap"),
        ("group_scale", put(0), r"is a scale of zero"),
    ],
)
def test_a_faulty_writer_is_found_behind_a_right_hash(
    leaf: str, change: Callable[[Tensor], Tensor], message: str, folder: Path
) -> None:
    damage(folder, f"{LINEAR}.{leaf}", change, rehash=True)
    with pytest.raises(CheckpointError, match=rf"{LINEAR}.{leaf}=.*{message}"):
        verify(folder)


def test_codes_that_the_format_has_not_are_found(tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny("llama"), "int4 channel, int8 tokens")
    for module in quantized_linears(model).values():
        narrow = dataclasses.replace(module.layout.number_format, narrow=True)
        module.layout = dataclasses.replace(module.layout, number_format=narrow)
        module.packed = pack_rows(module.tensor.codes.clamp(min=-7), 4)
    folder = save_pretrained(model, tmp_path / "packed")
    verify(folder)
    damage(folder, f"{LINEAR}.packed", put(0x88), rehash=True)
    with pytest.raises(CheckpointError, match=rf"{LINEAR}.packed=-8..7 leaves the codes -7..7"):
        verify(folder)


def test_missing_and_unknown_tensors_are_found(folder: Path) -> None:
    state = stored(folder)
    write_safetensors(folder / "model.safetensors", {k: v for k, v in state.items() if k != f"{LINEAR}.packed"})
    with pytest.raises(CheckpointError, match=rf"{LINEAR}.packed=missing is not stored"):
        verify(folder)
    with pytest.raises(CheckpointError, match=rf"{LINEAR}.packed=missing is not stored"):
        inspect(folder)
    write_safetensors(folder / "model.safetensors", {**state, "extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"extra=unknown is not in the manifest"):
        verify(folder)
    file = folder / "quattuor_manifest.json"
    manifest = json.loads(file.read_text())
    manifest["tensors"]["extra"] = manifest["tensors"]["model.norm.weight"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"extra=unknown is no tensor of this model"):
        verify(folder)


def test_a_truncated_shard_is_found(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors \(\d+ bytes\) is truncated or damaged"):
        verify(folder)


@pytest.mark.parametrize(("text", "message"), [(None, "is missing"), ("{", "is not valid JSON")])
def test_a_manifest_is_needed(text: str | None, message: str, folder: Path) -> None:
    file = folder / "quattuor_manifest.json"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(CheckpointError, match=rf"manifest=quattuor_manifest.json {message}"):
        verify(folder)


def test_a_code_that_is_not_the_nearest_is_found_with_its_place(tiny: Tiny, folder: Path) -> None:
    def shift(packed: Tensor) -> Tensor:
        packed[9, 4] ^= 0x02  # moves the code of column 8 by two
        return packed

    damage(folder, f"{LINEAR}.packed", shift, rehash=True)
    verify(folder)
    with pytest.raises(CheckpointError, match=rf"{LINEAR}\[9, 8\]=off by .* exceeds the .* that its grid allows"):
        verify(folder, ModelSource(tiny("llama")))


def test_another_models_weights_are_found(tiny: Tiny, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"exceeds the .* that its grid allows"):
        verify(folder, ModelSource(tiny_model("llama", seed=1)))
    with pytest.raises(CheckpointError, match=r"is not the shape|is not among"):
        verify(folder, ModelSource(tiny_model("llama", intermediate_size=128)))


def test_a_dense_tensor_that_nothing_transformed_must_be_the_original(tiny: Tiny, folder: Path) -> None:
    damage(folder, "model.norm.weight", put(0.25), rehash=True)
    with pytest.raises(CheckpointError, match=r"model.norm.weight=altered differs from the original"):
        verify(folder, ModelSource(tiny("llama")))


def test_a_compensating_solver_is_bounded_as_a_whole(tiny: Tiny, tmp_path: Path) -> None:
    recipe = recipe_of(DEFAULT)
    assert recipe.weights is not None
    recipe = dataclasses.replace(recipe, weights=dataclasses.replace(recipe.weights, solver=GPTQ()))
    folder = save_pretrained(pack_(tiny("llama")), tmp_path / "packed", recipe=recipe)
    rows = verify(folder, ModelSource(tiny("llama")))
    assert "no bound per element" in next(row for row in rows if row.name == LINEAR).note
    with pytest.raises(CheckpointError, match=r"is a relative error of 1 or more: not this weight"):
        verify(folder, ModelSource(tiny_model("llama", seed=1)))


@pytest.fixture
def rotated(tiny: Tiny, tmp_path: Path) -> Path:
    tokens = torch.randint(255, (16, 64), generator=torch.Generator().manual_seed(1))
    quantize_to_folder(ModelSource(tiny("llama_tied")), qqq(), tokens, tmp_path / "rotated", seed=SEED)
    return tmp_path / "rotated"


def test_transforms_leave_shapes_and_predictions_to_compare_and_the_rows_say_so(tiny: Tiny, rotated: Path) -> None:
    rows = {row.name: row for row in verify(rotated, ModelSource(tiny("llama_tied")))}
    assert rows[LINEAR].note == "shape only: transforms changed the weight before it was rounded"
    assert rows["model.norm.weight"].note == "changed by transforms, not compared"
    assert rows["(logits)"].checks == ("behaviour",)
    assert re.fullmatch(r"KL from the original [\d.]+ nats on 64 .* for a uniform guess", rows["(logits)"].note)
    assert "(logits)" not in {row.name for row in verify(rotated)}


def rotate_again(weight: Tensor) -> Tensor:
    """Rotate what reads or writes the residual stream by the run's own matrix, once too often."""
    rotation = RotateResidual().matrix(weight.shape[1], derive_seed(SEED, "RotateResidual"))
    return rotate_input(weight, rotation)


def rotate_back(weight: Tensor) -> Tensor:
    """Leave a rotation out."""
    rotation = RotateResidual().matrix(weight.shape[1], derive_seed(SEED, "RotateResidual"))
    return rotate_input(weight, rotation.T)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("change", [rotate_again, rotate_back])
def test_a_rotation_that_was_not_absorbed_once_is_found(
    name: str, change: Callable[[Tensor], Tensor], tiny: Tiny, rotated: Path
) -> None:
    damage(rotated, name, change, rehash=True)
    verify(rotated)
    message = r"rotated: KL\(original \|\| checkpoint\)=[\d.]+ nats on 64 .* lost half of .*; quantize again"
    with pytest.raises(CheckpointError, match=message):
        verify(rotated, ModelSource(tiny("llama_tied")))


def test_inspect_measures_bits_and_shows_recorded_errors(tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny("llama"))
    report = {"layers": [{"name": LINEAR, "error": 0.5}]}
    rows = {row.name: row for row in inspect(save_pretrained(model, tmp_path / "packed", report=report))}
    assert rows.keys() == quantized_linears(model).keys()
    assert rows[LINEAR].error == 0.5
    assert rows["model.layers.0.mlp.gate_proj"].error is None
    for name, module in quantized_linears(model).items():
        assert rows[name].bits_per_weight == module.tensor.bits_per_weight
        assert (rows[name].out_features, rows[name].in_features) == module.tensor.shape
