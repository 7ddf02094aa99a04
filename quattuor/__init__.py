# SPDX-License-Identifier: Apache-2.0
"""Quattuor: quantize large language models for real. Importing it lets transformers load what it saved."""

from quattuor import systems
from quattuor.calibration.data import calibration_batches, load_text
from quattuor.checkpoints import ModelSource, inspect, save_pretrained, verify
from quattuor.errors import CalibrationError, CheckpointError, InputError, QuattuorError, UnsupportedError
from quattuor.quantize import quantize, quantize_to_folder
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.recipe import Recipe
from quattuor.rules import Rule
from quattuor.serving.transformers import register

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "InputError",
    "ModelSource",
    "QuantizedTensor",
    "QuattuorError",
    "Recipe",
    "Rule",
    "UnsupportedError",
    "calibration_batches",
    "inspect",
    "load_text",
    "quantize",
    "quantize_to_folder",
    "save_pretrained",
    "systems",
    "verify",
]

__version__ = "0.1.0"

register()
