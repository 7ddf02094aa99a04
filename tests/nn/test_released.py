# SPDX-License-Identifier: Apache-2.0
"""Stored tensors wait in host memory while a device holds what kernels read; here the host is the device too."""

import copy
import io
import pickle

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from test_linear import CHANNEL, PLAIN, TENSORS, TWO_LEVEL, linear_of, packed, with_columns
from test_shared_product import TOKENS
from tiny_models import tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from quattuor.activations import DynamicQuantizer
from quattuor.nn import linear as linear_file
from quattuor.nn.gated_mlp import join_gates
from quattuor.nn.shared_product import SharedProduct
from quattuor.nn.sharing import share_inputs
from quattuor.quantize import quantize
from quattuor.systems import rtn
from quattuor.training.weak_columns import keep_columns_, make_tunable_

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def host_is_a_device(monkeypatch):
    monkeypatch.setattr(linear_file, "has_own_memory", lambda device: True)


@pytest.fixture
def x(generator):
    return torch.randn(5, 32, generator=generator)


def cloned(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def memory_of(module):
    """Return what tells whether the memory of the stored codes is still taken."""
    return StorageWeakRef(module.get_buffer("packed").untyped_storage())


def check_state(module, state):
    after = module.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS.keys())
def test_a_call_frees_the_codes_and_the_state_stays(make, generator, x):
    expected, _ = linear_of(make(generator))
    expected.keeps_stored = True
    module = copy.deepcopy(expected)
    module.keeps_stored = False
    state, memory, kept = cloned(module), memory_of(module), memory_of(expected)
    for _ in range(2):
        assert torch.equal(module(x), expected(x))
    assert memory.expired()
    assert not kept.expired()
    check_state(module, state)
    assert module.device == DEVICE


def test_a_weight_that_is_decoded_on_each_call_is_the_stored_one(generator, x):
    module, _ = linear_of(with_columns(generator))
    module.use_kernel("reference")
    memory = memory_of(module)
    module(x)
    assert not memory.expired()
    assert module._prepared.execution.tensor.packed is module.packed


@pytest.mark.parametrize("quantizer", [CHANNEL, TWO_LEVEL, PLAIN], ids=["channel", "two levels", "weights only"])
def test_a_weight_is_laid_out_once(quantizer, generator, x):
    activations = None if quantizer is PLAIN else DynamicQuantizer()
    module, _ = linear_of(packed(quantizer, generator), activations)
    expected = module(x)
    prepared = module._prepared
    assert torch.equal(module(x), expected)
    assert module._prepared is prepared


def test_members_of_a_product_free_their_codes(generator, x):
    members = [linear_of(packed(CHANNEL, generator), DynamicQuantizer())[0] for _ in range(3)]
    expected = [copy.deepcopy(member)(x) for member in members]
    states, memories = [cloned(member) for member in members], [memory_of(member) for member in members]
    product = SharedProduct(members)
    for _ in range(2):
        assert all(torch.equal(member(x), y) for member, y in zip(members, expected, strict=True))
    prepared = product._prepared
    assert all(memory.expired() for memory in memories)
    assert all(member._prepared is None for member in members)
    members[0](x.clone())
    assert product._prepared is prepared
    for member, state in zip(members, states, strict=True):
        check_state(member, state)
    product.dissolve()
    assert all(torch.equal(member(x), y) for member, y in zip(members, expected, strict=True))


def test_what_is_loaded_or_changed_is_seen(generator, x):
    module, other = (linear_of(packed(CHANNEL, generator), DynamicQuantizer())[0] for _ in range(2))
    first, second = module(x), other(x)
    assert not torch.equal(first, second)
    mine = cloned(module)
    for assign in (False, True):
        module.load_state_dict(cloned(other), assign=assign)
        assert torch.equal(module(x), second)
        module.load_state_dict(mine, assign=assign)
        assert torch.equal(module(x), first)
    module.packed.copy_(other.packed)
    module.packed = module.packed.clone()
    module.scale = other.scale.clone()
    assert torch.equal(module(x), second)


@pytest.mark.parametrize("name", ["channel", "maps"])
def test_copies_and_pickles_begin_with_what_is_stored(name, generator, x):
    tensor = packed(CHANNEL, generator) if name == "channel" else TENSORS[name](generator)
    module, _ = linear_of(tensor, DynamicQuantizer() if name == "channel" else None)
    expected, state = module(x), cloned(module)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False, map_location="cpu")
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, copy.copy(module)):
        assert other._prepared is None
        check_state(other, state)
        assert torch.equal(other(x), expected)
    assert torch.equal(module(x), expected)


def test_a_move_takes_the_weight_along(generator, x):
    module, _ = linear_of(packed(CHANNEL, generator), DynamicQuantizer())
    expected, state = module(x), cloned(module)
    module._home = torch.device("meta")
    assert module.device.type == "meta"
    module.double().float()
    assert module.device.type == "meta"  # casting moves nothing
    assert module.packed.device == DEVICE
    module._apply(lambda tensor: tensor if tensor.device == DEVICE else torch.empty_like(tensor, device=DEVICE))
    assert module.device == DEVICE
    check_state(module, state)
    assert torch.equal(module(x), expected)
    module.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(x), expected)


def test_a_pickle_forgets_a_device_that_is_not_there(generator, monkeypatch):
    module, _ = linear_of(packed(CHANNEL, generator))
    module._home = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pickle.loads(pickle.dumps(module)).device == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert pickle.loads(pickle.dumps(module)).device == DEVICE


def test_inference_mode_leaves_a_weight_that_can_be_changed(generator, x):
    module, _ = linear_of(packed(CHANNEL, generator), DynamicQuantizer())
    with torch.inference_mode():
        expected = module(x)
    module.load_state_dict(cloned(module))
    assert torch.equal(module(x), expected)


def test_a_replica_is_not_released(generator, x):
    module, _ = linear_of(packed(CHANNEL, generator), DynamicQuantizer())
    memory = memory_of(module)
    replica = module._replicate_for_data_parallel()
    replica(x)
    assert not memory.expired()
    assert replica.packed is module.packed


def model_and_logits(**fields):
    model = tiny_model("llama", **fields)
    quantize(model, rtn(group_size=None, activation_bits=8), TOKENS)
    with torch.no_grad():
        return copy.deepcopy(model), model(TOKENS).logits


def test_a_model_saves_what_it_was_loaded_from(tmp_path):
    model, expected = model_and_logits()
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    memories = [memory_of(item) for item in loaded.modules() if isinstance(item, linear_file.QuantizedLinear)]
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, expected)
    assert len(memories) == 14
    assert all(memory.expired() for memory in memories)
    loaded.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_tensors_that_accelerate_brings_leave_with_it():
    model, expected = model_and_logits()
    share_inputs(model)
    state = cloned(model)
    cpu_offload(model, execution_device=DEVICE, offload_buffers=True)
    join_gates(model)
    linears = [item for item in model.modules() if isinstance(item, linear_file.QuantizedLinear)]
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, expected)
        assert all(linear.packed.device.type == "meta" for linear in linears)
        assert all(linear._prepared is None for linear in linears)
    assert all(
        torch.equal(
            model.model.layers[0].self_attn.q_proj._hf_hook.weights_map[key],
            state[f"model.layers.0.self_attn.q_proj.{key}"],
        )
        for key in ("packed", "scale")
    )


def test_a_model_on_several_devices_releases():
    model, expected = model_and_logits()
    share_inputs(model)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu"}
    dispatch_model(model, {**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}, force_hooks=True)
    memory = memory_of(model.model.layers[1].mlp.down_proj)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)
        assert torch.equal(model(TOKENS).logits, expected)
    assert memory.expired()


def test_weak_columns_are_trained_where_the_weight_runs(generator, x):
    model = torch.nn.Sequential(linear_of(with_columns(generator))[0])
    expected = model(x)
    (values,) = make_tunable_(model).values()
    assert torch.allclose(model(x), expected, atol=1e-5)
    memory = memory_of(model[0].codes)
    tokens = x.clone().requires_grad_()
    model(tokens).sum().backward()
    assert not memory.expired()
    assert tokens.grad.abs().sum() > 0
    assert values.grad.abs().sum() > 0
    keep_columns_(model)
    assert torch.equal(model(x), expected)
