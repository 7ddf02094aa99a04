# SPDX-License-Identifier: Apache-2.0
"""vLLM's own Llama loads packed checkpoints through the plugin; needs vLLM, any release from 0.22, no GPU."""

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="needs vLLM: pip install vllm")

import torch  # noqa: E402
from packed import pack_, recipe_of  # noqa: E402
from tiny_models import tiny_model, tiny_tokenizer  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from quattuor.checkpoints import PackedModel, save_pretrained, write_qqq  # noqa: E402
from quattuor.errors import CheckpointError, UnsupportedError  # noqa: E402
from quattuor.serving.vllm import register  # noqa: E402

SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
CHANNEL, GROUP = "int4 channel, int8 tokens", "int4 group 128 two levels float16, int8 tokens"


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    register()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, address, 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()


def packed_model(layout: str) -> PreTrainedModel:
    model = tiny_model("llama", dtype=torch.float16, num_key_value_heads=4, **SIZES)
    model.config.architectures = ["LlamaForCausalLM"]
    return pack_(model, layout)


def load(folder: Path, load_format: str = "auto") -> Any:
    """Let vLLM build and load the model, on the CPU."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    arguments = EngineArgs(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=64, load_format=load_format
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), pytest.MonkeyPatch.context() as patch:
        if not torch.accelerator.is_available():  # 0.33 empties the accelerator's cache without asking
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        model = get_model(vllm_config=config)
    model.compile_options = config.compilation_config.inductor_compile_config
    return model


def check_block(served: Any, model: PreTrainedModel, index: int = 1) -> None:
    """Compare every linear of a block, merged ones with the parts next to each other."""
    ours, theirs = model.model.layers[index].float(), served.model.layers[index]
    pairs = [
        (theirs.self_attn.qkv_proj, [getattr(ours.self_attn, f"{name}_proj") for name in "qkv"]),
        (theirs.self_attn.o_proj, [ours.self_attn.o_proj]),
        (theirs.mlp.gate_up_proj, [ours.mlp.gate_proj, ours.mlp.up_proj]),
        (theirs.mlp.down_proj, [ours.mlp.down_proj]),
    ]
    for merged, parts in pairs:
        x = torch.randn(3, parts[0].in_features, generator=torch.Generator().manual_seed(0))
        assert torch.equal(merged(x)[0], torch.cat([part(x) for part in parts], dim=-1))


@pytest.mark.parametrize("layout", [CHANNEL, GROUP, "int8 channel"])
@torch.no_grad()
def test_native(layout: str, tmp_path: Path) -> None:
    model = packed_model(layout)
    save_pretrained(model, tmp_path / "out", recipe=recipe_of(layout), tokenizer=tiny_tokenizer())
    check_block(load(tmp_path / "out"), model)


@pytest.mark.parametrize("layout", [CHANNEL, GROUP])
@torch.no_grad()
def test_qqq(layout: str, tmp_path: Path) -> None:
    model = packed_model(layout)
    write_qqq(PackedModel.from_model(model, tiny_tokenizer()), tmp_path / "out")
    check_block(load(tmp_path / "out"), model)


def test_the_engine_gets_the_fusions_unless_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    from quattuor.serving.vllm import graph_pass

    save_pretrained(packed_model(CHANNEL), tmp_path / "out", recipe=recipe_of(CHANNEL), tokenizer=tiny_tokenizer())
    for value in ("0", "compiler"):
        monkeypatch.setenv("QUATTUOR_FUSE", value)
        served = load(tmp_path / "out")
        assert current_platform.pass_key not in served.compile_options
        assert served.model.layers[0].mlp.down_proj.quant_method.facts.is_traced is (value != "0")
    monkeypatch.delenv("QUATTUOR_FUSE")
    served = load(tmp_path / "out")
    assert served.compile_options[current_platform.pass_key].uuid()  # compiled graphs are cached under it
    assert served.model.layers[0].mlp.down_proj.quant_method.facts.is_traced is False
    config = VllmConfig()
    config.compilation_config.inductor_compile_config[current_platform.pass_key] = object()
    assert graph_pass.install(config) is False  # the hook is taken


@torch.no_grad()
def test_without_weights(tmp_path: Path) -> None:
    save_pretrained(packed_model(GROUP), tmp_path / "out", recipe=recipe_of(GROUP), tokenizer=tiny_tokenizer())
    served = load(tmp_path / "out", load_format="dummy")
    y = served.model.layers[0].mlp.gate_up_proj(torch.ones(2, 128))[0]
    assert y.isfinite().all()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_pretrained(packed_model(CHANNEL), tmp_path / "out", recipe=recipe_of(CHANNEL))
    tiny_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.1.self_attn.k_proj.scale=missing"):
        load(folder)


def test_merged_linears_must_agree() -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    from quattuor.checkpoints.layouts import quantization_config
    from quattuor.nn import QuantizedLinear
    from quattuor.recipe import Recipe
    from quattuor.serving.vllm.methods import QuattuorConfig

    model = packed_model(CHANNEL)
    layouts = {name: m.layout for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    del layouts["model.layers.0.self_attn.v_proj"]
    config = QuattuorConfig.from_config(quantization_config(layouts, Recipe()))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    layer = QKVParallelLinear.__new__(QKVParallelLinear)
    with pytest.raises(UnsupportedError, match=r"v_proj: high precision.*must have one layout"):
        config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    mapper = SimpleNamespace(apply_dict=lambda items: {f"language.{name}": item for name, item in items.items()})
    config.apply_vllm_mapper(mapper)
    assert "language.model.layers.0.self_attn.q_proj" in config.layouts
