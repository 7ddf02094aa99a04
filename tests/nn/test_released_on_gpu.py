# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: a packed linear that was called takes the memory of one weight, and is stored as before."""

import copy
import gc

import pytest
import torch
from test_gated_on_gpu import model_of
from test_replayed_on_gpu import LAYOUTS, linear, tokens

from quattuor.kernels.w4a8_linear.planes import MAX_SPLIT_TILES
from quattuor.nn.shared_product import SharedProduct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZE = 8192
ROUNDING = 512
"""Boundary of the allocator."""
COUNTERS = 2 * 4 * MAX_SPLIT_TILES
"""Most bytes that the programs of a product count in."""


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def stored_bytes(*modules):
    return sum(module.get_buffer(key).nbytes for module in modules for key in module.layout.tensor_names)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_linear_takes_the_memory_of_one_weight(name):
    linear(name)(tokens(1))  # what kernels and libraries take once
    before = allocated()
    module = linear(name, SIZE, bias=False)
    state = {key: value.cpu() for key, value in module.state_dict().items()}
    assert allocated() - before >= stored_bytes(module)
    y = module(tokens(1))
    del y
    operand = module._prepared.execution.operand
    assert stored_bytes(module) <= allocated() - before <= operand.nbytes + 8 * ROUNDING
    assert operand.nbytes <= 1.1 * stored_bytes(module) + COUNTERS
    assert module.device == torch.device("cuda", 0)
    after = module.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_a_product_of_several_takes_the_memory_of_its_members():
    linear("w4a8")(tokens(1))
    before = allocated()
    members = [linear("w4a8", size, bias=False, seed=size) for size in (SIZE, SIZE // 2, SIZE // 2)]
    SharedProduct(members)
    x = tokens(1)
    y = [member(x) for member in members]
    del x, y
    assert allocated() - before <= stored_bytes(*members) + COUNTERS + 8 * ROUNDING


@pytest.mark.parametrize("layout", ["channel", "groups"])
def test_a_model_takes_the_memory_that_it_was_loaded_with(layout):
    ids = torch.arange(9, device="cuda")[None]
    model_of(layout)(ids)
    gc.collect()
    before = allocated()
    model = model_of(layout)
    loaded = allocated() - before
    expected = model(ids).logits.clone()
    assert allocated() - before <= 1.15 * loaded + 4 * COUNTERS  # four products, whose sizes are padded
    host = copy.deepcopy(model).to("cpu")
    assert all(buffer.device.type == "cpu" for buffer in host.buffers())
    assert torch.equal(host.to("cuda")(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    for linear_ in (model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.q_proj):
        rows = linear_.explain()
        assert rows == linear_.explain()
        assert any(row.is_chosen and row.implementation != "float32" for row in rows)


def test_a_weight_that_is_kept_stays():
    module = linear("w4a8")
    module.keeps_stored = True
    module(tokens(1))
    assert module.packed.is_cuda


def test_inference_mode_leaves_buffers_that_can_be_loaded():
    module, other = linear("w4a8"), linear("w4a8", seed=1)
    with torch.inference_mode():
        module(tokens(1))
    assert not module.packed.is_cuda
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(tokens(1)), other(tokens(1)))
    module.half().to("cuda")
    assert module.packed.is_cuda
    assert torch.equal(module(tokens(1)), other(tokens(1)))
