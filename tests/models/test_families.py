# SPDX-License-Identifier: Apache-2.0
"""Every description says the truth about the model that transformers builds: one battery, one row per family."""

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn

from quattuor.models import DESCRIPTIONS, SiteKind, describe, discover, returns_tuple


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(tiny, family):
    return tiny(family)


@pytest.fixture
def description(model):
    return describe(model.config)


@pytest.fixture
def block(model, description):
    return model.get_submodule(description.blocks)[1]


@pytest.fixture
def tokens(generator):
    return torch.randint(0, 256, (2, 24), generator=generator)


def sites_of(model, description):
    return description.sites(description.activation(model.config.to_dict()))


@torch.no_grad()
def record(model, modules, tokens):
    """Return the first positional input and the output of each module in one forward pass."""
    inputs, outputs, handles = {}, {}, []

    def hook_for(name):
        def hook(_, arguments, output):
            inputs[name] = arguments[0]
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in modules.items():
        handles.append(module.register_forward_hook(hook_for(name)))
    model(tokens)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def test_every_described_type_has_a_tiny_model(tiny):
    assert {tiny(family).config.model_type for family in FAMILIES} == set(DESCRIPTIONS)


def test_table_agrees_with_the_descriptions():
    for model_type, description in DESCRIPTIONS.items():
        assert model_type in description.model_types
    listed = [name for item in {id(d): d for d in DESCRIPTIONS.values()}.values() for name in item.model_types]
    assert sorted(listed) == sorted(DESCRIPTIONS)


def test_outer_paths_exist(model, description):
    assert isinstance(model.get_submodule(description.blocks), nn.ModuleList)
    assert len(model.get_submodule(description.blocks)) == model.config.num_hidden_layers
    assert all(isinstance(model.get_submodule(path), nn.Embedding) for path in description.embeddings)
    assert model.get_submodule(description.embeddings[0]) is model.get_input_embeddings()
    assert model.get_submodule(description.head) is model.get_output_embeddings()


def test_embeddings_sum_to_the_residual_stream(model, description, tokens):
    modules = {path: model.get_submodule(path) for path in description.embeddings}
    modules["block"] = model.get_submodule(description.blocks)[0]
    _, outputs = record(model, {path: modules[path] for path in description.embeddings}, tokens)
    inputs, _ = record(model, modules, tokens)
    expected = sum(outputs[path] for path in description.embeddings)
    torch.testing.assert_close(inputs["block"], expected.expand_as(inputs["block"]), rtol=0, atol=0)


def test_final_norm_feeds_the_head(model, description, tokens):
    modules = {"norm": model.get_submodule(description.final_norm), "head": model.get_submodule(description.head)}
    inputs, outputs = record(model, modules, tokens)
    assert torch.equal(inputs["head"], outputs["norm"])


def test_linears_and_norms_are_covered_exactly_once(model, description, block):
    consumers = [path for site in sites_of(model, description) for path in site.consumers]
    linears = [path for path, module in block.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(consumers) == sorted(linears)
    norms = [description.attention_norm, description.mlp_norm, *description.post_norms]
    head_norms = [description.attention.query_norm, description.attention.key_norm]
    described = {*consumers, *norms, *(path for path in head_norms if path is not None)}
    with_parameters = {path for path, module in block.named_modules() if list(module.parameters(recurse=False))}
    assert described == with_parameters


def test_consumers_read_one_tensor_and_norms_produce_it(model, description, block, tokens):
    for site in sites_of(model, description):
        paths = [*site.consumers, *([site.producer] if site.producer else [])]
        inputs, outputs = record(model, {path: block.get_submodule(path) for path in paths}, tokens)
        first = inputs[site.consumers[0]]
        assert all(inputs[path].data_ptr() == first.data_ptr() for path in site.consumers), site.name
        if site.kind is SiteKind.NORM_LINEAR:
            assert torch.equal(first.flatten(), outputs[site.producer].flatten()), site.name


def factor_rows(description, site, heads, width):
    """Return the rows of the producer and, per input channel of the consumer, the row that scales it."""
    if site.kind is SiteKind.VALUE_OUTPUT:
        rows = description.attention.rows("value", heads)
        kv_head = torch.arange(heads.num_heads) // (heads.num_heads // heads.num_kv_heads)
        channel = (kv_head[:, None] * heads.head_dim + torch.arange(heads.head_dim)).flatten()
        return rows, channel
    return description.mlp.rows("up", width), torch.arange(width)


@torch.no_grad()
def test_scaling_producer_rows_scales_what_the_consumer_reads(model, description, block, tokens, generator):
    """The row of each site kind's table: scaling the producer scales the consumer's input, channel by channel."""
    heads = description.heads(model.config.to_dict())
    for site in sites_of(model, description):
        if site.kind not in (SiteKind.VALUE_OUTPUT, SiteKind.UP_DOWN, SiteKind.RELU):
            continue
        producer, consumer = block.get_submodule(site.producer), block.get_submodule(site.consumers[0])
        rows, channel = factor_rows(description, site, heads, consumer.in_features)
        before = record(model, {"consumer": consumer}, tokens)[0]["consumer"]
        scale = 0.5 + torch.rand(rows.stop - rows.start, generator=generator)
        producer.weight[rows] *= scale[:, None]
        if producer.bias is not None:
            producer.bias[rows] *= scale
        after = record(model, {"consumer": consumer}, tokens)[0]["consumer"]
        torch.testing.assert_close(after, before * scale[channel], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_effective_gain_is_offset_plus_weight(model, description, block, generator):
    hidden = torch.randn(3, model.config.hidden_size, generator=generator)
    for path in (description.attention_norm, description.mlp_norm, *description.post_norms):
        norm = block.get_submodule(path)
        gain = description.gain_offset + norm.weight
        centred = hidden - hidden.mean(-1, keepdim=True) if description.norm == "layer" else hidden
        expected = gain * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        expected = expected + norm.bias if description.norm == "layer" else expected
        torch.testing.assert_close(norm(hidden), expected, rtol=1e-3, atol=1e-3)


def test_heads_and_rows_match_the_shapes(model, description, block):
    heads = description.heads(model.config.to_dict())
    attention, mlp = description.attention, description.mlp
    assert heads.head_dim == block.get_submodule(attention.module).head_dim
    assert heads.num_heads // heads.num_kv_heads == (1 if description.family == "opt" else 2)
    assert block.get_submodule(attention.output).in_features == heads.num_heads * heads.head_dim
    width = block.get_submodule(mlp.down).in_features
    ranges = {}
    for part in ("query", "key", "value"):
        ranges.setdefault(getattr(attention, part), []).append(attention.rows(part, heads))
    for part in ("gate", "up"):
        if getattr(mlp, part) is not None:
            ranges.setdefault(getattr(mlp, part), []).append(mlp.rows(part, width))
    for path, parts in ranges.items():
        starts = [0, *(part.stop for part in parts)]
        assert [part.start for part in parts] == starts[:-1], path
        assert starts[-1] == block.get_submodule(path).out_features, path


@torch.no_grad()
def test_fused_rows_are_in_the_stated_order(tiny, tokens):
    model = tiny("phi3")
    description = describe(model.config)
    heads = description.heads(model.config.to_dict())
    block = model.model.layers[1]
    attention = block.self_attn
    attention.qkv_proj.weight[description.attention.rows("value", heads)] = 0
    assert record(model, {"o": attention.o_proj}, tokens)[0]["o"].abs().max() == 0
    block.mlp.gate_up_proj.weight[description.mlp.rows("gate", 192)] = 0
    assert record(model, {"d": block.mlp.down_proj}, tokens)[0]["d"].abs().max() == 0, "silu(0) * up is 0"


@torch.no_grad()
def test_query_and_key_rows_are_told_apart(tiny, tokens):
    model = tiny("phi3")
    description = describe(model.config)
    heads = description.heads(model.config.to_dict())
    attention = model.model.layers[1].self_attn
    attention.qkv_proj.weight[description.attention.rows("query", heads)] = 0
    inputs, outputs = record(model, {"o": attention.o_proj, "qkv": attention.qkv_proj}, tokens)
    value = outputs["qkv"][..., description.attention.rows("value", heads)]
    mean = value.cumsum(dim=1) / torch.arange(1, value.shape[1] + 1)[:, None]
    expected = mean.unflatten(-1, (heads.num_kv_heads, 1, heads.head_dim)).expand(-1, -1, -1, 2, -1).flatten(2)
    torch.testing.assert_close(inputs["o"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_return_what_the_description_or_the_probe_says(model, description, tokens):
    blocks = model.get_submodule(description.blocks)
    seen = {}
    blocks[0].register_forward_hook(
        lambda block, arguments, keywords, output: seen.update(
            hidden=arguments[0], keywords=keywords, output=output
        ),
        with_kwargs=True,
    )
    model(tokens, use_cache=False)
    expected = isinstance(seen["output"], tuple)
    assert description.block_returns_tuple in (None, expected)
    assert returns_tuple(blocks[0], seen["hidden"], seen["keywords"]) == expected
    assert returns_tuple(blocks[0].to("meta"), seen["hidden"], seen["keywords"]) == expected


def test_mlp_module_is_the_path_from_norm_to_down(model, description, block, tokens):
    if description.mlp.module is None:
        assert isinstance(block.get_submodule(description.mlp.up), nn.Linear)
        return
    modules = {name: block.get_submodule(getattr(description.mlp, name)) for name in ("module", "down")}
    modules["norm"] = block.get_submodule(description.mlp_norm)
    inputs, outputs = record(model, modules, tokens)
    assert torch.equal(inputs["module"], outputs["norm"])
    assert torch.equal(outputs["module"], outputs["down"])


def test_discovery_finds_the_linears_of_the_description(model, description, block):
    found = discover(model)
    assert found.is_discovered
    assert (found.blocks, found.head, found.embeddings) == (
        description.blocks,
        description.head,
        description.embeddings[:1],
    )
    described = {path for site in description.sites() for path in site.consumers}
    assert set(found.linears) == described
    assert len(found.linears) == len(described)
    assert [site.consumers for site in found.sites()] == [(path,) for path in found.linears]
    assert all(site.kind is SiteKind.OPAQUE and site.producer is None for site in found.sites())
