# SPDX-License-Identifier: Apache-2.0
"""Every weight-only system on a GPU finds a model as good as on a CPU: no tensor stays behind on either side."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from quattuor.quantize import quantize
from quattuor.systems import SYSTEMS

TOKENS = torch.randint(0, 255, (4, 32), generator=torch.Generator().manual_seed(5))
OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 32, "symmetric": False},
    "awq": {"group_size": 32},
    "gptq": {"group_size": 32},
    "owq": {"group_size": 32},
    "spqr": {},
    "squeezellm": {},
    "quip": {},
    "lut_gemm": {"group_size": 32},
}


def errors(name: str, device: str) -> list[float]:
    model = tiny_model("llama", num_hidden_layers=1).to(device)
    recipe = SYSTEMS[name](bits=3, **OPTIONS[name])
    report = quantize(model, recipe, TOKENS, storage=device, kernel="reference")
    assert all(buffer.device.type == device for buffer in model.buffers())
    return [layer.error for layer in report.layers]


def test_every_system_has_its_options() -> None:
    assert OPTIONS.keys() == SYSTEMS.keys() - {"qqq"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_errors_are_those_of_the_cpu(name: str) -> None:
    # Sums in another order move single codes, so the errors agree as a whole.
    assert sum(errors(name, "cuda")) == pytest.approx(sum(errors(name, "cpu")), rel=0.1)
