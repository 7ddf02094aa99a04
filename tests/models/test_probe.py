# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from quattuor.models import returns_tuple


class Pair(nn.Module):
    """A block that returns more than its hidden state."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states, *, mask):
        return self.linear(hidden_states) * mask[0], mask


@pytest.fixture
def block():
    return Pair()


def probe(block):
    return returns_tuple(block, torch.ones(1, 2, 8), {"mask": (torch.ones(8), None)})


def test_a_tuple_is_told_without_touching_the_block(block):
    before = block.linear.weight.clone()
    assert probe(block)
    assert block.linear.weight.device.type == "cpu"
    assert torch.equal(block.linear.weight, before)


def test_a_forward_put_on_the_block_is_set_aside_and_put_back(block):
    def stand_in(hidden_states, **_):
        raise AssertionError("the stand-in must not run")

    block.forward = stand_in
    assert probe(block)
    assert block.__dict__["forward"] is stand_in


def test_a_stand_in_comes_back_after_a_failure(block):
    block.forward = stand_in = lambda hidden_states: hidden_states
    with pytest.raises(TypeError, match="mask"):
        returns_tuple(block, torch.ones(1, 2, 8), {})
    assert block.__dict__["forward"] is stand_in


def test_a_hidden_state_is_no_tuple():
    layer = tiny_model("llama").model.layers[0]
    rope = (torch.ones(1, 4, 16), torch.ones(1, 4, 16))
    assert not returns_tuple(layer, torch.ones(1, 4, 64), {"position_embeddings": rope, "attention_mask": None})
