# SPDX-License-Identifier: Apache-2.0
"""Layouts of other projects: round trips bit for bit, independent decoders, and refusals that name the tensor."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed import recipe_of
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quattuor.activations import ActivationQuantizer, DynamicQuantizer
from quattuor.checkpoints import PackedModel, read_native, write_native
from quattuor.checkpoints.awq import ORDER
from quattuor.checkpoints.conversion import READERS, convert, export, read_foreign
from quattuor.checkpoints.int32_words import pack_words
from quattuor.errors import CheckpointError, InputError, UnsupportedError
from quattuor.formats import Integer, Parameters, TwoLevelInteger
from quattuor.granularity import Granularity, PerChannel, PerGroup
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.recipe import Recipe

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
FIRST = "model.layers.0.self_attn.q_proj"
CHANNEL = "int4 channel, int8 tokens"


def weight(
    shape: tuple[int, int], bits: int, granularity: Granularity, symmetric: bool, generator: torch.Generator
) -> QuantizedTensor:
    """Return a random weight whose scales float16 holds."""
    low = -(2 ** (bits - 1)) if symmetric else 0
    codes = torch.randint(low, low + 2**bits, shape, generator=generator)
    grid = (shape[0], granularity.num_groups(shape[1]))
    scale = (0.01 + 0.01 * torch.rand(grid, generator=generator)).half()
    if symmetric:
        return QuantizedTensor.from_codes(
            codes.to(torch.int8), Parameters(scale=scale), Integer(bits), granularity
        )
    zero_point = torch.randint(1, 2**bits, grid, generator=generator).to(torch.uint8)
    parameters = Parameters(scale=scale, zero_point=zero_point)
    return QuantizedTensor.from_codes(
        codes.to(torch.uint8), parameters, Integer(bits, symmetric=False), granularity
    )


def packed_model(
    generator: torch.Generator,
    *,
    bits: int = 4,
    granularity: Granularity | None = None,
    symmetric: bool = True,
    activations: ActivationQuantizer | None = None,
    dtype: torch.dtype = torch.float16,
) -> PackedModel:
    """Return a tiny model with random packed weights."""
    granularity = PerGroup(32) if granularity is None else granularity
    model = tiny_model("llama", dtype=dtype, **SIZES)
    model.config.architectures = ["LlamaForCausalLM"]
    head = model.get_output_embeddings()
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    linears = {
        name: weight(tuple(model.get_submodule(name).weight.shape), bits, granularity, symmetric, generator)
        for name in names
    }
    dense = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in linears}
    return PackedModel(
        config=model.config,
        linears=linears,
        activations=dict.fromkeys(names, activations),
        dense=dense,
        tokenizer=tiny_tokenizer(),
    )


def assert_same(first: PackedModel, second: PackedModel) -> None:
    assert first.linears.keys() == second.linears.keys()
    for name, tensor in first.linears.items():
        other = second.linears[name]
        assert (tensor.number_format, tensor.granularity) == (other.number_format, other.granularity)
        left, right = tensor.state(), other.state()
        assert left.keys() == right.keys()
        for leaf, value in left.items():
            assert value.dtype == right[leaf].dtype
            assert torch.equal(value, right[leaf])
    assert first.activations == second.activations
    assert first.dense.keys() == second.dense.keys()
    assert all(torch.equal(first.dense[name], tensor) for name, tensor in second.dense.items())


ROUND_TRIPS: dict[str, tuple[str, dict[str, object]]] = {
    "compressed-tensors, groups": ("compressed-tensors", {}),
    "compressed-tensors, int8": ("compressed-tensors", {"bits": 8, "granularity": PerChannel()}),
    "compressed-tensors, W4A8": (
        "compressed-tensors",
        {"granularity": PerChannel(), "activations": DynamicQuantizer()},
    ),
    "gptq, groups": ("gptq", {}),
    "gptq, zero points": ("gptq", {"symmetric": False}),
    "gptq, 2 bits per channel": ("gptq", {"bits": 2, "granularity": PerChannel()}),
    "gptq, 8 bits": ("gptq", {"bits": 8}),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trips(case: str, tmp_path: Path, generator: torch.Generator) -> None:
    target, options = ROUND_TRIPS[case]
    model = packed_model(generator, **options)
    write_native(model, tmp_path / "native", recipe=Recipe())
    export(tmp_path / "native", target, tmp_path / "foreign")
    convert(tmp_path / "foreign", tmp_path / "back")
    assert_same(model, read_native(tmp_path / "back"))


def test_qqq_round_trip(tmp_path: Path, generator: torch.Generator) -> None:
    model = packed_model(generator, granularity=PerChannel(), activations=DynamicQuantizer())
    linears = {
        name: dataclasses.replace(t, parameters=Parameters(scale=t.parameters["scale"].float()))
        for name, t in model.linears.items()
    }
    model = dataclasses.replace(model, linears=linears)
    write_native(model, tmp_path / "native", recipe=recipe_of(CHANNEL))
    export(tmp_path / "native", "qqq", tmp_path / "qqq")
    convert(tmp_path / "qqq", tmp_path / "back")
    assert_same(model, read_native(tmp_path / "back"))


def gptq_weight(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """Decode a weight as GPTQ's own code does: one element at a time, zero points stored less one."""
    words, zeros, scales = (tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
    group, per_word, mask = tensors[f"{name}.g_idx"], 32 // bits, 2**bits - 1
    result = torch.empty(words.shape[1], words.shape[0] * per_word)
    for n in range(0, result.shape[0], 7):
        for k in range(0, result.shape[1], 5):
            g = int(group[k])
            code = (int(words[k // per_word, n]) >> (bits * (k % per_word))) & mask
            zero = ((int(zeros[g, n // per_word]) >> (bits * (n % per_word))) & mask) + 1
            result[n, k] = float(scales[g, n]) * (code - zero)
    return result[::7, ::5]


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_against_an_independent_decoder(symmetric: bool, tmp_path: Path, generator: torch.Generator) -> None:
    model = packed_model(generator, symmetric=symmetric)
    write_native(model, tmp_path / "native", recipe=Recipe())
    export(tmp_path / "native", "gptq", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, symmetric, False)
    for name in (FIRST, "model.layers.1.mlp.down_proj"):
        assert torch.equal(gptq_weight(tensors, name, 4), model.linears[name].decode()[::7, ::5])


WITHOUT_QUATTUOR = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = torch.arange(24).view(2, 12)
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[2])
assert "quattuor" not in sys.modules
"""


@pytest.mark.parametrize("is_integer", [False, True])
def test_transformers_alone_reads_compressed_tensors(
    is_integer: bool, tmp_path: Path, generator: torch.Generator
) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: pip install compressed-tensors")
    activations = DynamicQuantizer() if is_integer else None
    model = packed_model(generator, granularity=PerChannel(), activations=activations, dtype=torch.float32)
    write_native(model, tmp_path / "native", recipe=Recipe())
    export(tmp_path / "native", "compressed-tensors", tmp_path / "out")
    command = [sys.executable, "-c", WITHOUT_QUATTUOR, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "logits.pt")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    with torch.no_grad():
        logits = ours(torch.arange(24).view(2, 12)).logits
    # The package's own simulation divides tokens by 127.5 where its kernels, and ours, divide by 127.
    tolerance = 0.1 if is_integer else 1e-5
    assert float((logits - theirs).norm() / logits.norm()) < tolerance


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loader_of_transformers_reads_gptq(
    symmetric: bool, tmp_path: Path, generator: torch.Generator
) -> None:
    pytest.importorskip("optimum", reason="transformers loads GPTQ through it: pip install optimum gptqmodel")
    pytest.importorskip("gptqmodel", reason="transformers loads GPTQ through it: pip install optimum gptqmodel")
    write_native(packed_model(generator, symmetric=symmetric), tmp_path / "native", recipe=Recipe())
    export(tmp_path / "native", "gptq", tmp_path / "out")
    command = [sys.executable, "-c", WITHOUT_QUATTUOR, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "logits.pt")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    with torch.no_grad():
        logits = ours(torch.arange(24).view(2, 12)).logits
    assert float((logits - theirs).norm() / logits.norm()) < 1e-2  # its kernels multiply in float16


def two_level(model: PackedModel, group: Callable[[torch.Size], Tensor]) -> PackedModel:
    linears = {}
    for name, tensor in model.linears.items():
        shape = torch.Size((tensor.shape[0], tensor.shape[1] // 32))
        parameters = Parameters(group_scale=group(shape), channel_scale=torch.full((shape[0], 1), 0.25))
        linears[name] = QuantizedTensor.from_codes(tensor.codes, parameters, TwoLevelInteger(4), PerGroup(32))
    return dataclasses.replace(model, linears=linears)


def test_integer_group_scales_are_a_uniform_grid(tmp_path: Path, generator: torch.Generator) -> None:
    base = packed_model(generator, activations=DynamicQuantizer())
    model = two_level(base, lambda shape: torch.randint(1, 9, shape, generator=generator).to(torch.int8))
    write_native(model, tmp_path / "native", recipe=Recipe())
    export(tmp_path / "native", "compressed-tensors", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = 0.25 * model.linears[FIRST].parameters["group_scale"].half()
    assert torch.equal(tensors[f"{FIRST}.weight_scale"], expected)


REFUSED: dict[str, tuple[str, Callable[[torch.Generator], PackedModel], str]] = {
    "activations": (
        "gptq",
        lambda g: packed_model(g, granularity=PerChannel(), activations=DynamicQuantizer()),
        "the layout cannot ask for them",
    ),
    "width": ("compressed-tensors", lambda g: packed_model(g, bits=3), "has 3 bits; kernels read 4 and 8"),
    "zero points": ("compressed-tensors", lambda g: packed_model(g, symmetric=False), "has zero points"),
    "second rounding": (
        "compressed-tensors",
        lambda g: two_level(packed_model(g, activations=DynamicQuantizer()), lambda s: torch.full(s, 1.5).half()),
        "rounds code \\* group_scale to int8",
    ),
    "group size": ("qqq", lambda g: packed_model(g, activations=DynamicQuantizer()), "not symmetric Integer per"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_hold(case: str, tmp_path: Path, generator: torch.Generator) -> None:
    target, make, reason = REFUSED[case]
    write_native(make(generator), tmp_path / "native", recipe=Recipe())
    with pytest.raises(UnsupportedError, match=f"{FIRST}.*{reason}|linear={FIRST} {reason}"):
        export(tmp_path / "native", target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_are_rounded_only_when_asked(tmp_path: Path, generator: torch.Generator) -> None:
    model = packed_model(generator)
    third = Parameters(scale=torch.full((128, 4), 1 / 3))
    linears = {**model.linears, FIRST: dataclasses.replace(model.linears[FIRST], parameters=third)}
    write_native(dataclasses.replace(model, linears=linears), tmp_path / "native", recipe=Recipe())
    with pytest.raises(
        UnsupportedError, match=f"linear={FIRST} has scales that float16 cannot hold; --allow-rounding"
    ):
        export(tmp_path / "native", "compressed-tensors", tmp_path / "out")
    export(tmp_path / "native", "compressed-tensors", tmp_path / "out", allow_rounding=True)
    scale = load_file(tmp_path / "out" / "model.safetensors")[f"{FIRST}.weight_scale"]
    assert torch.equal(scale, torch.full((128, 4), 1 / 3).half())


def test_an_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="target=gguf is not a layout that is written; use one of"):
        export(tmp_path, "gguf", tmp_path / "out")


def exported(tmp_path: Path, target: str, generator: torch.Generator) -> Path:
    write_native(packed_model(generator), tmp_path / "native", recipe=Recipe())
    return export(tmp_path / "native", target, tmp_path / "foreign")


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("target", "leaf"), [("gptq", "scales"), ("gptq", "qzeros"), ("compressed-tensors", "weight_packed")]
)
def test_a_missing_tensor_is_named(target: str, leaf: str, tmp_path: Path, generator: torch.Generator) -> None:
    folder = exported(tmp_path, target, generator)
    change(folder, lambda tensors: tensors.pop(f"{FIRST}.{leaf}"))
    with pytest.raises(CheckpointError, match=f"{FIRST}.{leaf}=missing"):
        convert(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_missing_linear_is_named(tmp_path: Path, generator: torch.Generator) -> None:
    folder = exported(tmp_path, "gptq", generator)
    change(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(FIRST)])
    with pytest.raises(CheckpointError, match=f"{FIRST}.qweight=missing"):
        convert(folder, tmp_path / "back")


def test_another_architecture_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    folder = exported(tmp_path, "compressed-tensors", generator)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.\w+_proj=\(\d+, \d+\) is not the"):
        convert(folder, tmp_path / "back")


@pytest.mark.parametrize(("target", "leaf"), [("gptq", "qzeros"), ("compressed-tensors", "weight_scale")])
def test_another_group_size_is_refused_with_the_tensors_name(
    target: str, leaf: str, tmp_path: Path, generator: torch.Generator
) -> None:
    folder = exported(tmp_path, target, generator)
    text = (folder / "config.json").read_text()
    assert text.count('"group_size": 32') == 1
    (folder / "config.json").write_text(text.replace('"group_size": 32', '"group_size": 64'))
    with pytest.raises(CheckpointError, match=rf"model.layers.0.\S+_proj.{leaf}=.* is not"):
        convert(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_columns_in_another_order_are_refused(tmp_path: Path, generator: torch.Generator) -> None:
    folder = exported(tmp_path, "gptq", generator)
    change(folder, lambda tensors: tensors[f"{FIRST}.g_idx"].copy_(tensors[f"{FIRST}.g_idx"].flip(0)))
    with pytest.raises(UnsupportedError, match=f"linear={FIRST} has columns in another order"):
        convert(folder, tmp_path / "back")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"input_activations": {"num_bits": 8, "type": "int", "dynamic": False}}, "has activations with"),
        ({"weights": {"num_bits": 4, "type": "float", "strategy": "channel"}}, "has type float"),
        ({"format": "marlin-24"}, "is stored as marlin-24"),
        ({"targets": ["Embedding"]}, "is in no group"),
    ],
)
def test_settings_that_would_change_numbers(
    edit: dict[str, object], reason: str, tmp_path: Path, generator: torch.Generator
) -> None:
    folder = exported(tmp_path, "compressed-tensors", generator)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"].update(edit)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((UnsupportedError, CheckpointError), match=reason):
        convert(folder, tmp_path / "back")


def test_awq(tmp_path: Path, generator: torch.Generator) -> None:
    model = packed_model(generator, symmetric=False)
    tensors = dict(model.dense)
    for name, tensor in model.linears.items():
        codes, parameters = tensor.codes.to(torch.int16), tensor.parameters
        tensors[f"{name}.qweight"] = pack_words(codes.T.contiguous(), 4, ORDER)
        tensors[f"{name}.qzeros"] = pack_words(parameters["zero_point"].T.to(torch.int16), 4, ORDER)
        tensors[f"{name}.scales"] = parameters["scale"].T.contiguous()
    folder = tmp_path / "awq"
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert_same(read_foreign(READERS["awq"], folder), model)
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": settings | {"version": "gemv"}})
    )
    with pytest.raises(UnsupportedError, match="version gemv; 4 bits of version gemm are read"):
        convert(folder, tmp_path / "back")


def test_an_unknown_method(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UnsupportedError, match="quant_method=bitsandbytes is not a layout that is read"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="quantization_config=missing"):
        convert(tmp_path, tmp_path / "out")
