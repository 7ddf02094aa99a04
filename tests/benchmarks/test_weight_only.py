# SPDX-License-Identifier: Apache-2.0
"""The record of the weight-only systems: what is measured, and how rows come together."""

import pytest
import torch

from benchmarks.end_to_end.weight_only import Variant, measure, merged, variants
from quattuor.recipe import Recipe
from quattuor.systems import SYSTEMS

TOKENS = torch.randint(0, 255, (4, 24), generator=torch.Generator().manual_seed(5))


def row(system, bits, options="default", windows=4, **figures):
    return {"system": system, "bits": bits, "options": options, "windows": windows, **figures}


def test_every_weight_only_system_is_measured_at_4_3_and_2_bits():
    listed = variants()
    assert len({item.name for item in listed}) == len(listed)
    for name in SYSTEMS.keys() - {"qqq"}:
        assert {item.bits for item in listed if item.system == name} >= {2, 3, 4}, name
    for item in listed:
        if item.system is not None:
            assert isinstance(SYSTEMS[item.system](bits=item.bits, **item.options), Recipe)


def test_measured_again_replaces_and_order_is_that_of_the_list():
    rtn = Variant(system="rtn", bits=3, options={"group_size": 64, "symmetric": False})
    rows = []
    for item in (row("rtn", 3, rtn.label, perplexity=9.0), row("awq", 3, "unlisted"), row("none", 32)):
        rows = merged(rows, item)
    rows = merged(rows, row("rtn", 3, rtn.label, perplexity=8.0))
    assert [(item["system"], item.get("perplexity")) for item in rows] == [
        ("none", None),
        ("rtn", 8.0),
        ("awq", None),
    ]
    assert len(merged(rows, row("rtn", 3, rtn.label, windows=8))) == 4, "other windows are another measurement"


@pytest.mark.parametrize("system", [None, "rtn", "quip", "squeezellm"])
def test_row_of_a_tiny_model(tiny, system):
    options = {"group_size": 32} if system == "rtn" else {}
    item = Variant(system=system, bits=32 if system is None else 4, options=options)
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure(item, model, TOKENS, TOKENS, "cpu", stores=True)
    assert found["system"] == (system or "none")
    assert found["windows"] == 4
    assert found["perplexity"] > 1
    assert found["perplexity_stderr"] > 0
    if system is None:
        assert (found["bits_per_weight"], found["seconds"], found["peak_memory_bytes"]) == (32.0, None, None)
    else:
        assert 4 < found["bits_per_weight"] < 8
        assert found["seconds"] > 0
        assert found["peak_memory_bytes"] > 1e6
        assert found["file_bytes"] == found["formula_bytes"] > 0
        assert found["is_identical"] is True
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "a copy is quantized"
    )
