# SPDX-License-Identifier: Apache-2.0
"""Tokens times a few entries in compressed rows; see README.md."""

from quattuor.kernels.sparse_product.op import sparse_product

__all__ = ["sparse_product"]
