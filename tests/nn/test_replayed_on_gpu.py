# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: replayed calls and shared products give the bits of ordinary ones, whatever changes."""

import copy

import pytest
import torch
from torch import nn

from quattuor.activations import DynamicQuantizer
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.kernels import replay
from quattuor.nn import LinearLayout, ParameterLayout, QuantizedLinear
from quattuor.nn.shared_product import SharedProduct

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

K = 512


def layout(number_format, granularity, activations, **parameters):
    return LinearLayout(
        number_format=number_format,
        granularity=granularity,
        activations=activations,
        parameters=tuple(ParameterLayout(name=name, **fields) for name, fields in parameters.items()),
    )


SCALE = {"dtype": "float32", "per_group": False}
LAYOUTS = {
    "w4a8": layout(Integer(4), PerChannel(), DynamicQuantizer(), scale=SCALE),
    "w4a8 groups": layout(
        TwoLevelInteger(4),
        PerGroup(128),
        DynamicQuantizer(),
        group_scale={"dtype": "int8", "per_group": True},
        channel_scale=SCALE,
    ),
    "w4a16": layout(Integer(4), PerGroup(128), None, scale={"dtype": "float16", "per_group": True}),
}


def linear(name, out_features=384, bias=True, seed=0):
    """Return a packed linear of random codes and scales."""
    module = QuantizedLinear(
        LAYOUTS[name],
        in_features=K,
        out_features=out_features,
        bias=bias,
        dtype=torch.float16,
        device="cuda",
        name=name,
    )
    generator = torch.Generator("cuda").manual_seed(seed)
    for key, buffer in module.named_buffers():
        if key == "group_scale":
            buffer.random_(1, 16, generator=generator)
        elif buffer.dtype == torch.uint8:
            buffer.random_(0, 256, generator=generator)
        else:
            buffer.uniform_(0.5, 1.0, generator=generator)
    return module


def tokens(count, seed=0):
    return torch.randn(
        count, K, device="cuda", dtype=torch.float16, generator=torch.Generator("cuda").manual_seed(seed)
    )


def ordinary(module, x):
    """Return the output without recordings and without products of several."""
    alone = copy.deepcopy(module)
    alone.share(None)
    with torch.no_grad():
        alone._prepare(x.device, x.dtype)
        return alone._prepared._rows(x.reshape(-1, K), alone.bias).view(*x.shape[:-1], -1)


def recordings(module):
    return list(module._prepared._replays._found.values())


@pytest.mark.parametrize("name", ["w4a8", "w4a8 groups", "w4a16"])
@pytest.mark.parametrize("count", [1, 7, 16, 33, 64, 65])
def test_a_replay_gives_the_bits_of_a_call(name, count):
    module = linear(name)
    for seed in range(4):
        x = tokens(count, seed)
        assert torch.equal(module(x), ordinary(module, x)), seed
    assert len(recordings(module)) == (count <= replay.MOST_TOKENS)
    assert None not in recordings(module)


def test_the_output_has_the_leading_dimensions_of_the_tokens():
    module, x = linear("w4a8"), tokens(6)
    for shape in [(6, K), (2, 3, K), (1, 6, K), (2, 3, K)]:
        assert torch.equal(module(x.view(shape)), ordinary(module, x).view(*shape[:-1], -1))
    assert len(recordings(module)) == 3


def test_tokens_of_another_alignment_have_a_recording_of_their_own():
    module = linear("w4a8")
    buffer = tokens(3).flatten()
    for offset in [0, 1, 8, 3, 0, 1]:
        x = buffer[offset : offset + 2 * K].view(2, K)
        assert torch.equal(module(x), ordinary(module, x)), offset
    assert len(recordings(module)) == 3  # addresses divisible by 16, and two remainders


def test_what_lies_apart_takes_the_ordinary_path():
    module, x = linear("w4a8"), tokens(12)[::2]
    assert torch.equal(module(x), ordinary(module, x.contiguous()))
    assert recordings(module) == []


def test_another_bias_weight_or_device_memory_is_seen():
    module, x = linear("w4a8"), tokens(2)
    module(x)
    module.bias = module.bias + 1
    assert torch.equal(module(x), ordinary(module, x))
    module.packed = module.packed.flip(0)
    assert torch.equal(module(x), ordinary(module, x))
    module.packed.zero_()
    assert torch.equal(module(x), ordinary(module, x))
    other = copy.deepcopy(module)
    del module
    torch.cuda.empty_cache()
    assert torch.equal(other(x), ordinary(other, x))


def test_a_graph_replays_a_replay():
    module, x = linear("w4a8"), tokens(1)
    with torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        for seed in range(3):
            x.copy_(tokens(1, seed))
            graph.replay()
            assert torch.equal(y, ordinary(module, x))


def test_streams_do_not_share_outputs():
    members = [linear("w4a8", seed=seed) for seed in range(3)]
    SharedProduct(members)
    x = tokens(1)
    first = members[0](x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = members[1](x)
        torch.cuda.synchronize()
    assert torch.equal(first, ordinary(members[0], x))
    assert torch.equal(second, ordinary(members[1], x))


def test_a_hook_of_triton_sees_every_launch():
    from triton import knobs

    module, x, seen = linear("w4a8"), tokens(1), []
    module(x)

    def note(metadata):
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        module(x)
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    assert len(seen) == 2  # quantization and product


def test_a_call_that_is_more_than_launches_is_not_replayed():
    module, x = linear("w4a8"), tokens(1)
    module.use_kernel("reference")
    assert torch.equal(module(x), module(x))
    assert recordings(module) == [None]


@pytest.mark.parametrize("name", ["w4a8", "w4a8 groups"])
@pytest.mark.parametrize("count", [1, 20, 300])
def test_a_shared_product_gives_the_bits_of_its_members(name, count):
    members = [linear(name, size, seed=size) for size in (384, 128, 72)]
    SharedProduct(members)
    for seed in range(3):
        x = tokens(count, seed)
        for member in members:
            assert torch.equal(member(x), ordinary(member, x))


def test_a_call_takes_at_most_four_times_as_long_as_one_of_a_dense_linear():
    """The goal is parity with a model in float16, whose seven products of a block become four."""
    module, x = linear("w4a8", 512, bias=False), tokens(1)
    dense = nn.Linear(K, 512, bias=False, device="cuda", dtype=torch.float16)

    def seconds(call):
        call(x)
        torch.cuda.synchronize()
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        for _ in range(300):
            call(x)
        ended.record()
        torch.cuda.synchronize()
        return started.elapsed_time(ended)

    with torch.no_grad():
        assert min(seconds(module) for _ in range(5)) < 4 * min(seconds(dense) for _ in range(5))
