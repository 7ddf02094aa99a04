# SPDX-License-Identifier: Apache-2.0
"""Sources give exactly the stored numbers, one module at a time, and say what is wrong with bad files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5Config

from quattuor.checkpoints import tensors as stored_tensors
from quattuor.checkpoints.source import ModelSource
from quattuor.errors import CheckpointError, InputError, UnsupportedError

TOKENS = torch.arange(24).reshape(2, 12)


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Store all tensors of a folder in one file, some replaced or, with None, left out."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "llama", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_computes_what_the_saved_one_did(family: str, tmp_path: Path) -> None:
    source = ModelSource(save_tiny(tmp_path / family, family))
    model = source.whole()
    with torch.no_grad():
        expected = tiny_model(family)(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, expected)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == model.config.tie_word_embeddings


def test_a_skeleton_has_no_parameters_in_memory_but_real_buffers(folder: Path) -> None:
    model = ModelSource(folder).skeleton()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    buffers = dict(model.named_buffers())
    assert buffers["model.rotary_emb.inv_freq"].device.type == "cpu"
    assert torch.equal(buffers["model.rotary_emb.inv_freq"], tiny_model("llama").model.rotary_emb.inv_freq)


def test_only_the_requested_tensors_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(folder)
    model = source.skeleton()
    names: list[str] = []
    original = stored_tensors.SafetensorsStore.read

    def read(self: stored_tensors.SafetensorsStore, name: str) -> Tensor:
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(stored_tensors.SafetensorsStore, "read", read)
    block = model.model.layers[1]
    source.load_(block, "model.layers.1")
    assert len(names) == len(set(names)) == len(list(block.parameters()))
    assert all(name.startswith("model.layers.1.") for name in names)
    assert {parameter.device.type for parameter in model.model.layers[0].parameters()} == {"meta"}
    source.release_(block)
    assert {parameter.device.type for parameter in block.parameters()} == {"meta"}


def test_weights_come_in_the_dtype_asked_for_and_float32_by_default(tmp_path: Path) -> None:
    source = ModelSource(save_tiny(tmp_path / "bf16", "qwen2", dtype=torch.bfloat16))
    head = source.skeleton().lm_head
    source.load_(head, "lm_head")
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, tiny_model("qwen2", dtype=torch.bfloat16).lm_head.weight.float())
    source.load_(head, "lm_head", torch.bfloat16)
    assert head.weight.dtype == torch.bfloat16


def test_a_tied_head_is_read_from_the_embedding(tmp_path: Path) -> None:
    source = ModelSource(save_tiny(tmp_path / "tied", "llama_tied"))
    assert "lm_head.weight" not in source.names()
    model = source.skeleton()
    source.load_(model.lm_head, "lm_head")
    assert torch.equal(model.lm_head.weight, tiny_model("llama_tied").model.embed_tokens.weight)


@pytest.mark.parametrize("direction", ["without", "with"])
def test_the_prefix_of_the_base_model_may_be_absent_or_extra(direction: str, tmp_path: Path) -> None:
    family = "llama" if direction == "without" else "opt"
    folder = save_tiny(tmp_path / family, family)
    state: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    renamed = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if direction == "with":
        renamed = {f"model.{name}": tensor for name, tensor in renamed.items()}
    rewrite(folder, dict.fromkeys(state) | renamed)
    with torch.no_grad():
        assert torch.equal(ModelSource(folder).whole()(TOKENS).logits, tiny_model(family)(TOKENS).logits)


def test_a_single_file_is_a_model(folder: Path) -> None:
    rewrite(folder, {})
    source = ModelSource(folder / "model.safetensors")
    assert torch.equal(source.read("lm_head.weight"), tiny_model("llama").lm_head.weight)


def test_a_model_in_memory_is_a_source(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    source = ModelSource(model, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        assert torch.equal(source.whole()(TOKENS).logits, model(TOKENS).logits)
    assert source.tokenizer is not None


def test_the_tokenizer_is_found_or_none(folder: Path, tmp_path: Path) -> None:
    tokenizer = ModelSource(folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("a word").input_ids) == "a word"
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    assert ModelSource(tmp_path / "bare").tokenizer is None


def test_a_missing_path_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is not an existing path; pass a folder"):
        ModelSource(tmp_path / "nowhere")


def test_a_hub_id_out_of_reach_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"someone/some-model is neither an existing path nor a model that the hub"
    ):
        ModelSource("someone/some-model")


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin.* contain no model.safetensors.*save_pretrained"
    ):
        ModelSource(folder)


def test_a_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json=missing is needed"):
        ModelSource(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"shard={victim.name} is listed in the index but missing"):
        ModelSource(folder)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_shard_is_named_before_any_work(keep: int, folder: Path) -> None:
    victim = sorted(folder.glob("model-*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{victim.name} \(\d+ bytes\) is truncated or damaged"):
        ModelSource(folder)


def test_a_damaged_index_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index=model.safetensors.index.json cannot be read"):
        ModelSource(folder)


def test_a_tensor_promised_by_the_index_must_be_in_its_shard(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor=model.extra.weight is promised"):
        ModelSource(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, {name: None})
    source = ModelSource(folder)
    with pytest.raises(CheckpointError, match=rf"tensor={name} is not among the stored tensors"):
        source.skeleton()
    with pytest.raises(CheckpointError, match=name):
        source.load_(tiny_model("llama").model.layers[1], "model.layers.1")
    with pytest.raises(CheckpointError, match=name):
        source.read(name)


def test_a_shape_that_contradicts_the_configuration_is_named(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(folder, {name: torch.zeros(64, 63)})
    with pytest.raises(CheckpointError, match=rf"{name}=\(64, 63\) is not the shape \(64, 64\)"):
        ModelSource(folder).skeleton()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float, folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weight = tiny_model("llama").get_parameter(name).detach().clone()
    weight[3, 5] = bad
    rewrite(folder, {name: weight})
    source = ModelSource(folder)
    model = source.skeleton()
    source.load_(model.model.layers[0], "model.layers.0")
    with pytest.raises(CheckpointError, match=rf"{name}=1 of 12288 values are NaN or infinite"):
        source.load_(model.model.layers[1], "model.layers.1")


@pytest.mark.parametrize("method", ["quattuor", "gptq"])
def test_a_quantized_model_is_refused(method: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"quant_method={method} says that the model is quantized already"):
        ModelSource(folder)


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    T5Config(num_layers=1, d_model=16).save_pretrained(tmp_path)
    save_file({"shared.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"t5 is an encoder-decoder model"):
        ModelSource(tmp_path)


@pytest.mark.slow
def test_a_gguf_file_gives_what_transformers_decodes(demo_gguf: Path) -> None:
    source = ModelSource(demo_gguf)
    model = source.skeleton()
    assert isinstance(model, LlamaForCausalLM)
    block = model.model.layers[3]
    source.load_(block, "model.layers.3")
    reference = AutoModelForCausalLM.from_pretrained(
        demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32
    )
    for name, parameter in reference.model.layers[3].named_parameters():
        assert torch.equal(block.get_parameter(name), parameter), name
    assert source.tokenizer is not None
    assert source.config.architectures == ["LlamaForCausalLM"]
