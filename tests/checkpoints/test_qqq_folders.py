# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints in the original QQQ layout: the same integers and scales both ways, or a named refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import pack_
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quattuor.activations import DynamicQuantizer
from quattuor.checkpoints import PackedModel, read_qqq, save_pretrained, write_native, write_qqq
from quattuor.checkpoints.skeleton import quantized_linears
from quattuor.checkpoints.writing import write_safetensors
from quattuor.errors import CheckpointError, InputError, UnsupportedError
from quattuor.formats import Parameters, TwoLevelInteger
from quattuor.granularity import PerGroup
from quattuor.nn.linear import QuantizedLinear
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.recipe import Recipe

TOKENS = torch.arange(24).reshape(2, 12)
CHANNEL = "int4 channel, int8 tokens"


def wide_model(dtype: torch.dtype = torch.float16, family: str = "llama") -> PreTrainedModel:
    """Return a tiny model whose linears the kernel of this layout can tile."""
    return tiny_model(family, hidden_size=128, head_dim=32, intermediate_size=256, dtype=dtype)


@torch.no_grad()
def group_model() -> PreTrainedModel:
    """Return a model in groups of 128, group scales of both signs."""
    model = wide_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            values = PerGroup(128).split(module.weight.float())
            step = values.abs().amax(dim=-1) / 8
            channel = step.amax(dim=1, keepdim=True) * 8 / 127
            group = (step / channel).half().clamp(max=15.875)
            group[::3] *= -1
            parameters = Parameters(group_scale=group, channel_scale=channel)
            codes = TwoLevelInteger(4).encode(values, parameters)
            tensor = QuantizedTensor.from_codes(
                PerGroup(128).merge(codes, tuple(module.weight.shape)),
                parameters,
                TwoLevelInteger(4),
                PerGroup(128),
            )
            packed = QuantizedLinear.from_tensor(
                tensor, module.bias, DynamicQuantizer(), dtype=torch.float16, name=name
            )
            model.set_submodule(name, packed)
    return model


@pytest.fixture(params=["channel", "group"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return pack_(wide_model(), CHANNEL) if request.param == "channel" else group_model()


def test_a_checkpoint_survives_the_layout_bit_for_bit(model: PreTrainedModel, tmp_path: Path) -> None:
    packed = PackedModel.from_model(model, tiny_tokenizer())
    read = read_qqq(write_qqq(packed, tmp_path / "qqq", max_shard_bytes=60_000))
    assert read.linears.keys() == packed.linears.keys()
    for name, tensor in packed.linears.items():
        assert torch.equal(read.linears[name].codes, tensor.codes)
        for leaf, value in tensor.parameters.items():
            assert read.linears[name].parameters[leaf].dtype == value.dtype
            assert torch.equal(read.linears[name].parameters[leaf], value)
    assert read.layouts() == packed.layouts()
    assert read.dense.keys() == packed.dense.keys()
    assert all(torch.equal(value, packed.dense[name]) for name, value in read.dense.items())
    assert read.tokenizer is not None


def test_what_was_read_runs_as_a_native_checkpoint(model: PreTrainedModel, tmp_path: Path) -> None:
    read = read_qqq(write_qqq(model, tmp_path / "qqq"))
    folder = write_native(read, tmp_path / "native", recipe=Recipe(systems=("qqq",)))
    direct = save_pretrained(model, tmp_path / "direct", recipe=Recipe())
    first, second = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (folder, direct))
    with torch.no_grad():
        assert torch.equal(first(TOKENS).logits, second(TOKENS).logits)


def test_names_shapes_and_configuration_are_those_of_the_original(tmp_path: Path) -> None:
    folder = write_qqq(group_model(), tmp_path / "qqq")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert {key.removeprefix(name + ".") for key in stored if key.startswith(name)} == {
        "B",
        "s_channel",
        "s_group",
    }
    assert stored[f"{name}.B"].shape == (256 // 16, 2 * 128)
    assert stored[f"{name}.s_channel"].shape == (1, 128)
    assert stored[f"{name}.s_group"].shape == (2, 128)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qqq", "wbits": 4, "group_size": 128}
    assert config["torch_dtype"] == "float16"


def test_a_native_folder_and_biases_can_be_written(tmp_path: Path) -> None:
    model = pack_(tiny_model("qwen2", hidden_size=256, intermediate_size=256, dtype=torch.float16), CHANNEL)
    native = save_pretrained(model, tmp_path / "native")
    read = read_qqq(write_qqq(native, tmp_path / "qqq"))
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(read.dense[bias], model.get_submodule("model.layers.0.self_attn.q_proj").bias)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = pack_(wide_model(family="llama_tied"), CHANNEL)
    read = read_qqq(write_qqq(model, tmp_path / "qqq"))
    assert read.config.tie_word_embeddings
    assert "lm_head.weight" not in read.dense


def edit(folder: Path, settings: dict[str, Any] | None) -> None:
    """Replace the quantization settings in config.json."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "qqq", "bits": 4, "group_size": -1, "format": "qqq"},
        {"quant_method": "qqq", "bits": 4, "group_size": -1, "checkpoint_format": "qqq", "desc_act": True},
    ],
)
def test_other_spellings_of_the_settings_are_read(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_qqq(pack_(wide_model(), CHANNEL), tmp_path / "qqq")
    edit(folder, settings)
    assert len(read_qqq(folder).linears) == 14


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
def test_settings_in_a_file_of_their_own_and_empty_group_scales_are_read(name: str, tmp_path: Path) -> None:
    folder = write_qqq(pack_(wide_model(), CHANNEL), tmp_path / "qqq")
    edit(folder, None)
    (folder / name).write_text(json.dumps({"wbits": 4, "group_size": -1}))
    rewrite(folder, {"model.layers.0.mlp.up_proj.s_group": torch.empty(0, dtype=torch.float16)})
    assert len(read_qqq(folder).linears) == 14


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (None, CheckpointError, r"quantization_config=missing is in none of config.json, quant_config.json"),
        ({"quant_method": "awq", "bits": 4}, CheckpointError, r"format=awq, qqq is not the QQQ layout"),
        ({"quant_method": "gptq", "format": "gptq", "bits": 4}, CheckpointError, r"gptq, gptq is not the QQQ"),
        ({"quant_method": "qqq", "wbits": 8, "group_size": -1}, UnsupportedError, r"bits=8 is not the 4"),
        ({"quant_method": "qqq", "wbits": 4, "group_size": 64}, UnsupportedError, r"group_size=64 is neither -1"),
        ({"quant_method": "qqq", "wbits": 4}, UnsupportedError, r"group_size=None is neither -1 nor 128"),
        (
            {"quant_method": "qqq", "bits": 4, "group_size": 128, "desc_act": True, "static_groups": False},
            UnsupportedError,
            r"desc_act without static_groups=True reorders columns",
        ),
        (
            {"quant_method": "qqq", "wbits": 4, "group_size": 128},
            CheckpointError,
            r"layers.0.self_attn.q_proj.s_group=missing contradicts group_size=128",
        ),
    ],
)
def test_settings_that_are_not_this_layout_are_refused(
    settings: dict[str, Any] | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = write_qqq(pack_(wide_model(), CHANNEL), tmp_path / "qqq")
    edit(folder, settings)
    with pytest.raises(error, match=message):
        read_qqq(folder)


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors of a checkpoint, or leave them out."""
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    write_safetensors(folder / "model.safetensors", state)


@pytest.mark.parametrize("leaf", ["B", "s_channel", "s_group"])
def test_a_missing_tensor_is_named(leaf: str, tmp_path: Path) -> None:
    folder = write_qqq(group_model(), tmp_path / "qqq")
    rewrite(folder, {f"model.layers.1.mlp.up_proj.{leaf}": None})
    with pytest.raises(CheckpointError, match=rf"model.layers.1.mlp.up_proj.{leaf}=missing"):
        read_qqq(folder)


def test_a_missing_norm_and_a_foreign_shape_are_named(tmp_path: Path) -> None:
    folder = write_qqq(group_model(), tmp_path / "qqq")
    name = "model.layers.1.mlp.up_proj"
    stored = load_file(folder / "model.safetensors")
    other = {
        leaf: stored[f"model.layers.1.mlp.down_proj.{leaf}"].clone() for leaf in ("B", "s_channel", "s_group")
    }
    rewrite(folder, {f"{name}.{leaf}": value for leaf, value in other.items()})
    with pytest.raises(
        CheckpointError, match=rf"{name}.B=\(128, 256\) decodes to another shape than \(256, 128\)"
    ):
        read_qqq(folder)
    folder = write_qqq(group_model(), tmp_path / "second")
    rewrite(folder, {"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"model.norm.weight=missing is not stored"):
        read_qqq(folder)


@pytest.mark.parametrize("key", ["intermediate_size", "num_key_value_heads"])
def test_another_architecture_is_refused_with_the_tensors_name(key: str, tmp_path: Path) -> None:
    folder = write_qqq(group_model(), tmp_path / "qqq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: 2 * config[key]}))
    with pytest.raises(CheckpointError, match=r"model.layers.0.\S+_proj.B=\(\d+, \d+\) decodes to another shape"):
        read_qqq(folder)


def test_a_group_scale_that_wraps_is_refused_with_the_layers_name_both_ways(tmp_path: Path) -> None:
    model = group_model()
    name = "model.layers.1.mlp.up_proj"
    linear = model.get_submodule(name)
    folder = write_qqq(model, tmp_path / "fine")
    linear.group_scale = (linear.group_scale * 2).half()
    with pytest.raises(UnsupportedError, match=rf"{name}=.* which would wrap"):
        write_qqq(model, tmp_path / "qqq")
    assert not (tmp_path / "qqq").exists()
    stored = load_file(folder / "model.safetensors")[f"{name}.s_group"]
    rewrite(folder, {f"{name}.s_group": stored * 2})
    with pytest.raises(CheckpointError, match=rf"{name}.s_group=.* wraps in the kernel"):
        read_qqq(folder)


def test_what_the_layout_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    target = tmp_path / "qqq"
    with pytest.raises(
        UnsupportedError, match=r"layers.0.self_attn.q_proj.*group_size=32; the layout only knows 128"
    ):
        write_qqq(pack_(wide_model(), "int4 group 32 two levels, int8 tokens"), target)
    with pytest.raises(UnsupportedError, match=r"q_proj.*has activations None; the layout implies int8 per token"):
        write_qqq(pack_(wide_model(), "int8 channel"), target)
    with pytest.raises(UnsupportedError, match=r"q_proj=\[64, 64\] is 64 x 64, which no tile"):
        write_qqq(pack_(tiny_model("llama", dtype=torch.float16), CHANNEL), target)
    model = pack_(wide_model(), CHANNEL)
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Linear(128, 256, bias=False, dtype=torch.float16))
    with pytest.raises(UnsupportedError, match=r"model.layers.1.mlp.up_proj=in high precision must be quantized"):
        write_qqq(model, target)
    mixed, groups = pack_(wide_model(), CHANNEL), group_model()
    mixed.set_submodule("model.layers.1.mlp.up_proj", groups.get_submodule("model.layers.1.mlp.up_proj"))
    with pytest.raises(UnsupportedError, match=r"must be the same for every linear"):
        write_qqq(mixed, target)
    assert list(tmp_path.iterdir()) == []


def test_dense_tensors_are_rounded_to_float16_only_when_asked(tmp_path: Path) -> None:
    model = pack_(wide_model(torch.float32), CHANNEL)
    with pytest.raises(UnsupportedError, match=r"=torch.float32 is not float16.*pass cast_dense=True"):
        write_qqq(model, tmp_path / "qqq")
    read = read_qqq(write_qqq(model, tmp_path / "qqq", cast_dense=True))
    assert torch.equal(read.dense["lm_head.weight"], model.lm_head.weight.half())
    for name, module in quantized_linears(model).items():
        assert torch.equal(read.linears[name].parameters["scale"], module.scale)
    model.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(UnsupportedError, match=r"lm_head.weight=1e\+06 exceeds what float16 can hold"):
        write_qqq(model, tmp_path / "second", cast_dense=True)
    with pytest.raises(InputError, match=r"exists already"):
        write_qqq(model, tmp_path / "qqq", cast_dense=True)
