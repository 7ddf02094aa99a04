# SPDX-License-Identifier: Apache-2.0
"""Streaming a model block by block writes the same checkpoint as quantizing it in memory."""

import hashlib
from pathlib import Path

import pytest
import torch
from packed import DEFAULT, recipe_of
from tiny_models import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from quattuor.checkpoints import CheckpointWriter, ModelSource, StreamingStore, save_pretrained, verify
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.systems import qqq

TOKENS = torch.arange(64).reshape(4, 16) * 3 % 251


def stream(source: ModelSource, recipe: Recipe, folder: Path) -> Path:
    model = source.skeleton()
    with CheckpointWriter(folder, max_shard_bytes=100_000) as writer:
        store = StreamingStore(source, writer, model)
        report = quantize(model, recipe, TOKENS, store=store)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        packed = [buffer for name, buffer in model.named_buffers() if name.endswith(".packed")]
        assert {buffer.device.type for buffer in packed} == {"meta"}
        return writer.finish(
            model.config, recipe, store.layouts, report.to_dict(), tiny_tokenizer(), source.generation_config
        )


@pytest.mark.parametrize(
    ("family", "system"), [("llama", "plain"), ("llama_tied", "plain"), ("opt", "plain"), ("llama_tied", "qqq")]
)
def test_streamed_and_in_memory_checkpoints_are_equal(family: str, system: str, tmp_path: Path) -> None:
    recipe = recipe_of(DEFAULT) if system == "plain" else qqq(group_size=32)
    source = ModelSource(save_tiny(tmp_path / "original", family))
    folder = stream(source, recipe, tmp_path / "streamed")
    model = source.whole()
    report = quantize(model, recipe, TOKENS)
    direct = save_pretrained(model, tmp_path / "direct", recipe=recipe, report=report.to_dict())
    streamed, in_memory = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, direct))
    left, right = streamed.state_dict(), in_memory.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert streamed.config.tie_word_embeddings == in_memory.config.tie_word_embeddings
    rows = verify(folder, source)
    assert any("reconstruction" in row.checks for row in rows)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_source_in_memory_gives_the_same_and_stays_as_it_was(family: str, tmp_path: Path) -> None:
    stored = ModelSource(save_tiny(tmp_path / "original", family))
    model = stored.whole()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = qqq(group_size=32)
    folders = [
        stream(source, recipe, tmp_path / name)
        for source, name in ((stored, "disk"), (ModelSource(model), "memory"))
    ]
    left, right = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in folders)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert not torch.equal(right["lm_head.weight"], right["model.embed_tokens.weight"])
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == []


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    source = ModelSource(save_tiny(tmp_path / "original", "llama"))
    digests = []
    for name in ("first", "second"):
        folder = stream(source, recipe_of(DEFAULT), tmp_path / name)
        files = sorted(folder.glob("*.safetensors"))
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
