# SPDX-License-Identifier: Apache-2.0
"""The decoding benchmark decodes: its harness gives the tokens of `generate`, with one program for all blocks."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from benchmarks import record
from benchmarks.end_to_end import decode
from quattuor.nn import QuantizedLinear


@pytest.mark.parametrize("format_name", decode.FORMATS)
def test_the_harness_gives_the_tokens_of_generate(
    format_name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decode.MODELS["tiny"], "hidden_size", 128)
    monkeypatch.setitem(decode.MODELS["tiny"], "intermediate_size", 256)
    model = decode.random_model("tiny", decode.FORMATS[format_name], "cpu", torch.float32)
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == (0 if format_name == "fp16" else 21)
    prompt = torch.randint(256, (20,), generator=generator)
    settings = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(prompt[None], settings, attention_mask=torch.ones(1, 20, dtype=torch.int64))[0, 20:]
    decoder = decode.Decoder(model, 32)
    decoder.prefill(prompt, 3)
    for _ in range(2):  # a second run after a rewind is the same
        decoder.rewind()
        tokens = [decoder.tokens.clone()]
        for _ in range(6):
            decoder.step()
            tokens.append(decoder.tokens.clone())
        assert torch.equal(torch.cat(tokens, dim=1), expected.expand(3, 7))


def test_random_weights_are_about_as_large_as_the_original_ones() -> None:
    first, second = (
        decode.random_model("tiny", decode.FORMATS[name], "cpu", torch.float32)
        for name in ("fp16", "quattuor_w4a8")
    )
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    outputs = [model.model.layers[0].mlp.up_proj(x).std() for model in (first, second)]
    assert 0.2 < float(outputs[1] / outputs[0]) < 5


def test_rows_say_what_was_measured_and_are_kept_at_once() -> None:
    kept: list[decode.Row] = []
    rows = decode.measure(
        "tiny", "fp16", [1, 2], device="cpu", executions=["eager"], new_tokens=2, repeats=1, keep=kept.append
    )
    assert kept == rows
    assert [(row["execution"], row["batch"], row["new_tokens"]) for row in rows] == [
        ("eager", 1, 2),
        ("eager", 2, 2),
    ]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1e3 * int(row["batch"]) / row["step_ms"])
        assert row["as_eager"] == 1.0


def test_the_command_writes_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "NEW_TOKENS", 2)
    monkeypatch.setattr(decode, "EAGER_TOKENS", 2)
    command = ["--models", "tiny", "--formats", "fp16", "--executions", "eager", "--batches", "1"]
    assert decode.main([*command, "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["tiny, random weights"]
    assert record.RESULTS not in (tmp_path / "found.json").parents
