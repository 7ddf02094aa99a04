# SPDX-License-Identifier: Apache-2.0
"""The commands that write and read other layouts."""

from pathlib import Path

import torch
from test_conversion import packed_model
from typer.testing import CliRunner

from quattuor.checkpoints import read_native, write_native
from quattuor.cli import app
from quattuor.recipe import Recipe


def test_there_and_back(tmp_path: Path, generator: torch.Generator) -> None:
    model = packed_model(generator)
    write_native(model, tmp_path / "native", recipe=Recipe())
    runner = CliRunner()
    there = runner.invoke(app, ["export", str(tmp_path / "native"), "--to", "gptq", "-o", str(tmp_path / "gptq")])
    assert there.exit_code == 0, there.output
    back = runner.invoke(app, ["convert", str(tmp_path / "gptq"), "-o", str(tmp_path / "back")])
    assert back.exit_code == 0, back.output
    tensors = read_native(tmp_path / "back").linears
    assert all(torch.equal(tensors[name].packed, tensor.packed) for name, tensor in model.linears.items())


def test_a_refusal_is_a_message_and_a_status(tmp_path: Path, generator: torch.Generator) -> None:
    write_native(packed_model(generator), tmp_path / "native", recipe=Recipe())
    arguments = ["export", str(tmp_path / "native"), "--to", "qqq", "-o", str(tmp_path / "qqq")]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "Error: QQQ checkpoint layout" in refused.output
    assert not (tmp_path / "qqq").exists()
