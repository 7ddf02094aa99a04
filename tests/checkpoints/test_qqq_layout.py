# SPDX-License-Identifier: Apache-2.0
"""The QQQ layout against a decoder written from its closed forms, one element at a time."""

from dataclasses import replace

import numpy
import pytest
import torch
from torch import Tensor

from quattuor.checkpoints import qqq_layout
from quattuor.errors import CheckpointError, UnsupportedError
from quattuor.formats import Integer, Parameters, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.quantized_tensor import QuantizedTensor

SHAPES = [(64, 128), (128, 128), (256, 64), (192, 256)]


def position(k: int, n: int, is_group: bool) -> tuple[int, int, int]:
    """Return (row, word, lowest bit) of element (k, n)."""
    kr, c, j, nc = k % 16, n // 64, (n % 64) // 16, n % 16
    b, i, r = nc // 8, 4 * (nc % 8) + kr // 4, kr % 4
    t = 4 * (r % 2) + 2 * b + r // 2 if is_group else 2 * r + (1 - b)
    return k // 16, 128 * c + 4 * i + j, 4 * t


def slow_codes(words: Tensor, is_group: bool) -> list[list[int]]:
    """Decode `B` element by element: codes [N][K]."""
    raw = words.numpy().view(numpy.uint32).tolist()
    num_n, num_k = words.shape[1] // 2, 16 * words.shape[0]
    codes = [[0] * num_k for _ in range(num_n)]
    for n in range(num_n):
        for k in range(num_k):
            row, word, bit = position(k, n, is_group)
            nibble = (raw[row][word] >> bit) & 15
            codes[n][k] = nibble - 8 if is_group else nibble - 16 * (nibble >= 8)
    return codes


def slow_words(codes: list[list[int]], is_group: bool) -> Tensor:
    """Encode codes [N][K] element by element."""
    num_n, num_k = len(codes), len(codes[0])
    raw = [[0] * (2 * num_n) for _ in range(num_k // 16)]
    for n in range(num_n):
        for k in range(num_k):
            row, word, bit = position(k, n, is_group)
            nibble = codes[n][k] + 8 if is_group else codes[n][k] & 15
            raw[row][word] |= nibble << bit
    return torch.from_numpy(numpy.array(raw, dtype=numpy.uint32).view(numpy.int32))


def slow_p32(n: int) -> int:
    """Where `s_channel` keeps column n."""
    c, b, i, part = n // 32, n % 32 // 8, n % 8 // 2, n % 2
    return 32 * c + 8 * i + 2 * b + part


def slow_p64(n: int) -> int:
    """Where `s_group` keeps column n."""
    c, j, i = n // 64, n % 64 // 8, n % 8
    return 64 * c + 8 * i + j


def channel_tensor(out_features: int, in_features: int, generator: torch.Generator) -> QuantizedTensor:
    codes = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    scale = torch.randn(out_features, 1, generator=generator)
    return QuantizedTensor.from_codes(codes, Parameters(scale=scale), Integer(4), PerChannel())


def group_tensor(
    out_features: int, in_features: int, generator: torch.Generator, dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    codes = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    signs = torch.randint(0, 2, (out_features, in_features // 128), generator=generator) * 2 - 1
    sizes = torch.rand(out_features, in_features // 128, generator=generator) * 14.5 + 1
    channel = torch.rand(out_features, 1, generator=generator) + 0.01
    parameters = Parameters(group_scale=(signs * sizes).to(dtype), channel_scale=channel)
    return QuantizedTensor.from_codes(codes, parameters, TwoLevelInteger(4), PerGroup(128))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_independent_decoder_reads_what_is_written_per_channel(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    tensor = channel_tensor(*shape, generator)
    state = qqq_layout.pack_channel(tensor)
    assert state["B"].dtype == torch.int32
    assert state["B"].shape == (shape[1] // 16, 2 * shape[0])
    assert slow_codes(state["B"], is_group=False) == tensor.codes.tolist()
    for n in range(shape[0]):
        assert 16 * state["s_channel"][0, slow_p32(n)] == tensor.parameters["scale"][n, 0]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 128 == 0])
def test_an_independent_decoder_reads_what_is_written_per_group(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    tensor = group_tensor(*shape, generator)
    state = qqq_layout.pack_group(tensor)
    assert slow_codes(state["B"], is_group=True) == tensor.codes.tolist()
    assert state["s_group"].dtype == torch.float16
    decoded = tensor.decode()
    for n in range(shape[0]):
        channel = state["s_channel"][0, slow_p32(n)].numpy()
        assert channel == tensor.parameters["channel_scale"][n, 0].numpy()
        for k in range(0, shape[1], 37):
            group = state["s_group"][k // 128, slow_p64(n)].numpy()
            assert group == tensor.parameters["group_scale"][n, k // 128].numpy()
            level = numpy.rint(numpy.float32(group) * numpy.float32(int(tensor.codes[n, k])))
            assert level * channel == decoded[n, k].numpy()


@pytest.mark.parametrize("is_group", [False, True])
def test_what_an_independent_encoder_writes_is_read(is_group: bool, generator: torch.Generator) -> None:
    make = group_tensor if is_group else channel_tensor
    tensor = make(128, 128, generator)
    scale = tensor.parameters["channel_scale" if is_group else "scale"].squeeze(1)
    stored = torch.empty(1, 128)
    for n in range(128):
        stored[0, slow_p32(n)] = scale[n] if is_group else scale[n] / 16
    state = {"B": slow_words(tensor.codes.tolist(), is_group), "s_channel": stored}
    if is_group:
        state["s_group"] = torch.empty(1, 128, dtype=torch.float16)
        for n in range(128):
            state["s_group"][0, slow_p64(n)] = tensor.parameters["group_scale"][n, 0]
    read = (qqq_layout.unpack_group if is_group else qqq_layout.unpack_channel)(state)
    assert torch.equal(read.codes, tensor.codes)
    assert {key: value.tolist() for key, value in read.parameters.items()} == {
        key: value.tolist() for key, value in tensor.parameters.items()
    }


@pytest.mark.parametrize("is_group", [False, True])
@pytest.mark.parametrize("code", range(-8, 8))
def test_every_nibble_value_goes_to_every_position(code: int, is_group: bool) -> None:
    codes = torch.full((64, 128), code, dtype=torch.int8)
    words = qqq_layout._pack_nibbles(codes, is_group=is_group)
    nibble = code + 8 if is_group else code & 15
    assert (words.numpy().view(numpy.uint32) == nibble * 0x11111111).all()
    assert torch.equal(qqq_layout._unpack_nibbles(words, is_group=is_group), codes)


def test_scale_permutations_are_the_closed_forms() -> None:
    columns = torch.arange(192.0)
    stored = qqq_layout._permute_32(columns)
    assert [int(stored[0, slow_p32(n)]) for n in range(192)] == list(range(192))
    assert torch.equal(qqq_layout.unpermute_32(stored), columns)
    rows = torch.stack([columns, columns + 1000])
    stored = qqq_layout._permute_64(rows)
    assert [int(stored[1, slow_p64(n)]) for n in range(192)] == list(range(1000, 1192))
    assert torch.equal(qqq_layout.unpermute_64(stored), rows)


def test_integer_group_scales_are_stored_as_float16(generator: torch.Generator) -> None:
    tensor = group_tensor(64, 128, generator, dtype=torch.int8)
    read = qqq_layout.unpack_group(qqq_layout.pack_group(tensor))
    assert torch.equal(read.decode(), tensor.decode())
    assert torch.equal(read.parameters["group_scale"].to(torch.int8), tensor.parameters["group_scale"])


def with_parameters(tensor: QuantizedTensor, **changes: Tensor) -> QuantizedTensor:
    return replace(tensor, parameters=Parameters(**{**tensor.parameters, **changes}))


@pytest.mark.parametrize(("scale", "code"), [(18.25, 7), (16.0625, -8), (-16.0, -8), (-18.5, 7)])
def test_a_group_scale_that_would_wrap_is_refused_by_name(
    scale: float, code: int, generator: torch.Generator
) -> None:
    tensor = group_tensor(64, 128, generator)
    group = torch.full((64, 1), 1.0, dtype=torch.float16)
    group[17] = scale
    codes = tensor.codes.clone()
    codes[17] = 0
    codes[17, 99] = code
    bad = QuantizedTensor.from_codes(
        codes,
        Parameters(group_scale=group, channel_scale=tensor.parameters["channel_scale"]),
        TwoLevelInteger(4),
        PerGroup(128),
    )
    with pytest.raises(UnsupportedError, match=rf"layers.3.down_proj.*{scale * code:g}, which would wrap"):
        qqq_layout.pack_group(bad, "layers.3.down_proj")
    state = qqq_layout.pack_group(with_parameters(bad, group_scale=torch.ones_like(group)))
    state["s_group"] = qqq_layout._permute_64(group.T)
    with pytest.raises(CheckpointError, match=r"layers.3.down_proj.s_group=.* wraps"):
        qqq_layout.unpack_group(state, "layers.3.down_proj")


@pytest.mark.parametrize(("scale", "code"), [(18.203125, 7), (16.0, -8), (-15.875, -8)])
def test_products_up_to_the_edge_of_int8_are_exact(scale: float, code: int) -> None:
    codes = torch.full((64, 128), code, dtype=torch.int8)
    parameters = Parameters(
        group_scale=torch.full((64, 1), scale, dtype=torch.float16), channel_scale=torch.ones(64, 1)
    )
    tensor = QuantizedTensor.from_codes(codes, parameters, TwoLevelInteger(4), PerGroup(128))
    read = qqq_layout.unpack_group(qqq_layout.pack_group(tensor))
    assert torch.equal(read.decode(), tensor.decode())
    # The kernel adds 1152 in float16 and takes the low byte: that is the same number as long as nothing wraps.
    low_byte = numpy.float16(1152 + scale * code).view(numpy.uint16) & 0xFF
    assert int(low_byte) - 128 == tensor.decode()[0, 0]


def test_the_kernel_wraps_just_beyond_the_edges() -> None:
    for product in (127.5, -128.5):
        low_byte = numpy.float16(1152 + product).view(numpy.uint16) & 0xFF
        assert abs(int(low_byte) - 128 - product) > 100


@pytest.mark.parametrize("scale", [2.0**-149, 3 * 2.0**-149])
def test_a_scale_whose_16th_part_is_not_exact_is_refused(scale: float, generator: torch.Generator) -> None:
    values = torch.ones(64, 1)
    values[5] = scale
    tensor = with_parameters(channel_tensor(64, 128, generator), scale=values)
    with pytest.raises(UnsupportedError, match=r"16th part is not exact"):
        qqq_layout.pack_channel(tensor)


def test_a_subnormal_scale_that_stays_exact_is_kept(generator: torch.Generator) -> None:
    values = torch.full((64, 1), 2.0**-140)
    tensor = with_parameters(channel_tensor(64, 128, generator), scale=values)
    assert torch.equal(qqq_layout.unpack_channel(qqq_layout.pack_channel(tensor)).parameters["scale"], values)


def test_scales_that_the_stored_types_cannot_hold_are_refused(generator: torch.Generator) -> None:
    tensor = group_tensor(64, 128, generator)
    fine = tensor.parameters["group_scale"].float() + 1e-4
    with pytest.raises(UnsupportedError, match=r"group scale that float16 cannot hold"):
        qqq_layout.pack_group(with_parameters(tensor, group_scale=fine))
    double = torch.full((64, 1), 0.1, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"channel scale that float32 cannot hold"):
        qqq_layout.pack_group(with_parameters(tensor, channel_scale=double))


@pytest.mark.parametrize(
    ("out_features", "in_features", "reason"),
    [(96, 128, "multiples of 64"), (64, 96, "multiples of 64"), (64, 64, "no tile"), (192, 64, "no tile")],
)
def test_shapes_that_the_kernel_cannot_tile_are_refused(
    out_features: int, in_features: int, reason: str, generator: torch.Generator
) -> None:
    with pytest.raises(UnsupportedError, match=reason.replace("no tile", "which no tile")):
        qqq_layout.pack_channel(channel_tensor(out_features, in_features, generator))


def test_formats_that_the_layout_cannot_hold_are_refused(generator: torch.Generator) -> None:
    tensor = channel_tensor(64, 128, generator)
    codes, scale = tensor.codes.clamp(-2, 1), tensor.parameters["scale"]
    narrow = QuantizedTensor.from_codes(codes, Parameters(scale=scale), Integer(3), PerChannel())
    assert "has 3 bits; the layout only knows 4" in str(qqq_layout.refusal(narrow))
    groups = Parameters(scale=scale.expand(-1, 2))
    plain = QuantizedTensor.from_codes(tensor.codes, groups, Integer(4), PerGroup(64))
    assert "not symmetric Integer per channel or TwoLevelInteger" in str(qqq_layout.refusal(plain))
    groups = Parameters(group_scale=scale.expand(-1, 2).half(), channel_scale=scale)
    small = QuantizedTensor.from_codes(tensor.codes, groups, TwoLevelInteger(4), PerGroup(64))
    assert "group_size=64; the layout only knows 128" in str(qqq_layout.refusal(small))


@pytest.mark.parametrize("leaf", ["B", "s_channel", "s_group"])
def test_missing_and_foreign_tensors_are_named(leaf: str, generator: torch.Generator) -> None:
    state = qqq_layout.pack_group(group_tensor(64, 256, generator))
    with pytest.raises(CheckpointError, match=rf"up.{leaf}=missing"):
        qqq_layout.unpack_group({key: value for key, value in state.items() if key != leaf}, "up")
    with pytest.raises(CheckpointError, match=rf"up.{leaf}=torch.float64"):
        qqq_layout.unpack_group({**state, leaf: state[leaf].double()}, "up")
    with pytest.raises(CheckpointError, match=r"up\."):
        qqq_layout.unpack_group({**state, leaf: state[leaf][:, :-64]}, "up")


def test_scales_that_are_not_finite_are_refused(generator: torch.Generator) -> None:
    state = qqq_layout.pack_channel(channel_tensor(64, 128, generator))
    state["s_channel"][0, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"up.s_channel=NaN or infinity"):
        qqq_layout.unpack_channel(state, "up")
