# SPDX-License-Identifier: Apache-2.0
"""Which engine serves what on which machine, and the words when none can."""

import dataclasses
from pathlib import Path

import pytest
import torch
from packed import pack_, recipe_of
from tiny_models import tiny_model
from typer.testing import CliRunner

from quattuor.checkpoints import save_pretrained
from quattuor.cli import app
from quattuor.errors import InputError, UnsupportedError
from quattuor.serving.launch import Machine, Options, choose_engine, vllm_command

H200 = Machine(num_gpus=2, capability=(9, 0), gpu_bytes=140 * 2**30, has_vllm=True, has_plugin=True)
LAPTOP = Machine(num_gpus=0, capability=None, gpu_bytes=0, has_vllm=False, has_plugin=True)
CHANNEL, TENSOR = "int4 channel, int8 tokens", "int5 tensor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pack_(tiny_model("llama", dtype=torch.float16), CHANNEL)
    return save_pretrained(model, tmp_path_factory.mktemp("launch") / "model", recipe=recipe_of(CHANNEL))


def test_vllm_with_a_gpu_and_transformers_without(folder: Path) -> None:
    assert choose_engine(folder, Options(), H200) == "vllm"
    assert choose_engine(folder, Options(), LAPTOP) == "transformers"
    assert choose_engine(folder, Options(engine="transformers"), H200) == "transformers"


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({"engine": "vllm"}, {"num_gpus": 0}, "GPU=none.*--engine transformers"),
        ({}, {"capability": (7, 5)}, "compute capability=7.5 is below the 8.0"),
        ({}, {"has_vllm": False}, "vLLM=missing is not installed; pip install"),
        ({}, {"has_plugin": False}, "plugin=missing.*reinstall"),
        ({"devices": 4}, {}, "--devices=4 exceeds the 2 GPUs"),
        ({}, {"gpu_bytes": 1000}, "GPU memory=0.0 GiB is less than.*raise --devices"),
        ({"engine": "transformers", "devices": 2}, {}, "--devices=2 needs vLLM"),
    ],
)
def test_what_to_change(folder: Path, options: dict[str, object], change: dict[str, object], words: str) -> None:
    machine = dataclasses.replace(H200, **change)
    with pytest.raises(UnsupportedError, match=words):
        choose_engine(folder, Options(**options), machine)


def test_a_layout_that_only_transformers_runs(tmp_path: Path) -> None:
    model = pack_(tiny_model("llama", dtype=torch.float16), TENSOR)
    folder = save_pretrained(model, tmp_path / "model", recipe=recipe_of(TENSOR))
    with pytest.raises(UnsupportedError, match="run this checkpoint with transformers"):
        choose_engine(folder, Options(), H200)
    assert choose_engine(folder, Options(), LAPTOP) == "transformers"


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        choose_engine(tmp_path, Options(), H200)


def test_the_command_states_every_choice(folder: Path) -> None:
    command = vllm_command(folder, Options(port=9000, name="mine", devices=2, max_model_len=4096))
    line = " ".join(command)
    for words in ("serve " + str(folder), "--port 9000", "--served-model-name mine", "--tensor-parallel-size 2"):
        assert words in line
    assert "--max-model-len 4096" in line
    assert "--tensor-parallel-size" not in vllm_command(folder, Options())


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine without a GPU")
def test_the_command_line(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["serve", str(folder), "--show", "--port", "9001"])
    assert shown.exit_code == 0
    assert "transformers at http://127.0.0.1:9001/v1, model model" in shown.output
    failed = CliRunner().invoke(app, ["serve", str(folder), "--show", "--engine", "vllm"])
    assert failed.exit_code == 1
    assert "GPU=none" in failed.output
