# SPDX-License-Identifier: Apache-2.0
"""The record `incoherence`: ways differ in one choice each, and rows hold what was measured."""

import pytest
import torch
from tiny_models import tiny_model

from benchmarks.end_to_end.incoherence import Linear, collect, measure, ways

TOKENS = torch.randint(0, 255, (4, 48), generator=torch.Generator().manual_seed(5))


def test_ways_have_rows_of_their_own() -> None:
    listed = ways(2)
    assert len({(way.basis, way.levels, way.rounding, way.scale_of) for way in listed}) == len(listed)
    assert {way.basis for way in listed if way.weights.transform is not None} == {"random", "random inputs"}
    choices = {
        basis: {(way.levels, way.rounding) for way in listed if way.basis == basis}
        for basis in ("own", "random inputs", "random")
    }
    assert choices["random"] == choices["random inputs"] < choices["own"], (
        "each grid of the random basis is also measured in the own one"
    )


def test_collected_hessians_are_those_of_the_inputs() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    linears = collect(model, TOKENS, [1])
    assert [linear.name for linear in linears] == [
        f"model.layers.1.{name}"
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    hidden = model.model(TOKENS, output_hidden_states=True).hidden_states[1]
    x = model.model.layers[1].input_layernorm(hidden).flatten(0, 1)
    torch.testing.assert_close(linears[0].hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_row_of_a_way() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    linear = Linear(name="a", weight=torch.randn(48, 64, generator=generator), hessian=x.T @ x / 400)
    chosen = [way for way in ways(3) if way.basis != "own" or way.rounding == "nearest"]
    rows = [measure(way, 3, [linear, linear]) for way in chosen]
    assert all(row["linears"] == 2 and row["relative_error"] == pytest.approx(row["worst_error"]) for row in rows)
    nearest, first, *_, best = rows
    assert 0 < best["relative_error"] < first["relative_error"] < nearest["relative_error"]
    assert best["bits_per_weight"] > first["bits_per_weight"] > 3
