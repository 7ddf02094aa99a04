# SPDX-License-Identifier: Apache-2.0
"""A model quantized on the CPU and moved to a CUDA device computes what it computed."""

import pytest
import torch
from tiny_models import tiny_model

from quattuor.nn.linear import QuantizedLinear
from quattuor.quantize import quantize
from quattuor.systems import rtn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = torch.randint(0, 255, (4, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"group_size": None, "activation_bits": 8}, 0.1),  # codes flip where sums are ordered differently
        ({"group_size": 32}, 1e-4),
    ],
)
def test_logits_survive_the_move(family, settings, tolerance):
    model = tiny_model(family)
    quantize(model, rtn(**settings), TOKENS)
    with torch.no_grad():
        expected = {length: model(TOKENS[:, :length]).logits for length in (1, 60)}
        model.to("cuda")
        for length, logits in expected.items():
            found = model(TOKENS[:, :length].cuda()).logits.cpu()
            assert (found - logits).norm() <= tolerance * logits.norm()
    kernels = {
        row.implementation
        for module in model.modules()
        if isinstance(module, QuantizedLinear)
        for row in module.explain()
        if row.is_chosen
    }
    assert kernels <= {"triton", "gluon"}
