# SPDX-License-Identifier: Apache-2.0
"""Native checkpoints: complete or absent, of the size the formula says, and described by their manifest."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from packed import DEFAULT, SMALL, pack_, recipe_of
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from quattuor.checkpoints import (
    CheckpointWriter,
    PackedModel,
    expected_bytes,
    read_layouts,
    read_native,
    save_pretrained,
    writing,
)
from quattuor.checkpoints.layouts import layout_from_dict, layout_to_dict, stored_names
from quattuor.checkpoints.skeleton import quantized_linears
from quattuor.checkpoints.writing import sha256, write_safetensors
from quattuor.errors import CheckpointError, InputError, UnsupportedError
from quattuor.recipe import Recipe

Tiny = Callable[[str], PreTrainedModel]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor.clone() for file in files for name, tensor in load_file(file).items()}


def write_and_fail(folder: Path, failure: type[BaseException], **options: Any) -> None:
    """Write three shards, look at them, and fail."""
    with CheckpointWriter(folder, max_shard_bytes=8, **options) as writer:
        writer.add({"a": torch.ones(8), "b": torch.ones(8), "c": torch.ones(8)})
        assert len(list(folder.parent.glob(".packed*/*.safetensors"))) == 2
        raise failure("stop")


def write_all(folder: Path, tensors: dict[str, Tensor], model: PreTrainedModel, layouts: Any) -> None:
    """Write the given tensors as the checkpoint of a model."""
    with CheckpointWriter(folder) as writer:
        writer.add(tensors)
        writer.finish(model.config, recipe_of(DEFAULT), layouts)


@pytest.mark.parametrize("layout", SMALL)
def test_the_size_on_disk_is_what_the_formula_says(layout: str, tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny("qwen2"), layout)
    folder = save_pretrained(model, tmp_path / "packed")
    manifest = json.loads((folder / "quattuor_manifest.json").read_text())
    stored = tensors_of(folder)
    total = 0
    for name, module in quantized_linears(model).items():
        expected = expected_bytes(module.layout, module.out_features, module.in_features)
        names = stored_names(name, module.layout)
        assert sum(stored[full].nbytes for full in names) == expected
        bits = 8 * expected / (module.out_features * module.in_features)
        row = next(row for row in manifest["layers"] if row["name"] == name)
        assert row["bits_per_weight"] == bits == module.tensor.bits_per_weight
        total += expected
    dense = sum(tensor.nbytes for tensor in PackedModel.from_model(model).dense.values())
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") + 8
    assert on_disk - header == total + dense
    assert manifest["totals"]["packed_bytes"] == total


def test_a_four_bit_layer_of_real_size_takes_what_the_paper_of_the_format_says() -> None:
    layout = layout_from_dict(layout_to_dict(_layouts_of(DEFAULT)), "test")
    measured = 8 * expected_bytes(layout, 4096, 4096) / 4096**2
    assert measured == pytest.approx(4 + 8 / 32 + 32 / 4096)


def _layouts_of(layout: str) -> Any:
    from tiny_models import tiny_model

    return next(iter(quantized_linears(pack_(tiny_model("llama"), layout)).values())).layout


@pytest.mark.parametrize("layout", SMALL)
def test_layouts_survive_plain_data(layout: str) -> None:
    original = _layouts_of(layout)
    assert layout_from_dict(json.loads(json.dumps(layout_to_dict(original))), "test") == original


def test_shards_are_bounded_indexed_and_independent_of_their_number(tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny("llama"))
    whole = save_pretrained(model, tmp_path / "whole")
    split = save_pretrained(model, tmp_path / "split", max_shard_bytes=40_000)
    assert [file.name for file in whole.glob("*.safetensors")] == ["model.safetensors"]
    files = sorted(split.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert {split / name for name in index["weight_map"].values()} == set(files)
    for file in files:
        shard = load_file(file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 40_000
        assert all(index["weight_map"][name] == file.name for name in shard)
    first, second = tensors_of(whole), tensors_of(split)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_manifest_describes_every_tensor(tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny("llama"))
    report = {"layers": [{"name": "model.layers.0.mlp.up_proj", "error": 0.125}], "seconds": {"solve": 1.5}}
    folder = save_pretrained(model, tmp_path / "packed", report=report, tokenizer=tiny_tokenizer())
    manifest = json.loads((folder / "quattuor_manifest.json").read_text())
    stored = tensors_of(folder)
    assert manifest["tensors"].keys() == stored.keys()
    for name, entry in manifest["tensors"].items():
        assert entry["sha256"] == sha256(stored[name])
        assert entry["shape"] == list(stored[name].shape)
        assert (folder / entry["file"]).is_file()
    errors = {row["name"]: row["error"] for row in manifest["layers"]}
    assert errors["model.layers.0.mlp.up_proj"] == 0.125
    assert errors["model.layers.1.mlp.up_proj"] is None
    assert manifest["report"]["seconds"] == {"solve": 1.5}
    assert set(manifest["versions"]) == {"python", "torch", "transformers", "safetensors"}


def test_the_folder_has_tokenizer_generation_config_and_a_card_that_warns(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_pretrained(pack_(tiny("llama")), tmp_path / "my-model", tokenizer=tiny_tokenizer())
    assert AutoTokenizer.from_pretrained(folder)("ab").input_ids == tiny_tokenizer()("ab").input_ids
    assert (folder / "generation_config.json").is_file()
    card = (folder / "README.md").read_text()
    assert "Import quattuor before loading" in card
    assert "random numbers" in card
    assert "quattuor verify my-model" in card
    block = card.split("```json")[1].split("```")[0]
    assert Recipe.from_dict(json.loads(block)) == recipe_of(DEFAULT)
    assert f"{4 + 8 / 32 + 32 * 640 / 49152:.4f}" in card  # 640 rows and 49152 weights in each block


def test_reading_gives_back_what_was_written(tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny("opt"))
    packed = read_native(save_pretrained(model, tmp_path / "packed", tokenizer=tiny_tokenizer()))
    reference = PackedModel.from_model(model)
    assert packed.linears.keys() == reference.linears.keys()
    for name, tensor in packed.linears.items():
        other = reference.linears[name].state()
        assert all(torch.equal(value, other[leaf]) for leaf, value in tensor.state().items())
    assert packed.dense.keys() == reference.dense.keys()
    assert all(torch.equal(value, reference.dense[name]) for name, value in packed.dense.items())
    assert packed.layouts() == reference.layouts() == read_layouts(model.config)
    assert packed.tokenizer is not None


def test_the_writer_streams_and_views_of_larger_tensors_are_stored_alone(tmp_path: Path) -> None:
    stacked = torch.arange(64, dtype=torch.float32).view(8, 8)
    write_safetensors(tmp_path / "a.safetensors", {"top": stacked[:2], "bottom": stacked[6:].contiguous()})
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["top"], stacked[:2])
    assert torch.equal(read["bottom"], stacked[6:])
    assert (tmp_path / "a.safetensors").stat().st_size < 64 * 4 + 300


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]
)
def test_every_dtype_is_written_as_the_library_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([[1, 0, 3]]).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in tensors.items())


def test_an_existing_folder_is_refused_and_replaced_only_on_success(tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny("llama"))
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(InputError, match=r"output folder=.*packed exists already; choose another folder"):
        save_pretrained(model, folder)
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(folder, RuntimeError, overwrite=True)
    assert (folder / "old.txt").read_text() == "old"
    save_pretrained(model, folder, overwrite=True)
    assert not (folder / "old.txt").exists()
    assert list(tmp_path.iterdir()) == [folder]


def fill_disk_after(num_writes: int, monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
    """Let the disk be full from the given write on."""
    count = 0

    def write(stream: BinaryIO, data: bytes | memoryview) -> None:
        nonlocal count
        count += 1
        if count > num_writes:
            raise OSError(code, "no room")
        stream.write(data)

    monkeypatch.setattr(writing, "write_bytes", write)


@pytest.mark.parametrize("num_writes", [0, 1, 5, 40])
def test_a_full_disk_is_named_and_leaves_nothing(
    num_writes: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pack_(tiny("llama"))
    fill_disk_after(num_writes, monkeypatch)
    with pytest.raises(CheckpointError, match=r"disk space=\d+ bytes free is less than the \d+ bytes of shard-"):
        save_pretrained(model, tmp_path / "packed", max_shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_texts_are_written_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pack_(tiny("llama"))

    def write_text(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(CheckpointError, match=r"disk space=\d+ bytes free"):
        save_pretrained(model, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_another_failure_of_the_disk_is_not_called_full(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pack_(tiny("llama"))
    fill_disk_after(3, monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="no room") as caught:
        save_pretrained(model, tmp_path / "packed")
    assert caught.value.errno == errno.EIO
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupt_leaves_nothing_that_loads(failure: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(failure, match="stop"):
        write_and_fail(tmp_path / "packed", failure)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_foreign_or_misshapen_tensor_is_named_before_anything_appears(
    tiny: Tiny, tmp_path: Path
) -> None:
    model = pack_(tiny("llama"))
    packed = PackedModel.from_model(model)
    state = dict(packed.dense)
    for name, tensor in packed.linears.items():
        state |= {f"{name}.{leaf}": value for leaf, value in tensor.state().items()}
    name = "model.layers.1.mlp.up_proj.packed"
    cases = {
        f"{name}=missing was not added": {k: v for k, v in state.items() if k != name},
        r"extra=\(2,\) is no tensor of this model": {**state, "extra": torch.ones(2)},
        rf"{name}=\(1, 2\) is not the shape \(192, 32\)": {**state, name: torch.ones(1, 2, dtype=torch.uint8)},
    }
    for message, tensors in cases.items():
        with pytest.raises(CheckpointError, match=message):
            write_all(tmp_path / "packed", tensors, model, packed.layouts())
        assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_added_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "packed") as writer:
        writer.add({"a": torch.ones(2)})
        with pytest.raises(InputError, match=r"tensor=a was added before"):
            writer.add({"a": torch.ones(2)})
    with pytest.raises(InputError, match=r"max_shard_bytes=0 is not a positive size"):
        CheckpointWriter(tmp_path / "packed", max_shard_bytes=0)


def test_a_model_without_packed_linears_or_recipe_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no packed linear"):
        save_pretrained(tiny("llama"), tmp_path / "packed", recipe=recipe_of(DEFAULT))
    model = pack_(tiny("llama"))
    del model.config.quantization_config
    with pytest.raises(InputError, match=r"recipe=None is not given and model.config has none"):
        save_pretrained(model, tmp_path / "packed")
    save_pretrained(model, tmp_path / "packed", recipe=recipe_of(DEFAULT))
    assert read_layouts(AutoConfig.from_pretrained(tmp_path / "packed")).keys() == quantized_linears(model).keys()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quant_method": "gptq"}, CheckpointError, r"quant_method=gptq is not 'quattuor'"),
        ({"format_version": 7}, UnsupportedError, r"format_version=7 is not one of 1..1"),
        ({"modules": {"a": 3}}, CheckpointError, r"layout index=3 of a is not one of the 1 layouts"),
        (
            {"layouts": [{"number_format": {"part": "Integer", "bits": 9}}]},
            CheckpointError,
            r"cannot be read: .*bits",
        ),
    ],
)
def test_damaged_configurations_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tiny: Tiny
) -> None:
    model = pack_(tiny("llama"))
    with pytest.raises(error, match=message):
        read_layouts({**model.config.quantization_config, **changes})


def test_a_checkpoint_without_a_tensor_is_not_read(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_pretrained(pack_(tiny("llama")), tmp_path / "packed")
    state = tensors_of(folder)
    del state["model.norm.weight"]
    write_safetensors(folder / "model.safetensors", state)
    with pytest.raises(CheckpointError, match=r"tensor=model.norm.weight is missing"):
        read_native(folder)
