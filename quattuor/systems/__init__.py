# SPDX-License-Identifier: Apache-2.0
"""Published systems: one function per file that returns a recipe, and the one table of their names."""

from collections.abc import Callable

from quattuor.recipe import Recipe
from quattuor.systems.qqq import qqq
from quattuor.systems.rtn import rtn

__all__ = ["SYSTEMS", "qqq", "rtn"]

SYSTEMS: dict[str, Callable[..., Recipe]] = {
    "rtn": rtn,
    "qqq": qqq,
}
"""Every published system by name."""
