# SPDX-License-Identifier: Apache-2.0
"""Activation quantizers: how the inputs of a linear become integers at run time."""

from quattuor.activations.base import ActivationQuantizer
from quattuor.activations.dynamic import DynamicQuantizer

__all__ = ["ActivationQuantizer", "DynamicQuantizer"]
