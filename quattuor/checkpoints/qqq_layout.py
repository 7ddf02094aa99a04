# SPDX-License-Identifier: Apache-2.0
"""One packed weight in the layout of the original QQQ checkpoints: nibble positions and scale permutations.

For the weight [N, K] of a linear:

    B          int32   [K/16, 2N]    eight codes of 4 bits per word
    s_channel  float32 [1, N]        in the order P32; per channel it holds scale / 16
    s_group    float16 [K/128, N]    in the order P64; groups only

Element (k, n) is the nibble t of the word B[k // 16, 128 c + 4 i + j], with

    c = n // 64,  j = (n % 64) // 16,  b = (n % 16) // 8,  i = 4 (n % 8) + (k % 16) // 4,  r = k % 4
    per channel:  t = 2 r + (1 - b)                  the nibble is the code in two's complement
    per group:    t = 4 (r % 2) + 2 b + r // 2       the nibble is the code + 8

    P32: n = 32 c + 8 b + 2 i + l  is stored at  32 c + 8 i + 2 b + l     (b, i = 0..3, l = 0..1)
    P64: n = 64 c + 8 j + i        is stored at  64 c + 8 i + j           (i, j = 0..7)

    per channel:  W[n, k] = 16 * code * s_channel[n]
    per group:    W[n, k] = round(code * s_group[k // 128, n]) * s_channel[n]

The kernel leaves a per-channel nibble in the upper half of its byte, hence the 16. The product with a group scale
must stay in int8: from 127.5 up, and below -128, the kernel wraps silently.

References:
    Zhang et al., 2024, arXiv:2406.09904.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int32
from jaxtyping import Integer as IntegerArray
from torch import Tensor

from quattuor.errors import CheckpointError, UnsupportedError, compose
from quattuor.formats import Integer, Parameters, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.quantized_tensor import QuantizedTensor

__all__ = [
    "GROUP_SIZE",
    "pack_channel",
    "pack_group",
    "refusal",
    "unpack_channel",
    "unpack_group",
    "unpermute_32",
    "unpermute_64",
    "wraps",
]

BITS = 4
GROUP_SIZE = 128
_TILES = ((128, 128), (128, 64), (64, 256), (64, 128))  # (K, N) of the kernel's tiles


def refusal(tensor: QuantizedTensor) -> str | None:
    """Return why this layout cannot hold a weight, or None when it can."""
    number_format, granularity = tensor.number_format, tensor.granularity
    out_features, in_features = tensor.shape
    if tensor.extra_kinds:
        return f"has {' and '.join(tensor.extra_kinds)} beside its codes"
    if number_format.bits != BITS:
        return f"has {number_format.bits} bits; the layout only knows {BITS}"
    is_channel = isinstance(number_format, Integer) and number_format.symmetric
    is_channel = is_channel and isinstance(granularity, PerChannel)
    is_group = isinstance(number_format, TwoLevelInteger) and isinstance(granularity, PerGroup)
    if not is_channel and not is_group:
        return f"is {number_format} {granularity}; not symmetric Integer per channel or TwoLevelInteger per group"
    if is_group and isinstance(granularity, PerGroup) and granularity.group_size != GROUP_SIZE:
        return f"has group_size={granularity.group_size}; the layout only knows {GROUP_SIZE}"
    return _shape_refusal(out_features, in_features, is_group)


def _shape_refusal(out_features: int, in_features: int, is_group: bool) -> str | None:
    if out_features % 64 or in_features % 64:
        return f"is {out_features} x {in_features}; both sizes must be multiples of 64"
    if is_group and in_features % GROUP_SIZE:
        return f"has in_features={in_features}, no multiple of the group size {GROUP_SIZE}"
    if not any(in_features % tile_k == 0 and out_features % tile_n == 0 for tile_k, tile_n in _TILES):
        return f"is {out_features} x {in_features}, which no tile of (K, N) in {_TILES} divides"
    return None


def wraps(codes: IntegerArray[Tensor, "N K"], group_scale: Float[Tensor, "N G"]) -> float | None:
    """Return the product code * group_scale that the kernel would wrap, or None when all stay in int8."""
    product_NGS = codes.view(codes.shape[0], -1, GROUP_SIZE).float() * group_scale.float().unsqueeze(-1)
    highest, lowest = float(product_NGS.max()), float(product_NGS.min())
    if highest >= 127.5:
        return highest
    return lowest if lowest < -128 else None


def pack_channel(tensor: QuantizedTensor, name: str = "weight") -> dict[str, Tensor]:
    """Return `B` and `s_channel` of a weight with one scale per channel.

    Raises:
        UnsupportedError: The layout cannot hold the weight, or a scale / 16 is not exact in float32.
    """
    _refuse(refusal(tensor), tensor, name)
    scale_N1 = tensor.parameters["scale"]
    stored_N1 = scale_N1.float() / 16
    is_exact = bool((torch.isfinite(stored_N1) & (stored_N1.double() * 16 == scale_N1.double())).all())
    _refuse(None if is_exact else "has a scale whose 16th part is not exact in float32", tensor, name)
    return {"B": _pack_nibbles(tensor.codes, is_group=False), "s_channel": _permute_32(stored_N1.squeeze(1))}


def pack_group(tensor: QuantizedTensor, name: str = "weight") -> dict[str, Tensor]:
    """Return `B`, `s_channel` and `s_group` of a weight with groups of 128 on an int8 grid per channel.

    Raises:
        UnsupportedError: The layout cannot hold the weight, a product would wrap in the kernel, or a scale is not
            exact in float16 or float32.
    """
    _refuse(refusal(tensor), tensor, name)
    group_NG, channel_N1 = tensor.parameters["group_scale"], tensor.parameters["channel_scale"]
    half_NG, single_N1 = group_NG.to(torch.float16), channel_N1.float()
    is_exact = torch.equal(half_NG.double(), group_NG.double()) and bool(torch.isfinite(half_NG).all())
    _refuse(None if is_exact else "has a group scale that float16 cannot hold", tensor, name)
    is_exact = torch.equal(single_N1.double(), channel_N1.double()) and bool(torch.isfinite(single_N1).all())
    _refuse(None if is_exact else "has a channel scale that float32 cannot hold", tensor, name)
    product = wraps(tensor.codes, half_NG)
    _refuse(None if product is None else f"has code * s_group = {product:g}, which would wrap", tensor, name)
    return {
        "B": _pack_nibbles(tensor.codes, is_group=True),
        "s_channel": _permute_32(single_N1.squeeze(1)),
        "s_group": _permute_64(half_NG.T),
    }


def unpack_channel(state: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
    """Undo `pack_channel`.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype, or a scale is not finite.
    """
    words = _require(state, "B", torch.int32, name)
    out_features, in_features = words.shape[1] // 2, words.shape[0] * 16
    _check_shapes(out_features, in_features, is_group=False, name=name)
    stored = _require(state, "s_channel", torch.float32, name, (1, out_features))
    return QuantizedTensor.from_codes(
        _unpack_nibbles(words, is_group=False),
        Parameters(scale=(16 * unpermute_32(stored)).unsqueeze(1)),
        Integer(BITS),
        PerChannel(),
    )


def unpack_group(state: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
    """Undo `pack_group`.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype, or a product wraps in the kernel.
    """
    words = _require(state, "B", torch.int32, name)
    out_features, in_features = words.shape[1] // 2, words.shape[0] * 16
    _check_shapes(out_features, in_features, is_group=True, name=name)
    channel = _require(state, "s_channel", torch.float32, name, (1, out_features))
    group = _require(state, "s_group", torch.float16, name, (in_features // GROUP_SIZE, out_features))
    codes_NK, group_NG = (
        _unpack_nibbles(words, is_group=True),
        unpermute_64(group).T.clone(memory_format=torch.contiguous_format),
    )
    product = wraps(codes_NK, group_NG)
    if product is not None:
        raise _damaged(f"{name}.s_group", product, "is a product code * s_group that wraps in the kernel")
    return QuantizedTensor.from_codes(
        codes_NK,
        Parameters(group_scale=group_NG, channel_scale=unpermute_32(channel).unsqueeze(1)),
        TwoLevelInteger(BITS),
        PerGroup(GROUP_SIZE),
    )


def _shifts(is_group: bool, device: torch.device) -> IntegerArray[Tensor, "4 2"]:
    """Return 4 t for every (r, b)."""
    r = torch.arange(4, device=device).unsqueeze(1)
    b = torch.arange(2, device=device)
    return 4 * (4 * (r % 2) + 2 * b + r // 2) if is_group else 4 * (2 * r + 1 - b)


def _pack_nibbles(codes: IntegerArray[Tensor, "N K"], *, is_group: bool) -> Int32[Tensor, "rows words"]:
    out_features, in_features = codes.shape
    nibbles = (codes.to(torch.int64) + (8 if is_group else 0)) & 0xF
    # n = (c, j, b, n % 8), k = (row, (k % 16) // 4, r); a word is (row, c, n % 8, (k % 16) // 4, j)
    axes = nibbles.view(out_features // 64, 4, 2, 8, in_features // 16, 4, 4).permute(4, 0, 3, 5, 1, 6, 2)
    words = (axes << _shifts(is_group, codes.device)).sum(dim=(-2, -1))
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).reshape(in_features // 16, 2 * out_features)


def _unpack_nibbles(words: Int32[Tensor, "rows words"], *, is_group: bool) -> IntegerArray[Tensor, "N K"]:
    in_features, out_features = 16 * words.shape[0], words.shape[1] // 2
    wide = words.to(torch.int64).view(in_features // 16, out_features // 64, 8, 4, 4, 1, 1)
    nibbles = (wide >> _shifts(is_group, words.device)) & 0xF
    unsigned = nibbles.permute(1, 4, 6, 2, 0, 3, 5).reshape(out_features, in_features)
    codes = unsigned - 8 if is_group else (unsigned ^ 8) - 8
    return codes.to(torch.int8)


def _permute_32(scale: Float[Tensor, " N"]) -> Float[Tensor, "1 N"]:
    return scale.view(-1, 4, 4, 2).transpose(1, 2).reshape(1, -1)


def unpermute_32(stored: Float[Tensor, "1 N"]) -> Float[Tensor, " N"]:
    """Undo P32: the order of `s_channel`. P32 exchanges two axes of length 4, so that it is its own inverse."""
    return stored.view(-1, 4, 4, 2).transpose(1, 2).reshape(-1)


def _permute_64(scale: Float[Tensor, "G N"]) -> Float[Tensor, "G N"]:
    return scale.reshape(scale.shape[0], -1, 8, 8).transpose(2, 3).reshape(scale.shape)


def unpermute_64(stored: Float[Tensor, "G N"]) -> Float[Tensor, "G N"]:
    """Undo P64: the order of `s_group`. P64 exchanges two axes of length 8, so that it is its own inverse."""
    return _permute_64(stored)


def _refuse(reason: str | None, tensor: QuantizedTensor, name: str) -> None:
    if reason is not None:
        raise UnsupportedError(
            compose(
                subject=name,
                value=f"[{tensor.shape[0]}, {tensor.shape[1]}]",
                constraint=reason,
                place="QQQ checkpoint layout",
                remedy="quantize with 4 bits per channel or in groups of 128, or save the native format",
            )
        )


def _require(
    state: Mapping[str, Tensor], leaf: str, dtype: torch.dtype, name: str, shape: tuple[int, ...] | None = None
) -> Tensor:
    tensor = state.get(leaf)
    if tensor is None:
        raise _damaged(f"{name}.{leaf}", "missing", "is needed by the QQQ layout")
    if tensor.dtype != dtype or tensor.ndim != 2 or (shape is not None and tuple(tensor.shape) != shape):
        wanted = f"{dtype} {shape if shape is not None else 'matrix'}"
        raise _damaged(
            f"{name}.{leaf}", f"{tensor.dtype} {tuple(tensor.shape)}", f"is not the {wanted} of the layout"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise _damaged(f"{name}.{leaf}", "NaN or infinity", "is no scale")
    return tensor


def _check_shapes(out_features: int, in_features: int, *, is_group: bool, name: str) -> None:
    reason = _shape_refusal(out_features, in_features, is_group)
    if reason is not None:
        raise _damaged(f"{name}.B", f"[{in_features // 16}, {2 * out_features}]", reason)


def _damaged(subject: str, value: object, constraint: str) -> CheckpointError:
    return CheckpointError(
        compose(
            subject=subject,
            value=value,
            constraint=constraint,
            place="QQQ checkpoint",
            remedy="export the checkpoint again from the original model",
        )
    )
