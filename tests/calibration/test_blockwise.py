# SPDX-License-Identifier: Apache-2.0
"""Blocks run one by one compute what the model computes, and every site shows its own tokens."""

import copy

import pytest
import torch
from tiny_models import FAMILIES

from quattuor.activations import DynamicQuantizer
from quattuor.calibration.blockwise import capture_inputs
from quattuor.errors import CalibrationError, InputError
from quattuor.models import describe

CPU = torch.device("cpu")


@pytest.fixture
def tokens(generator):
    """Five sequences, longer than the sliding windows of the tiny models."""
    return torch.randint(0, 255, (5, 24), generator=generator)


def capture(model, tokens, batch_size=2):
    return capture_inputs(model, describe(model.config), tokens, batch_size=batch_size, device=CPU, storage=CPU)


def blocks_of(model):
    return list(model.get_submodule(describe(model.config).blocks))


def sites_of(model):
    description = describe(model.config)
    return description.sites(description.activation(model.config.to_dict()))


@torch.no_grad()
def watch(model, modules, tokens):
    """Return, for each module, what it read and what it returned in plain forward passes of the whole model."""
    seen = {name: [] for name in modules}

    def hook_for(name):
        return lambda _, inputs, output: seen[name].append(
            (inputs[0], output[0] if isinstance(output, tuple) else output)
        )

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    for batch in tokens:
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_after_another_are_the_model(tiny, tokens, family, batch_size):
    model = tiny(family)
    blocks = blocks_of(model)
    batches = tokens.split(batch_size)
    expected = watch(model, dict(enumerate(blocks)), batches)
    hidden, runner = capture(model, tokens, batch_size)
    assert [len(batch) for batch in hidden] == [len(batch) for batch in batches]
    for index, block in enumerate(blocks):
        assert all(torch.equal(x, seen[0]) for x, seen in zip(hidden, expected[index], strict=True)), index
        hidden = runner.run(block, index, hidden)
    assert all(torch.equal(x, seen[1]) for x, seen in zip(hidden, expected[index], strict=True))


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_each_block_gets_its_own_mask(tiny, tokens, family):
    """Blocks with a sliding window and without differ; swapping their arguments changes the output."""
    model = tiny(family)
    hidden, runner = capture(model, tokens)
    block = blocks_of(model)[0]
    straight, swapped = runner.run(block, 0, hidden), runner.run(block, 1, hidden)
    assert torch.equal(straight[0], swapped[0]) == (family == "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_whole_model(tiny, tokens, family):
    model = tiny(family)
    hidden, runner = capture(model, tokens)
    needs = {site: frozenset({"hessian", "abs_max"}) for site in sites_of(model)}
    for index, block in enumerate(blocks_of(model)):
        linears = {site: block.get_submodule(site.consumers[-1]) for site in needs}
        seen = watch(model, linears, [tokens])
        collected = runner.collect(block, index, hidden, needs)
        for site in needs:
            x = seen[site][0][0].flatten(0, -2).double()
            found = collected[site]
            assert found.keys() == {"hessian", "abs_max"}
            hessian = x.T @ x / len(x)
            torch.testing.assert_close(found["hessian"].double(), hessian, rtol=1e-4, atol=1e-5 * hessian.max())
            torch.testing.assert_close(found["abs_max"].double(), x.abs().amax(0), rtol=1e-4, atol=1e-5)
        hidden = runner.run(block, index, hidden)


def test_statistics_of_rounded_inputs(tiny, tokens):
    model = tiny("llama")
    hidden, runner = capture(model, tokens)
    site, block = sites_of(model)[3], blocks_of(model)[0]
    rounding = DynamicQuantizer().fake_quantize
    collected = runner.collect(block, 0, hidden, {site: frozenset({"hessian"})}, rounding)[site]["hessian"]
    x = torch.cat(runner.site_inputs(block, 0, hidden, site)).flatten(0, 1)
    rounded = rounding(x)
    torch.testing.assert_close(collected, rounded.T @ rounded / len(x), rtol=1e-4, atol=1e-6)
    assert (collected - x.T @ x / len(x)).norm() > 1e-5 * collected.norm()


def test_sites_without_needs_cost_no_pass(tiny, tokens):
    model = tiny("llama")
    hidden, runner = capture(model, tokens)
    qkv, output, gate_up, down = sites_of(model)
    block, calls = blocks_of(model)[0], []
    for site in (qkv, output, gate_up, down):
        path = site.consumers[-1]
        block.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    nothing = frozenset()
    empty = dict.fromkeys((qkv, output, gate_up, down), nothing)
    assert runner.collect(block, 0, hidden, empty) == {site: {} for site in empty}
    assert calls == []
    needs = {qkv: nothing, output: frozenset({"hessian"}), gate_up: nothing, down: nothing}
    collected = runner.collect(block, 0, hidden, needs)
    assert [bool(collected[site]) for site in needs] == [False, True, False, False]
    assert calls == ["self_attn.v_proj"] * len(hidden), "a pass ends where its last site has been seen"


@torch.no_grad()
def test_the_original_stream_meets_its_own_tokens(tiny, tokens):
    model = tiny("llama")
    hidden, runner = capture(model, tokens)
    original, block = blocks_of(model)[0], copy.deepcopy(blocks_of(model)[0])
    drifted = [batch + 0.1 * torch.sin(torch.arange(batch.numel())).view(batch.shape) for batch in hidden]
    for parameter in block.parameters():
        parameter.mul_(1.1)
    needs = {site: frozenset({"hessian", "cross"}) for site in sites_of(model)}
    collected = runner.collect(block, 0, drifted, needs, None, (original, hidden))
    for site in needs:
        x = torch.cat(runner.site_inputs(original, 0, hidden, site)).flatten(0, 1)
        v = torch.cat(runner.site_inputs(block, 0, drifted, site)).flatten(0, 1)
        for name, first in (("cross", x), ("hessian", v)):
            expected = first.T @ v / len(x)
            torch.testing.assert_close(
                collected[site][name], expected, rtol=1e-3, atol=1e-4 * expected.abs().max()
            )
        wrong = x.flip(0).T @ v / len(x)
        assert (collected[site]["cross"] - wrong).norm() > 0.1 * wrong.norm()


@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_site_inputs_keep_batches_and_sequences(tiny, tokens, family):
    """OPT flattens the tokens before its feed-forward linears."""
    model = tiny(family)
    hidden, runner = capture(model, tokens)
    for site in sites_of(model):
        block = blocks_of(model)[0]
        linear = block.get_submodule(site.consumers[0])
        seen = watch(model, {"linear": linear}, tokens.split(2))["linear"]
        inputs = runner.site_inputs(block, 0, hidden, site)
        for x, batch, (expected, _) in zip(inputs, hidden, seen, strict=True):
            assert x.shape == (*batch.shape[:-1], linear.in_features)
            assert torch.equal(x.flatten(), expected.flatten()), site.name


def test_intercepted_input_is_that_of_the_whole_block(tiny, tokens):
    model = tiny("llama")
    hidden, runner = capture(model, tokens)
    block = blocks_of(model)[0]
    qkv, output, _, _ = sites_of(model)
    x = runner.site_inputs(block, 0, hidden, qkv)[0]
    expected = runner.site_inputs(block, 0, hidden, output)[0]
    attention = block.self_attn
    found = runner.intercept(attention, attention.o_proj, x, runner.arguments(0, CPU))
    assert torch.equal(found, expected)
    assert not attention.o_proj._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_their_block(tiny, tokens, family, value):
    model = tiny(family)
    blocks = blocks_of(model)
    blocks[1].get_submodule(sites_of(model)[3].consumers[0]).weight.data[3, 5] = value
    hidden, runner = capture(model, tokens)
    hidden = runner.run(blocks[0], 0, hidden)
    with pytest.raises(
        CalibrationError, match=r"layers\.1: hidden state=NaN or infinity .*check the model's weights"
    ):
        runner.run(blocks[1], 1, hidden)


def test_embeddings_that_are_not_finite_name_the_first_block(tiny, tokens):
    model = tiny("llama")
    model.model.embed_tokens.weight.data[int(tokens[4, 0])] = float("nan")
    hidden, runner = capture(model, tokens)
    with pytest.raises(CalibrationError, match=r"model\.layers\.0: hidden state"):
        runner.run(blocks_of(model)[0], 0, hidden)


def forwards(model):
    return [block.__dict__.get("forward") for block in blocks_of(model)]


def test_forwards_are_back_after_capture(tiny, tokens):
    model = tiny("llama")
    expected = model(tokens).logits
    own = blocks_of(model)[1].forward
    blocks_of(model)[1].forward = own  # as wrappers of modules do: an attribute of the instance
    capture(model, tokens)
    assert forwards(model) == [None, own]
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("bad", [0, 4], ids=["first pass", "second pass"])
def test_forwards_are_back_after_an_exception(tiny, tokens, bad):
    model = tiny("opt")
    expected = model(tokens).logits
    wrong = tokens.clone()
    wrong[bad, 3] = 256
    with pytest.raises(IndexError):
        capture(model, wrong)
    assert forwards(model) == [None, None]
    assert torch.equal(model(tokens).logits, expected)


def test_hooks_are_gone_after_an_exception(tiny, tokens):
    model = tiny("llama")
    hidden, runner = capture(model, tokens)
    block = blocks_of(model)[0]

    def fail(_):
        raise InputError("on purpose")

    with pytest.raises(InputError, match="on purpose"):
        runner.visit(block, 0, hidden, {"mlp.down_proj": fail})
    assert not block.mlp.down_proj._forward_pre_hooks


def test_blocks_without_data_are_captured(tiny, tokens):
    """Blocks on the meta device serve as well: capture runs the embeddings alone."""
    model = tiny("opt")
    expected, _ = capture(model, tokens)
    for block in blocks_of(model):
        block.to("meta")
    hidden, runner = capture(model, tokens)
    assert all(torch.equal(x, y) for x, y in zip(hidden, expected, strict=True))
    again = runner.run(blocks_of(tiny("opt"))[0], 0, hidden)
    assert torch.equal(again[0], runner.run(blocks_of(tiny("opt"))[0], 0, expected)[0])


def test_no_sequences_make_no_outputs(tiny, tokens):
    model = tiny("llama")
    _, runner = capture(model, tokens)
    assert runner.run(blocks_of(model)[0], 0, []) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_that_is_not_positive_is_refused(tiny, tokens, batch_size):
    with pytest.raises(InputError, match=f"batch_size={batch_size} is not positive; use 1 or more"):
        capture(tiny("llama"), tokens, batch_size)
