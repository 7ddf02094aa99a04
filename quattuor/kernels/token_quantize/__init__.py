# SPDX-License-Identifier: Apache-2.0
"""Quantize activations to int8 with one scale per token; see README.md."""

from quattuor.kernels.token_quantize.op import rms_norm_quantize, silu_mul_quantize, token_quantize

__all__ = ["rms_norm_quantize", "silu_mul_quantize", "token_quantize"]
