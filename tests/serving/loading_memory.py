# SPDX-License-Identifier: Apache-2.0
"""Loads a large packed checkpoint; run by test_loading_memory.py in a process of its own, which it measures.

    python loading_memory.py write FOLDER          random codes of 8 blocks, in shards
    python loading_memory.py load FOLDER MAP       prints, as JSON, what loading it takes

Every tensor is read to its end before the peak is taken, because a mapped file occupies memory when it is read.
"""

import json
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quattuor.activations import DynamicQuantizer
from quattuor.checkpoints import save_pretrained
from quattuor.checkpoints.layouts import quantization_config
from quattuor.checkpoints.skeleton import quantized_skeleton
from quattuor.formats import Integer
from quattuor.granularity import PerChannel
from quattuor.nn import LinearLayout, ParameterLayout
from quattuor.recipe import Recipe

SHARD_BYTES = 32 * 2**20
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@torch.no_grad()
def write(folder: Path) -> None:
    """Write a checkpoint of about 200 MiB whose linears would be 1.6 GiB in float32."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    layout = LinearLayout(
        number_format=Integer(4),
        granularity=PerChannel(),
        activations=DynamicQuantizer(),
        parameters=(ParameterLayout(name="scale", dtype="float32", per_group=False),),
    )
    layouts = {f"model.layers.{index}.{name}": layout for index in range(8) for name in LINEARS}
    model = quantized_skeleton(config, layouts).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        else:
            tensor.fill_(0.01)
    model.config.quantization_config = quantization_config(layouts, Recipe())
    save_pretrained(model, folder, max_shard_bytes=SHARD_BYTES)


def memory(name: str) -> int:
    """Return a field of the process's status in bytes: VmRSS (resident now) or VmHWM (the most so far)."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, name
    return 1024 * int(found[1])


def load(folder: Path, device_map: object) -> dict[str, int]:
    """Load and touch everything."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    model = AutoModelForCausalLM.from_pretrained(
        folder, **({} if device_map is None else {"device_map": device_map})
    )
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        tensor.amax()
    floats = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
    return {
        "peak": memory("VmHWM") - before,
        "model": sum(tensor.nbytes for tensor in tensors),
        "floats": floats,
        "shards": len(list(folder.glob("*.safetensors"))),
        "shard": max(file.stat().st_size for file in folder.glob("*.safetensors")),
        "checkpoint": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        json.dump(load(Path(sys.argv[2]), json.loads(sys.argv[3])), sys.stdout)
