# SPDX-License-Identifier: Apache-2.0
"""Loading for measurement: which models are taken, and what the others are told."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import save_tiny, tiny_model

from quattuor.calibration.data import calibration_batches
from quattuor.checkpoints import save_pretrained
from quattuor.errors import InputError, UnsupportedError
from quattuor.evaluation.loading import load_model, max_positions, resolve_device
from quattuor.quantize import quantize
from quattuor.systems import rtn

CPU = torch.device("cpu")
TOKENS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("loading") / "llama", "llama")


@torch.no_grad()
def test_an_unquantized_folder_computes_what_was_saved(folder):
    loaded = load_model(str(folder), device=CPU)
    assert (loaded.label, loaded.name) == ("original", "llama")
    assert not loaded.model.training
    assert torch.equal(loaded.model(TOKENS).logits, tiny_model("llama")(TOKENS).logits)


@torch.no_grad()
def test_a_quantized_folder_computes_what_was_quantized(folder, tokenizer, tmp_path):
    model, recipe = tiny_model("llama"), rtn(group_size=32)
    quantize(model, recipe, calibration_batches(tokenizer, "some text " * 20, 2, 16, seed=0))
    save_pretrained(model, tmp_path / "packed", recipe=recipe, tokenizer=tokenizer)
    loaded = load_model(str(tmp_path / "packed"), device=CPU)
    assert (loaded.label, loaded.name) == ("quantized", "packed")
    assert torch.equal(loaded.model(TOKENS).logits, model(TOKENS).logits)


def test_the_dtype_is_that_of_what_is_not_packed(folder):
    loaded = load_model(str(folder), device=CPU, dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_another_librarys_layout_is_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quant_method=gptq is the layout of another library"):
        load_model(str(tmp_path), device=CPU)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match=r"tokenizer=None is missing.*tokenizer\.json"):
        load_model(str(tmp_path / "bare"), device=CPU)


def test_positions_come_from_the_configuration():
    assert max_positions(tiny_model("llama").config) == 256
    assert max_positions(SimpleNamespace()) is None


def test_devices_are_resolved_or_refused():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="device=gpu is not the name of a device"):
        resolve_device("gpu")
    with pytest.raises(InputError, match=r"device=cuda:99 is not among the \d+ CUDA devices"):
        resolve_device("cuda:99")
