# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: feed-forward modules of two products give the bits of their own class, from one recording."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quattuor.activations import DynamicQuantizer
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.kernels import replay
from quattuor.nn import LinearLayout, ParameterLayout, QuantizedLinear
from quattuor.nn.gated_mlp import join_gates
from quattuor.nn.sharing import share_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
SCALE = ParameterLayout(name="scale", dtype="float32", per_group=False)
LAYOUTS = {
    "channel": LinearLayout(
        number_format=Integer(4), granularity=PerChannel(), activations=DynamicQuantizer(), parameters=(SCALE,)
    ),
    "groups": LinearLayout(
        number_format=TwoLevelInteger(4),
        granularity=PerGroup(128),
        activations=DynamicQuantizer(),
        parameters=(
            ParameterLayout(name="group_scale", dtype="int8", per_group=True),
            ParameterLayout(name="channel_scale", dtype="float32", per_group=False),
        ),
    ),
}


def model_of(layout="channel", dtype=torch.float16, mlp_bias=False):
    """Return a Llama of one block with random codes, joined as a checkpoint is when it is loaded."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=1, vocab_size=128, mlp_bias=mlp_bias)
    model = LlamaForCausalLM(config).to("cuda", dtype).eval().requires_grad_(False)
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
            packed = QuantizedLinear(
                LAYOUTS[layout],
                **sizes,
                bias=linear.bias is not None,
                dtype=dtype,
                device="cuda",
                name=name,
            )
            for key, buffer in packed.named_buffers():
                if key == "group_scale":
                    buffer.random_(1, 16)
                elif buffer.dtype == torch.uint8:
                    buffer.random_(0, 256)
                else:
                    buffer.uniform_(0.005, 0.01)
            model.model.layers.set_submodule(name, packed)
    share_inputs(model)
    assert join_gates(model) == {"model.layers.0": None}
    return model


def tokens(count, dtype=torch.float16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(count, 512, device="cuda", dtype=dtype, generator=generator)


def own(mlp, x):
    """Return what the module's own class computes, without recordings and shared products."""
    alone = copy.deepcopy(mlp)
    for child in (alone.gate_proj, alone.up_proj, alone.down_proj):
        child.share(None)
        child._prepare(x.device, x.dtype)
    gate, up = (child._prepared._rows(x, child.bias) for child in (alone.gate_proj, alone.up_proj))
    return alone.down_proj._prepared._rows(alone.act_fn(gate) * up, alone.down_proj.bias)


def recordings(mlp):
    return list(mlp._gated._made[0]._replays._found.values())


@pytest.mark.parametrize("layout", ["channel", "groups"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 33, 64, 65, 300])
def test_both_paths_give_the_same_bits(layout, dtype, count):
    mlp = model_of(layout, dtype, mlp_bias=count % 2 == 0).model.layers[0].mlp
    for seed in range(4):
        x = tokens(count, dtype, seed)
        y = mlp(x)
        assert y.isfinite().all()
        assert y.abs().max() > 0
        assert torch.equal(y, own(mlp, x)), seed
    assert len(recordings(mlp)) == (count <= replay.MOST_TOKENS)
    assert all(len(recording._steps) == 4 for recording in recordings(mlp))


def test_a_graph_replays_the_recording():
    mlp, x = model_of().model.layers[0].mlp, tokens(1)
    mlp(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mlp(x)
    for seed in range(3):
        x.copy_(tokens(1, seed=seed))
        graph.replay()
        assert torch.equal(y, own(mlp, x))


def test_a_model_gives_the_same_logits():
    model = model_of()
    apart = copy.deepcopy(model)
    for block in apart.model.layers:
        block.mlp.act_fn.register_forward_hook(lambda *_: None)
    for shape in [(1, 1), (2, 1), (1, 9), (3, 80)]:
        ids = torch.randint(128, shape, device="cuda")
        assert torch.equal(model(ids).logits, apart(ids).logits)


def test_changes_of_the_weights_are_seen():
    mlp, x = model_of().model.layers[0].mlp, tokens(2)
    first = mlp(x)
    mlp.down_proj.packed.random_(0, 256)
    second = mlp(x)
    mlp.up_proj.packed.random_(0, 256)
    assert torch.equal(mlp(x), own(mlp, x))
    assert not torch.equal(first, second)
    assert not torch.equal(second, mlp(x))
