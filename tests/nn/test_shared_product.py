# SPDX-License-Identifier: Apache-2.0
"""Linears that read one activation give the bits they give alone, from one product, and stay what they are."""

import copy
import dataclasses
import gc
import pickle

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from quattuor.activations import DynamicQuantizer
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup, PerTensor
from quattuor.nn import QuantizedLinear, shared_product
from quattuor.nn.shared_product import SharedProduct, reason_against_sharing
from quattuor.nn.sharing import share_inputs
from quattuor.quantize import quantize
from quattuor.scales import AbsMax, TwoLevel
from quattuor.solvers import WeightQuantizer, WeightToQuantize
from quattuor.systems import rtn

K = 32
CHANNEL = WeightQuantizer(number_format=Integer(4), granularity=PerChannel(), scales=AbsMax())
TWO_LEVEL = WeightQuantizer(number_format=TwoLevelInteger(4), granularity=PerGroup(16), scales=TwoLevel())
TENSOR = WeightQuantizer(number_format=Integer(4), granularity=PerTensor(), scales=AbsMax())
TOKENS = torch.randint(0, 255, (2, 12), generator=torch.Generator().manual_seed(1))


def linear(size, generator, quantizer=CHANNEL, bias=True, activations="int8"):
    weight = torch.randn(size, K, generator=generator)
    tensor = quantizer.solve([WeightToQuantize(name="linear", weight=weight)], {})[0].tensor
    return QuantizedLinear.from_tensor(
        tensor,
        torch.randn(size, generator=generator) if bias else None,
        DynamicQuantizer() if activations == "int8" else None,
        dtype=torch.float32,
        name=f"linear{size}",
    )


def alone(member, x):
    other = copy.deepcopy(member)
    other.share(None)
    return other(x)


def count_products(product):
    """Return a list that grows with every product."""
    calls, compute = [], product._compute

    def counted(x):
        calls.append(x.shape)
        return compute(x)

    product._compute = counted
    return calls


@pytest.mark.parametrize("quantizer", [CHANNEL, TWO_LEVEL], ids=["channel", "groups"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_product_gives_the_bits_of_each_member(quantizer, bias, generator):
    members = [linear(size, generator, quantizer, bias) for size in (24, 8, 11)]
    calls = count_products(SharedProduct(members))
    for shape in [(1, K), (2, 3, K), (0, K)]:
        x = torch.randn(shape, generator=generator)
        for member in members:
            assert torch.equal(member(x), alone(member, x))
    assert len(calls) == 3


def test_members_may_be_called_in_any_order_and_alone(generator):
    members = [linear(size, generator) for size in (24, 8, 11)]
    calls = count_products(SharedProduct(members))
    x, y = torch.randn(2, K, generator=generator), torch.randn(2, K, generator=generator)
    for place, tokens in [(2, x), (0, x), (0, y), (1, y), (1, x), (1, x), (2, y)]:
        assert torch.equal(members[place](tokens), alone(members[place], tokens))
    assert len(calls) == 5  # x; y, which drops what is left of x; x; x again, since its part is taken; y


def test_tokens_that_change_in_place_are_multiplied_again(generator):
    members = [linear(size, generator) for size in (24, 8)]
    SharedProduct(members)
    x = torch.randn(2, K, generator=generator)
    members[0](x)
    x.mul_(2)
    assert torch.equal(members[1](x), alone(members[1], x))


def test_outputs_go_with_their_tokens(generator):
    members = [linear(size, generator) for size in (24, 8)]
    product = SharedProduct(members)
    x = torch.randn(2, K, generator=generator)
    members[0](x)
    assert product._outputs is not None
    del x
    gc.collect()
    assert product._outputs is None


def test_members_that_are_not_called_together_part(generator):
    members = [linear(size, generator) for size in (24, 8)]
    product = SharedProduct(members)
    for _ in range(shared_product.MOST_WASTED):
        members[0](torch.randn(2, K, generator=generator))
    assert members[0].shared is product
    members[0](torch.randn(2, K, generator=generator))
    assert members[0].shared is members[1].shared is None
    x = torch.randn(2, K, generator=generator)
    assert torch.equal(members[1](x), alone(members[1], x))


def test_changes_of_a_member_are_seen(generator):
    members = [linear(size, generator) for size in (24, 8)]
    SharedProduct(members)
    x = torch.randn(2, K, generator=generator)

    def check():
        tokens = x.clone()
        assert all(torch.equal(member(tokens), alone(member, tokens)) for member in members)

    check()
    members[1].packed.zero_()
    check()
    members[0].bias = torch.randn(24, generator=generator)
    check()
    members[0].load_state_dict(linear(24, generator).state_dict())
    check()
    members[1].use_kernel("reference")
    assert {row.implementation for row in members[1].explain() if row.is_chosen} == {"reference"}
    check()
    members[1].use_kernel(None)
    check()


def test_copies_share_among_themselves(generator):
    members = torch.nn.ModuleList([linear(size, generator) for size in (24, 8)])
    product = SharedProduct(list(members))
    x = torch.randn(2, K, generator=generator)
    expected = [member(x) for member in members]
    for other in (copy.deepcopy(members), pickle.loads(pickle.dumps(members))):
        assert other[0].shared is other[1].shared
        assert other[0].shared is not product
        assert other[0].shared.members == tuple(other)
        assert all(torch.equal(member(x), value) for member, value in zip(other, expected, strict=True))


def test_a_shallow_copy_computes_alone(generator):
    members = [linear(size, generator) for size in (24, 8)]
    calls = count_products(SharedProduct(members))
    x = torch.randn(2, K, generator=generator)
    assert torch.equal(copy.copy(members[0])(x), alone(members[0], x))
    assert calls == []


def test_a_member_that_moves_takes_the_prepared_weight_along(generator):
    members = [linear(size, generator) for size in (24, 8)]
    product = SharedProduct(members)
    members[0](torch.randn(2, K, generator=generator))
    assert product._prepared is not None
    members[1].double()
    assert product._prepared is None


def test_what_would_change_bits_stays_apart(generator):
    first = linear(24, generator)
    wide = linear(8, generator)
    wide.in_features = 2 * K
    groups = linear(8, generator, TWO_LEVEL)
    real = [copy.deepcopy(groups) for _ in range(2)]
    for member in real:
        scale = dataclasses.replace(member.layout.parameters[0], dtype="float16")
        assert scale.name == "group_scale"
        member.layout = dataclasses.replace(member.layout, parameters=(scale, *member.layout.parameters[1:]))
    reasons = {
        "only one": [first],
        "input features differ": [first, wide],
        "formats, granularities": [first, groups],
        "some have a bias": [first, linear(8, generator, bias=False)],
        "floating-point products": [linear(8, generator, activations=None) for _ in range(2)],
        "rows share parameters": [linear(8, generator, TENSOR) for _ in range(2)],
        "floating-point group scales": real,
    }
    for part, members in reasons.items():
        assert part in reason_against_sharing(members)
    assert reason_against_sharing([first, linear(8, generator)]) is None


@pytest.mark.parametrize(
    ("family", "sites"),
    [("llama", ("qkv", "gate_up")), ("opt", ("qkv",)), ("phi3", ()), ("gemma2", ("qkv", "gate_up"))],
)
def test_a_model_computes_and_stores_the_same(family, sites):
    model = tiny_model(family)
    quantize(model, rtn(group_size=None, activation_bits=8), TOKENS)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(TOKENS).logits
        found = share_inputs(model)
        assert {name.rsplit(".", 1)[-1] for name in found} == set(sites)
        assert set(found.values()) <= {None}
        assert share_inputs(model) == found
        assert torch.equal(model(TOKENS).logits, expected)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, expected)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_linears_that_are_not_packed_or_not_integer_stay_apart():
    model = tiny_model("llama")
    assert set(share_inputs(model).values()) == {"not all of them are packed"}
    quantize(model, rtn(group_size=16), TOKENS)
    (reason,) = set(share_inputs(model).values())
    assert "floating-point products" in reason


def test_a_loaded_model_shares_and_saves_what_it_was(tmp_path):
    model = tiny_model("llama")
    quantize(model, rtn(group_size=None, activation_bits=8), TOKENS)
    with torch.no_grad():
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.shared is attention.k_proj.shared is attention.v_proj.shared is not None
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, expected)
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("quantizer", [CHANNEL, TWO_LEVEL], ids=["channel", "groups"])
def test_the_product_explains_what_it_runs(quantizer, generator):
    members = [linear(size, generator, quantizer) for size in (24, 8)]
    product = SharedProduct(members)
    members[0](torch.randn(2, K, generator=generator))
    assert product._prepared is not None
    assert members[1].explain() == product._prepared[0].execution.explain()
