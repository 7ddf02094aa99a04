# SPDX-License-Identifier: Apache-2.0
"""Every kind of tile of the Hopper kernel, and every way to cut tiles, against the reference on a CUDA device."""

import dataclasses

import pytest
import torch

from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import describe_device
from quattuor.kernels.w4a8_linear.planes import BLOCK_K, HopperTile, group_scale_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]

PAIRED = {"blocks": 1, "registers": 96, "max_registers": 80, "per_processor": 2}
TILES = {
    "narrow": HopperTile(blocks=1, tokens=64, stages=6, unroll=2),
    "square": HopperTile(blocks=1, tokens=128, stages=4, unroll=2),
    "tall": HopperTile(blocks=2, tokens=128, stages=2),
    "wide": HopperTile(blocks=1, tokens=256, spans=2, stages=2),
    "paired few": HopperTile(**PAIRED, tokens=16, stages=5),
    "paired": HopperTile(**PAIRED, tokens=64, stages=2),
}
#: With 20 programs: whole tiles only, cut tiles only, both; tiles of one block.
SIZES = [(1000, 1280, 300), (4096, 3856, 70), (7001, 256, 513), (2048, 11008, 64)]


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("cut", ["none", "even", "aligned"])
@pytest.mark.parametrize("mode", ["channel", "integer", "half", "unclamped"])
def test_tiles(layer, inputs, name, cut, mode):
    from quattuor.kernels.w4a8_linear.gluon_kernel import launch
    from quattuor.kernels.w4a8_linear.hopper import make_schedule

    tile = dataclasses.replace(TILES[name], cut=cut)
    for out_features, in_features, num_tokens in SIZES:
        group = {
            "channel": {},
            "integer": {"group_size": 128, "integer": True},
            "half": {"group_size": 128},
            "unclamped": {"group_size": 128, "clamps": False},
        }[mode]
        made = layer(out_features, in_features, **group, device="cuda")
        problem = dataclasses.replace(made.problem, **describe_device("cuda"))
        x_codes, x_scale = inputs(num_tokens, in_features, device="cuda")
        bias = torch.randn(out_features, device="cuda", dtype=torch.float16)
        exact = w4a8_linear.plan(problem, force="reference")
        operand = exact.prepare(made.codes, made.scale, made.group_scale)
        expected = exact.linear(x_codes, x_scale, operand, bias)
        prepared = w4a8_linear.plan(problem, force="gluon").prepare(made.codes, made.scale, made.group_scale)
        planes = prepared.layout("planes")
        kernel_mode, group_scale = group_scale_of(problem, planes)
        assert kernel_mode == mode
        num_blocks = -(-in_features // BLOCK_K)
        num_tiles = -(-out_features // tile.rows) * -(-num_tokens // tile.tokens)
        for programs in (20, 132 * tile.per_processor):
            out = torch.full_like(expected, torch.nan)
            launch(
                x_codes,
                x_scale,
                planes["packed"],
                planes["scale"],
                group_scale,
                planes["arrivals"],
                bias,
                out,
                mode=kernel_mode,
                group_size=problem.group_size,
                num_blocks=num_blocks,
                tile=tile,
                schedule=make_schedule(num_tiles, num_blocks, programs, cut),
            )
            assert torch.equal(out, expected), (out_features, in_features, num_tokens, programs)
            assert not planes["arrivals"].any()
