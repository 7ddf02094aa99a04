# SPDX-License-Identifier: Apache-2.0
"""Every device's share, decoded, is the part of the whole weight that it should hold."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from served import asymmetric, channel, grouped
from torch import Tensor

from quattuor.activations import DynamicQuantizer
from quattuor.checkpoints import qqq_layout
from quattuor.errors import CheckpointError, InputError, UnsupportedError
from quattuor.formats import Integer, Parameters
from quattuor.granularity import PerTensor
from quattuor.nn import LinearLayout
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.serving.sharding import MergedLinear, fill_
from quattuor.serving.storage import NativeStorage, QQQStorage, Storage


@dataclass(frozen=True)
class Case:
    make: Callable[[int, int, torch.Generator], QuantizedTensor]
    storage: Callable[[QuantizedTensor], Storage]
    state: Callable[[QuantizedTensor], dict[str, Tensor]]


def native(tensor: QuantizedTensor) -> Storage:
    return NativeStorage(LinearLayout.of(tensor, DynamicQuantizer()), "layer")


CASES = {
    "native channel": Case(channel, native, lambda tensor: tensor.state()),
    "native 3 bits": Case(lambda n, k, g: channel(n, k, g, bits=3), native, lambda tensor: tensor.state()),
    "native group": Case(grouped, native, lambda tensor: tensor.state()),
    "native asymmetric": Case(asymmetric, native, lambda tensor: tensor.state()),
    "qqq channel": Case(channel, lambda _: QQQStorage(-1), qqq_layout.pack_channel),
    "qqq group": Case(grouped, lambda _: QQQStorage(128), qqq_layout.pack_group),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def qkv(rank: int, world_size: int) -> MergedLinear:
    """Return the share of a device in 8 query heads and 2 key-value heads of 64 features, as vLLM cuts them."""
    heads, replicas = 8 // world_size, max(1, world_size // 2)
    key_value = max(1, 2 // world_size)
    return MergedLinear(
        name="layer.qkv_proj",
        parts=("layer.q_proj", "layer.k_proj", "layer.v_proj"),
        out_features=(64 * heads, 64 * key_value, 64 * key_value),
        replicas=(1, replicas, replicas),
        in_features=256,
        all_in_features=256,
        rank=rank,
        world_size=world_size,
        input_rank=0,
    )


def down(rank: int, world_size: int, in_features: int = 512) -> MergedLinear:
    return MergedLinear(
        name="layer.down_proj",
        parts=("layer.down_proj",),
        out_features=(128,),
        replicas=(1,),
        in_features=in_features // world_size,
        all_in_features=in_features,
        rank=rank,
        world_size=1,
        input_rank=rank,
    )


def load(storage: Storage, linear: MergedLinear, states: list[tuple[int | None, dict[str, Tensor]]]) -> Tensor:
    """Fill the share of a device and decode it."""
    linear.check(storage.tensors())
    shape = (sum(linear.out_features), linear.in_features)
    filled = {tensor.name: torch.zeros(tensor.shape(*shape), dtype=tensor.dtype) for tensor in storage.tensors()}
    for part, state in states:
        for tensor in storage.tensors():
            fill_(filled[tensor.name], state[tensor.name], tensor, linear, part)
    return storage.weight(filled, shape, linear.name).decode()


@each_case
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_merged_outputs(case: Case, world_size: int, generator: torch.Generator) -> None:
    parts = [case.make(size, 256, generator) for size in (512, 128, 128)]
    wholes = [part.decode() for part in parts]
    states = [(index, case.state(part)) for index, part in enumerate(parts)]
    for rank in range(world_size):
        linear = qkv(rank, world_size)
        query, key = linear.out_features[0], linear.out_features[1]
        head = rank * 2 // world_size if world_size > 2 else rank
        expected = torch.cat(
            [
                wholes[0][rank * query : (rank + 1) * query],
                wholes[1][head * key : (head + 1) * key],
                wholes[2][head * key : (head + 1) * key],
            ]
        )
        assert torch.equal(load(case.storage(parts[0]), linear, states), expected)


@each_case
def test_outputs_that_are_merged_on_disk(case: Case, generator: torch.Generator) -> None:
    whole = case.make(768, 256, generator)
    decoded = whole.decode()
    for rank in range(2):
        share = load(case.storage(whole), qkv(rank, 2), [(None, case.state(whole))])
        rows = [*range(256 * rank, 256 * rank + 256), *range(512 + 64 * rank, 576 + 64 * rank)]
        rows += range(640 + 64 * rank, 704 + 64 * rank)
        assert torch.equal(share, decoded[rows])


@each_case
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_cut_inputs(case: Case, world_size: int, generator: torch.Generator) -> None:
    whole = case.make(128, 512, generator)
    decoded, width = whole.decode(), 512 // world_size
    for rank in range(world_size):
        share = load(case.storage(whole), down(rank, world_size), [(0, case.state(whole))])
        assert torch.equal(share, decoded[:, rank * width : (rank + 1) * width])


def test_a_group_is_not_cut(generator: torch.Generator) -> None:
    storage = native(grouped(128, 384, generator))
    message = r"tensor parallelism: inputs of layer.down_proj.packed on one device=192 is no multiple of 128"
    with pytest.raises(InputError, match=message):
        down(0, 2, in_features=384).check(storage.tensors())


def test_a_byte_is_not_cut(generator: torch.Generator) -> None:
    storage = native(channel(128, 36, generator, bits=3))
    with pytest.raises(InputError, match="is no multiple of 8"):
        down(0, 3, in_features=36).check(storage.tensors())


def test_a_block_of_permuted_columns_is_not_cut() -> None:
    linear = down(0, 1)
    with pytest.raises(InputError, match=r"outputs of layer.down_proj.B on one device=96 is no multiple of 64"):
        MergedLinear(**{**_fields(linear), "out_features": (96,)}).check(QQQStorage(-1).tensors())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state | {"packed": state["packed"][:64]}, "layer.k_proj.packed=torch.uint8 (64, 128)"),
        (lambda state: state | {"scale": state["scale"].half()}, "layer.k_proj.scale=torch.float16 (128, 1)"),
    ],
)
def test_a_tensor_of_another_model_is_named(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], named: str, generator: torch.Generator
) -> None:
    whole = channel(128, 256, generator)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        load(native(whole), qkv(0, 1), [(1, change(whole.state()))])


def test_per_tensor_scales_are_refused(generator: torch.Generator) -> None:
    codes = torch.zeros(8, 8, dtype=torch.int8)
    whole = QuantizedTensor.from_codes(codes, Parameters(scale=torch.ones(1, 1)), Integer(4), PerTensor())
    with pytest.raises(UnsupportedError, match=r"layer: layout=.*PerTensor"):
        native(whole)


def _fields(linear: MergedLinear) -> dict[str, object]:
    return {name: getattr(linear, name) for name in MergedLinear.__slots__}
