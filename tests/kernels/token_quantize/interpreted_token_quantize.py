# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the Triton kernel in the interpreter against the reference, one line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch

from quattuor.kernels.token_quantize import reference, triton_kernel


def same(found, expected) -> bool:
    """Whether tensors agree in every bit, NaN included."""
    return all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in zip(found, expected, strict=True))


def close(found, expected, dtype: torch.dtype) -> bool:
    """Whether scales agree to a step of the dtype and codes to one, in few places.

    The interpreter truncates to bfloat16 instead of rounding, which three roundings one after the other amplify.
    """
    steps, codes, share = (4, 3, 1.0) if dtype == torch.bfloat16 else (2, 1, 0.01)
    scale, exact = found[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0)
    difference = (found[0].int() - expected[0].int()).abs()
    is_close = ((scale - exact).abs() <= steps * torch.finfo(dtype).eps * exact.abs()).all()
    return bool(is_close and difference.max() <= codes and (difference > 0).float().mean() <= share)


def tokens(in_features: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random tokens, among them zero, tiny and not finite ones."""
    x = torch.randn(7, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[1] = 0
    x[2, -1] = torch.nan
    x[3, 0] = -torch.inf
    x[4] = 2.0**-149
    return x


def main() -> None:
    """Print a line for each case; fail at the first that differs."""
    triton_kernel.MAX_HELD, triton_kernel.MAX_THREADS = 256, 32  # so that long tokens are cheap to interpret
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for in_features in (100, 600):
            x, other = tokens(in_features, dtype, 0), tokens(in_features, dtype, 1)
            weight = torch.randn(in_features, generator=torch.Generator().manual_seed(2))
            for a, b in ((x.T.contiguous().T, other), (x[::2], other[::2])):
                assert same(triton_kernel.quantize_tokens(a), reference.quantize_tokens(a)), (dtype, in_features)
                for residual in (None, b):
                    found = triton_kernel.rms_norm_quantize_tokens(a, weight, 1e-5, residual)
                    hidden = reference.rms_norm_quantize_tokens(a, weight, 1e-5, residual)[2]
                    if dtype == torch.bfloat16:  # the interpreter truncates to bfloat16 instead of rounding
                        torch.testing.assert_close(found[2], hidden, rtol=2.0**-7, atol=0, equal_nan=True)
                    else:
                        assert same(found[2:], (hidden,)), ("residual", dtype, in_features)
                    expected = reference.rms_norm_quantize_tokens(found[2], weight, 1e-5, None)
                    assert close(found, expected, dtype), ("rms_norm", dtype, in_features)
                found = triton_kernel.silu_mul_quantize_tokens(a, b)
                assert close(found, reference.silu_mul_quantize_tokens(a, b), dtype), (
                    "silu_mul",
                    dtype,
                    in_features,
                )
            print("equal", dtype, in_features)


if __name__ == "__main__":
    main()
