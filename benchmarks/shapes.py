# SPDX-License-Identifier: Apache-2.0
"""Shapes of real layers that kernel benchmarks run on."""

__all__ = ["LINEAR_SHAPES", "TOKEN_COUNTS"]

#: (out_features, in_features) by where they occur; merged projections where runtimes merge them.
LINEAR_SHAPES = {
    "Llama-3-70B, one of gate and up": (28672, 8192),
    "Llama-2-7B, one of gate and up": (11008, 4096),
    "Llama-3-70B, attention output": (8192, 8192),
    "Llama-2-7B, attention output": (4096, 4096),
    "Llama-2-7B, query, key and value": (12288, 4096),
    "Llama-2-7B, gate and up": (22016, 4096),
    "Llama-2-7B, down": (4096, 11008),
    "Llama-3-70B, down": (8192, 28672),
    "Llama-3-70B, gate and up": (57344, 8192),
}

#: Single-stream and batched decoding, speculative decoding, chunked and whole prefill.
TOKEN_COUNTS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
