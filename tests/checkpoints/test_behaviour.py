# SPDX-License-Identifier: Apache-2.0
"""Streamed predictions equal those of the loaded model, and divergence is the formula it claims to be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed import pack_
from tiny_models import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import quattuor
from quattuor.checkpoints import ModelSource, save_pretrained
from quattuor.checkpoints.behaviour import divergence_from, source_logits, stored_logits
from quattuor.quantize import quantize_to_folder
from quattuor.systems import qqq

Tiny = Callable[[str], PreTrainedModel]
TOKENS = torch.arange(3, 40)


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gemma2", "phi3", "opt"])
def test_streamed_logits_are_those_of_the_loaded_models(family: str, tiny: Tiny, tmp_path: Path) -> None:
    original = tiny(family)
    with torch.no_grad():
        expected = original(input_ids=TOKENS[None]).logits[0]
    assert torch.equal(source_logits(ModelSource(original), TOKENS), expected)

    folder = save_pretrained(pack_(tiny(family), "int4 channel, int8 tokens"), tmp_path / "packed")
    assert quattuor.__version__  # the import registers the format
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = loaded(input_ids=TOKENS[None]).logits[0]
    assert torch.equal(stored_logits(folder, TOKENS), expected)


def test_a_stored_source_is_read_module_by_module(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "source", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=TOKENS[None]).logits[0]
    assert torch.equal(source_logits(ModelSource(folder), TOKENS), expected)


def test_divergence_is_the_kl_of_the_formula(tiny: Tiny, tmp_path: Path) -> None:
    source = ModelSource(tiny("llama"))
    folder = save_pretrained(pack_(tiny("llama"), "uint3 group 32"), tmp_path / "packed")
    found = divergence_from(source, folder)
    tokens = torch.randint(256, (64,), generator=torch.Generator().manual_seed(0))
    p, q = (source_logits(source, tokens).softmax(-1), stored_logits(folder, tokens).softmax(-1))
    assert found.nats == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found.uniform_nats == pytest.approx(float((p * (p * 256).log()).sum(-1).mean()), rel=1e-4)
    assert 0 < found.nats < 0.3 * found.uniform_nats
    assert (found.num_tokens, found.has_text) == (64, False)
    assert "random tokens (the source has no tokenizer)" in str(found)


@pytest.mark.parametrize("family", ["opt", "llama_tied"])
def test_the_default_rotation_of_qqq_keeps_the_predictions(family: str, tiny: Tiny, tmp_path: Path) -> None:
    source = ModelSource(tiny(family))
    tokens = torch.randint(255, (16, 64), generator=torch.Generator().manual_seed(1))
    quantize_to_folder(source, qqq(bits=8), tokens, tmp_path / "packed")
    found = divergence_from(source, tmp_path / "packed")
    assert found.nats < 0.01 * found.uniform_nats


def test_prose_is_read_when_there_is_a_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_pretrained(pack_(tiny("llama")), tmp_path / "packed")
    with_text = divergence_from(ModelSource(tiny("llama"), tokenizer=tiny_tokenizer()), folder)
    assert with_text.has_text
    assert "64 tokens of prose" in str(with_text)
    assert with_text.nats != divergence_from(ModelSource(tiny("llama")), folder).nats


def test_a_short_context_gets_fewer_tokens(tmp_path: Path, tiny: Tiny) -> None:
    short = tiny("llama")
    short.config.max_position_embeddings = 8
    folder = save_pretrained(pack_(tiny("llama")), tmp_path / "packed")
    assert divergence_from(ModelSource(short), folder).num_tokens == 8
