# SPDX-License-Identifier: Apache-2.0
"""The plumbing in conftest.py does what the other tests rely on."""

import dataclasses
import importlib

import pytest
import torch
from jaxtyping import TypeCheckError

from quattuor.formats import Integer
from quattuor.models import Heads
from quattuor.scales import AbsMax
from quattuor.solvers import GPTQ


def test_shapes_are_enforced():
    assert AbsMax().fit(torch.ones(2, 3, 4), Integer(4))["scale"].shape == (2, 3)
    with pytest.raises(TypeCheckError):
        AbsMax().fit(torch.ones(2, 3), Integer(4))


def test_fields_are_enforced_in_frozen_dataclasses_with_slots():
    heads = Heads(num_heads=2, num_kv_heads=1, head_dim=3)
    assert dataclasses.replace(heads, num_heads=4).num_heads == 4
    assert not hasattr(heads, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        heads.num_heads = 4
    with pytest.raises(TypeCheckError):
        Heads(num_heads="2", num_kv_heads=1, head_dim=3)


def test_an_int_passes_for_a_float_but_text_does_not():
    assert GPTQ(damping=1).damping == 1
    with pytest.raises(TypeCheckError):
        GPTQ(damping="0.01")


@pytest.mark.parametrize(
    "name", ["quattuor.scales.absmax", "quattuor.models.description", "quattuor.granularity", "quattuor.recipe"]
)
def test_modules_are_imported_after_the_hook(name):
    assert "jaxtyping" in type(importlib.import_module(name).__loader__).__module__


def test_kernels_stay_plain():
    assert "jaxtyping" not in type(importlib.import_module("quattuor.kernels.dispatch").__loader__).__module__


def test_demo_model_is_a_gguf_file(demo_gguf):
    with demo_gguf.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_data_folder_holds_text(data_folder):
    assert (data_folder / "wikitext2_test.txt").stat().st_size > 1_000_000


def test_generator_is_fresh(generator):
    assert generator.initial_seed() == 0
    assert torch.equal(
        torch.rand(3, generator=generator), torch.rand(3, generator=torch.Generator().manual_seed(0))
    )
