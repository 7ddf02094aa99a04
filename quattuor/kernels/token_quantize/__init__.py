# SPDX-License-Identifier: Apache-2.0
"""Quantize activations to int8 with one scale per token; see README.md."""

from quattuor.kernels.token_quantize.op import token_quantize

__all__ = ["token_quantize"]
