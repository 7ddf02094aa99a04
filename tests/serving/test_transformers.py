# SPDX-License-Identifier: Apache-2.0
"""After `import quattuor`, plain from_pretrained gives back the same bits, in any process and for any dtype."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed import DEFAULT, SMALL, pack_
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from quattuor.checkpoints import save_pretrained
from quattuor.errors import CheckpointError, UnsupportedError
from quattuor.nn.linear import QuantizedLinear
from quattuor.quantize import quantize
from quattuor.serving import transformers as serving
from quattuor.systems import qqq

TOKENS = torch.arange(24).reshape(2, 12)
Tiny = Callable[[str], PreTrainedModel]


def assert_same_state(first: PreTrainedModel, second: PreTrainedModel) -> None:
    """Compare every tensor bit for bit, dtype included."""
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """Return a packed Llama and where it is saved; tests do not change either."""
    model = pack_(tiny_model("llama"))
    return model, save_pretrained(model, tmp_path_factory.mktemp("saved") / "packed", max_shard_bytes=50_000)


@pytest.fixture
def saved(saved_once: tuple[PreTrainedModel, Path], tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """Return the packed Llama and a copy of its folder that a test may change."""
    model, folder = saved_once
    return model, shutil.copytree(folder, tmp_path / "packed")


def test_a_new_process_computes_the_same_logits(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = saved
    script = f"""
import torch
torch.set_num_threads(1)
import quattuor
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
with torch.no_grad():
    logits = model(torch.arange(24).reshape(2, 12)).logits
torch.save((logits, model.state_dict()), {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    logits, state = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        assert torch.equal(logits, model(TOKENS).logits)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_layout_loads_bit_for_bit(family: str, layout: str, tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny(family), layout)
    folder = save_pretrained(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_state(model, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_bit_for_bit(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny(family))
    loaded = AutoModelForCausalLM.from_pretrained(save_pretrained(model, tmp_path / "packed"))
    assert_same_state(model, loaded)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("by", ["transformers", "quattuor"])
def test_a_model_quantized_in_memory_is_saved_by_either(family: str, by: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(family)
    quantize(model, qqq(num_passes=0), TOKENS)
    if by == "transformers":
        model.save_pretrained(tmp_path / "packed")
    else:
        save_pretrained(model, tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert_same_state(model, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_an_untied_head_stays_untied(tiny: Tiny, tmp_path: Path) -> None:
    model = pack_(tiny("llama_tied"))
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach(), requires_grad=False)
    assert model.config.tie_word_embeddings
    folder = save_pretrained(model, tmp_path / "packed")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_their_dtype_whatever_dtype_is_asked_for(
    dtype: torch.dtype, saved: tuple[PreTrainedModel, Path]
) -> None:
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    for name, module in loaded.named_modules():
        if isinstance(module, QuantizedLinear):
            original = model.get_submodule(name).tensor.state()
            for leaf, tensor in module.tensor.state().items():
                assert tensor.dtype == original[leaf].dtype
                assert torch.equal(tensor, original[leaf])


def test_scales_keep_their_dtype_when_the_model_is_cast(saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    module = loaded.model.layers[0].mlp.down_proj
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert module.channel_scale.dtype == torch.float32
    assert torch.equal(module.channel_scale, model.model.layers[0].mlp.down_proj.channel_scale)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_a_device_map_changes_nothing(device_map: object, saved: tuple[PreTrainedModel, Path]) -> None:
    model, folder = saved
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(folder, device_map=device_map))


def test_a_loaded_model_saves_and_loads_again(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "by_transformers")
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path / "by_transformers"))
    save_pretrained(loaded, tmp_path / "by_quattuor")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "by_quattuor")
    assert_same_state(model, again)
    first = json.loads((folder / "config.json").read_text())["quantization_config"]
    second = json.loads((tmp_path / "by_quattuor" / "config.json").read_text())["quantization_config"]
    assert first == second


def edit(folder: Path, changes: dict[str, object]) -> None:
    """Change keys of the stored quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_another_format_version_is_refused(version: object, saved: tuple[PreTrainedModel, Path]) -> None:
    edit(saved[1], {"format_version": version})
    with pytest.raises(UnsupportedError, match=rf"format_version={version!s} is not one of 1..1.*update quattuor"):
        AutoModelForCausalLM.from_pretrained(saved[1])


@pytest.mark.parametrize(
    ("name", "found"), [("model.layers.9.mlp.up_proj", "missing"), ("model.norm", "LlamaRMSNorm")]
)
def test_modules_that_are_no_linears_are_refused(
    name: str, found: str, saved: tuple[PreTrainedModel, Path]
) -> None:
    edit(saved[1], {"modules": {name: 0}})
    with pytest.raises(CheckpointError, match=rf"{name}={found} is not a linear of this model"):
        AutoModelForCausalLM.from_pretrained(saved[1])


def rewrite(folder: Path, name: str, tensor: Tensor | None) -> None:
    """Replace one tensor of a checkpoint, or leave it out."""
    state: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    state.pop(name)
    save_file(state if tensor is None else state | {name: tensor}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (None, "missing"),
        (torch.ones(64, 1, dtype=torch.float16), r"torch.float16 \(64, 1\)"),
        (torch.ones(32, 1), r"torch.float32 \(32, 1\)"),
    ],
)
def test_a_missing_or_foreign_tensor_is_an_error_not_random_numbers(
    tensor: Tensor | None, found: str, saved: tuple[PreTrainedModel, Path]
) -> None:
    name = "model.layers.0.self_attn.q_proj.channel_scale"
    rewrite(saved[1], name, tensor)
    with pytest.raises(CheckpointError, match=rf"{name}={found} is not the torch.float32 \(64, 1\)"):
        AutoModelForCausalLM.from_pretrained(saved[1])


def test_registering_twice_changes_nothing_and_a_foreign_owner_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    serving.register()
    assert AUTO_QUANTIZER_MAPPING["quattuor"] is serving.QuattuorQuantizer
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "quattuor", dict)
    with pytest.raises(UnsupportedError, match=r"is registered with transformers by builtins"):
        serving.register()


def test_the_recipe_can_be_read_from_a_loaded_model(saved: tuple[PreTrainedModel, Path]) -> None:
    from packed import recipe_of

    loaded = AutoModelForCausalLM.from_pretrained(saved[1])
    assert loaded.config.quantization_config.parsed_recipe() == recipe_of(DEFAULT)


def test_another_group_size_is_refused_with_the_tensors_name(saved: tuple[PreTrainedModel, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    for layout in config["quantization_config"]["layouts"]:
        assert layout["granularity"]["group_size"] == 32
        layout["granularity"]["group_size"] = 16
    (saved[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model.layers.0.\S+.group_scale=torch.int8 \(\d+, 2\) is not the"):
        AutoModelForCausalLM.from_pretrained(saved[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 256}, r"model.layers.0.mlp.\w+_proj.\w+=\S+ \(\d+, \d+\) is not the"),
        ({"model_type": "phi3"}, r"model.layers.0.\S+_proj=missing is not a linear of this model"),
        ({"num_hidden_layers": 1}, r"model.layers.1.\S+_proj=missing is not a linear of this model"),
    ],
)
def test_another_architecture_is_refused_with_the_tensors_name(
    change: dict[str, object], message: str, saved: tuple[PreTrainedModel, Path]
) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    (saved[1] / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(saved[1])
