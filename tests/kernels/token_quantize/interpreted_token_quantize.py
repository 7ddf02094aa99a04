# SPDX-License-Identifier: Apache-2.0
"""Program of its own: the Triton kernel in the interpreter against the reference, one line per case."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter  # noqa: F401  (must come before the kernels)
import torch

from quattuor.kernels.token_quantize import reference, triton_kernel


def main() -> None:
    """Print a line for each case; fail at the first that differs."""
    triton_kernel.MAX_BLOCK = 256  # so that long tokens are cheap to interpret
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for in_features in (1, 100, 256, 1000):
            x = torch.randn(7, in_features).to(dtype)
            x[1] = 0
            x[2, -1] = torch.nan
            x[3, 0] = -torch.inf
            x[4] = 2.0**-149
            for tokens in (x, x.T.contiguous().T, x[::2]):
                expected = reference.quantize_tokens(tokens)
                for fast, exact in zip(triton_kernel.quantize_tokens(tokens), expected, strict=True):
                    assert torch.equal(fast.nan_to_num(-1.0), exact.nan_to_num(-1.0)), (dtype, in_features)
            print("equal", dtype, in_features)


if __name__ == "__main__":
    main()
