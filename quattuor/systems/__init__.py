# SPDX-License-Identifier: Apache-2.0
"""Published systems: one function per file that returns a recipe, and the one table of their names."""

from collections.abc import Callable

from quattuor.recipe import Recipe
from quattuor.systems.awq import awq
from quattuor.systems.gptq import gptq
from quattuor.systems.lut_gemm import lut_gemm
from quattuor.systems.owq import owq
from quattuor.systems.qqq import qqq
from quattuor.systems.quip import quip
from quattuor.systems.rtn import rtn
from quattuor.systems.spqr import spqr
from quattuor.systems.squeezellm import squeezellm

__all__ = ["SYSTEMS", "awq", "gptq", "lut_gemm", "owq", "qqq", "quip", "rtn", "spqr", "squeezellm"]

SYSTEMS: dict[str, Callable[..., Recipe]] = {
    "rtn": rtn,
    "qqq": qqq,
    "awq": awq,
    "quip": quip,
    "squeezellm": squeezellm,
    "lut_gemm": lut_gemm,
    "gptq": gptq,
    "owq": owq,
    "spqr": spqr,
}
"""Every published system by name."""
