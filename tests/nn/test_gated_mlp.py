# SPDX-License-Identifier: Apache-2.0
"""Feed-forward modules of two products give the bits of their own class, and stay what they are."""

import copy
import dataclasses
import pickle

import pytest
import torch
from test_shared_product import TOKENS
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from quattuor.nn import ExtraLayout, gated_mlp
from quattuor.nn.gated_mlp import GatedMlp, join_gates
from quattuor.nn.sharing import share_inputs
from quattuor.quantize import quantize
from quattuor.systems import rtn

DELTA = ExtraLayout(role="delta", kind="ColumnDelta", name="values", dtype="float16", shape=(64, 1))


def packed(family="llama", activation_bits=8, **fields):
    model = tiny_model(family, **fields)
    quantize(model, rtn(group_size=None, activation_bits=activation_bits), TOKENS)
    return model


def joined(family="llama", **fields):
    model = packed(family, **fields)
    share_inputs(model)
    assert set(join_gates(model).values()) == {None}
    return model


def mlp_of(model, index=0):
    return model.model.layers[index].mlp


def count(monkeypatch):
    """Return a list of token counts that grows with every call that gates and quantizes at once."""
    calls, compute = [], gated_mlp._GatedProducts.linear

    def counted(products, x, bias, out_dtype):
        calls.append(x.shape[0])
        return compute(products, x, bias, out_dtype)

    monkeypatch.setattr(gated_mlp._GatedProducts, "linear", counted)
    return calls


def own(mlp, x):
    """Return what the module's own class computes."""
    return type(mlp)._original.forward(mlp, x)


@pytest.fixture
def x(generator):
    return torch.randn(2, 3, 64, generator=generator)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_a_model_computes_and_stores_the_same(family, monkeypatch):
    calls = count(monkeypatch)
    model = packed(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share_inputs(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert calls == []
        found = join_gates(model)
        assert found == {"model.layers.0": None, "model.layers.1": None}
        assert join_gates(model) == found
        assert torch.equal(model(TOKENS).logits, expected)
        assert calls == [TOKENS.numel()] * 2
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, expected)
    assert len(calls) == 4
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (2, 3, 64), (0, 64)])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_both_paths_give_the_same_bits(dtype, shape, mlp_bias, monkeypatch, generator):
    mlp = mlp_of(joined(mlp_bias=mlp_bias).to(dtype))
    calls = count(monkeypatch)
    x = torch.randn(shape, generator=generator).to(dtype)
    y = mlp(x)
    assert len(calls) == 1
    assert y.dtype == dtype
    assert torch.equal(y, own(mlp, x))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "opt"])
def test_another_activation_or_no_gate_is_left_alone(family):
    model = packed(family)
    share_inputs(model)
    before = [type(module) for module in model.modules()]
    (reason,) = set(join_gates(model).values())
    assert ("no gate" if family == "opt" else "something else") in reason
    assert [type(module) for module in model.modules()] == before


def test_an_unknown_architecture_is_left_alone():
    model = joined()
    model.config.model_type = "unknown"
    assert join_gates(model) == {}


def test_linears_that_do_not_fit_are_left_alone():
    model = tiny_model("llama")
    assert set(join_gates(model).values()) == {"not all of them are packed"}
    weights_only = packed(activation_bits=None)
    share_inputs(weights_only)
    assert "not quantized" in join_gates(weights_only)["model.layers.0"]
    apart = packed()
    assert "not computed by one product" in join_gates(apart)["model.layers.0"]
    share_inputs(apart)
    down = mlp_of(apart).down_proj
    down.layout = dataclasses.replace(down.layout, extras=(DELTA,))
    found = join_gates(apart)
    assert "belongs to the whole weight" in found["model.layers.0"]
    assert found["model.layers.1"] is None


class Scaled(LlamaMLP):
    """Multiplies once more than its class."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.5)


class Added(LlamaMLP):
    """Adds its inputs."""

    def forward(self, x):
        return x + super().forward(x)


class Dropped(LlamaMLP):
    """Computes something else while it is trained."""

    def forward(self, x):
        return super().forward(2 * x if self.training else x)


class Switched(LlamaMLP):
    """Takes more than tokens."""

    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


@pytest.mark.parametrize("other", [Scaled, Added, Dropped, Switched])
def test_a_module_that_computes_something_else_is_left_alone(other, x):
    model = packed()
    share_inputs(model)
    mlp = mlp_of(model)
    mlp.__class__ = other
    expected = mlp(x)
    assert "something else" in join_gates(model)["model.layers.0"]
    assert type(mlp) is other
    assert torch.equal(mlp(x), expected)


def test_a_forward_of_the_instance_is_left_alone(x):
    model = packed()
    share_inputs(model)
    mlp_of(model).forward = lambda x: 2 * x
    assert "something else" in join_gates(model)["model.layers.0"]
    assert torch.equal(mlp_of(model)(x), 2 * x)


@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj", "act_fn"])
def test_hooks_see_every_call(child, x, monkeypatch):
    mlp, seen = mlp_of(joined()), []
    expected = mlp(x)
    calls = count(monkeypatch)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(getattr(mlp, child), register)(lambda *arguments: seen.append(arguments[1][0]))
        assert torch.equal(mlp(x), expected)
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    assert torch.equal(mlp(x), expected)
    handle.remove()
    assert calls == []
    assert len(seen) == 2 + 5
    assert torch.equal(mlp(x), expected)
    assert len(calls) == 1


def test_a_hook_may_change_what_down_reads(x):
    mlp = mlp_of(joined())
    mlp.down_proj.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))
    expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert torch.equal(mlp(x), expected)
    assert not torch.equal(mlp(x), mlp_of(joined())(x))


def test_children_that_are_replaced_or_wrapped_are_called(x):
    mlp = mlp_of(joined())
    down, expected = mlp.down_proj, mlp(x)
    mlp.down_proj = nn.Sequential(down, nn.Hardtanh(-0.1, 0.1))
    assert torch.equal(mlp(x), expected.clamp(-0.1, 0.1))
    mlp.down_proj = down
    down.forward = lambda x: type(down).forward(down, x) + 1
    assert torch.equal(mlp(x), expected + 1)
    del down.forward
    assert torch.equal(mlp(x), expected)


def test_changes_of_the_weights_are_seen(x):
    mlp, other = mlp_of(joined()), mlp_of(joined(), 1)

    def check():
        assert torch.equal(mlp(x), own(mlp, x))
        return mlp(x)

    results = [check()]
    mlp.load_state_dict(other.state_dict())
    results.append(check())
    mlp.down_proj.packed.zero_()
    results.append(check())
    mlp.load_state_dict(other.state_dict())
    mlp.gate_proj.packed.copy_(mlp.gate_proj.packed.flip(0))
    results.append(check())
    mlp.down_proj.use_kernel("reference")
    assert torch.equal(check(), results[-1])
    mlp.up_proj.use_kernel("reference")
    assert torch.equal(check(), results[-1])
    assert len({tuple(result.flatten().tolist()) for result in results}) == len(results)


def test_gate_and_up_that_part_are_called_one_by_one(x, monkeypatch):
    mlp = mlp_of(joined())
    expected, calls = mlp(x), count(monkeypatch)
    mlp.gate_proj.shared.dissolve()
    assert torch.equal(mlp(x), expected)
    assert calls == []


def test_copies_compute_with_their_own_weights(x, monkeypatch):
    model = joined()
    expected, calls = mlp_of(model)(x), count(monkeypatch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = mlp_of(other)
        assert type(mlp) is type(mlp_of(model))
        assert isinstance(mlp, LlamaMLP)
        assert torch.equal(mlp(x), expected)
        mlp.down_proj.packed.zero_()
        assert not torch.equal(mlp(x), expected)
    assert len(calls) == 4
    assert torch.equal(mlp_of(model)(x), expected)


def test_a_replica_calls_its_own_children(x, monkeypatch):
    mlp = mlp_of(joined())
    expected, calls = mlp(x), count(monkeypatch)
    replica = mlp._replicate_for_data_parallel()
    replica._modules["down_proj"] = nn.Identity()
    assert replica(x).shape == (2, 3, 192)
    assert calls == []
    assert torch.equal(mlp(x), expected)


def test_a_model_moves_and_casts(monkeypatch):
    model = joined()
    with torch.no_grad():
        expected = model(TOKENS).logits
        calls = count(monkeypatch)
        model.to(torch.float64).to(torch.float32)
        assert torch.equal(model(TOKENS).logits, expected)
        assert len(calls) == 2
        state = copy.deepcopy(model.state_dict())
        model.to("meta").to_empty(device="cpu")
        model.load_state_dict(state, strict=True)
        model.model.rotary_emb = copy.deepcopy(joined().model.rotary_emb)
        assert torch.equal(model(TOKENS).logits, expected)
        assert len(calls) == 4


def test_a_gradient_takes_the_modules_own_path(x, monkeypatch):
    calls = count(monkeypatch)
    mlp_of(joined())(x.requires_grad_())
    assert calls == []


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}], ids=str)
def test_a_loaded_model_is_joined_and_saves_what_it_was(device_map, tmp_path):
    model = packed()
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", device_map=device_map)
    assert isinstance(mlp_of(loaded), GatedMlp)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
