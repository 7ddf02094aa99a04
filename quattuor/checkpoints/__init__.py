# SPDX-License-Identifier: Apache-2.0
"""Reading models from disk, and formats that packed models are stored in."""

from quattuor.checkpoints.base import CheckpointFormat, PackedModel
from quattuor.checkpoints.layouts import expected_bytes, read_layouts
from quattuor.checkpoints.native import CheckpointWriter, NativeFormat, read_native, save_pretrained, write_native
from quattuor.checkpoints.qqq import QQQFormat, read_qqq, write_qqq
from quattuor.checkpoints.source import ModelSource
from quattuor.checkpoints.streaming import StreamingStore
from quattuor.checkpoints.verification import LayerRow, VerifiedRow, inspect, verify

__all__ = [
    "CHECKPOINTS",
    "CheckpointFormat",
    "CheckpointWriter",
    "LayerRow",
    "ModelSource",
    "NativeFormat",
    "PackedModel",
    "QQQFormat",
    "StreamingStore",
    "VerifiedRow",
    "expected_bytes",
    "inspect",
    "read_layouts",
    "read_native",
    "read_qqq",
    "save_pretrained",
    "verify",
    "write_native",
    "write_qqq",
]

CHECKPOINTS: dict[str, CheckpointFormat] = {"quattuor": NativeFormat(), "qqq": QQQFormat()}
"""Every format of packed models, by the `quant_method` of its `config.json`."""
