# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint format returns identical bits for every layout that it accepts; a new member is one row."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from quattuor.checkpoints import CHECKPOINTS, PackedModel
from quattuor.errors import UnsupportedError
from quattuor.quantized_tensor import QuantizedTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
from packed import LAYOUTS, pack_

ACCEPTED: dict[str, frozenset[str]] = {
    "quattuor": frozenset(LAYOUTS),
    "qqq": frozenset({"int4 channel, int8 tokens", "int4 group 128 two levels float16, int8 tokens"}),
}
"""Which rows of `LAYOUTS` each format holds; every other pair must be refused."""


def model_of(layout: str) -> PreTrainedModel:
    """Return a packed model whose sizes suit the tiles of every format."""
    model = tiny_model("llama", hidden_size=128, head_dim=32, intermediate_size=256, dtype=torch.float16)
    return pack_(model, layout)


def assert_same_bits(first: QuantizedTensor, second: QuantizedTensor) -> None:
    assert (first.number_format, first.granularity) == (second.number_format, second.granularity)
    left, right = first.state(), second.state()
    assert left.keys() == right.keys()
    for leaf, value in left.items():
        assert value.dtype == right[leaf].dtype
        assert torch.equal(value.view(torch.uint8), right[leaf].view(torch.uint8))


def test_the_table_names_every_format() -> None:
    assert ACCEPTED.keys() == CHECKPOINTS.keys()
    assert all(layouts <= LAYOUTS.keys() for layouts in ACCEPTED.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_identical_bits_or_a_refusal(name: str, layout: str, tmp_path: Path) -> None:
    form, packed = CHECKPOINTS[name], PackedModel.from_model(model_of(layout))
    reasons = [form.refuses(key, tensor, packed.activations[key]) for key, tensor in packed.linears.items()]
    if layout not in ACCEPTED[name]:
        assert any(reasons)
        with pytest.raises(UnsupportedError):
            form.write(packed, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return
    assert not any(reasons)
    read = form.read(form.write(packed, tmp_path / "out"))
    assert read.linears.keys() == packed.linears.keys()
    for key, tensor in packed.linears.items():
        assert_same_bits(read.linears[key], tensor)
    assert read.activations == packed.activations
    assert read.dense.keys() == packed.dense.keys()
    assert all(torch.equal(read.dense[key], tensor) for key, tensor in packed.dense.items())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_writing_is_deterministic(name: str, tmp_path: Path) -> None:
    packed = PackedModel.from_model(model_of("int4 channel, int8 tokens"))
    first = CHECKPOINTS[name].write(packed, tmp_path / "first")
    second = CHECKPOINTS[name].write(packed, tmp_path / "second")
    for file in first.glob("*.safetensors"):
        assert file.read_bytes() == (second / file.name).read_bytes()
