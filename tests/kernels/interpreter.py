# SPDX-License-Identifier: Apache-2.0
"""Run Triton kernels without a GPU: import this before any kernel module, in a process of its own.

Triton decides when a kernel is decorated whether it is compiled or interpreted, so tests start a subprocess
that imports this module first.
"""

import importlib.util
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

# The kernels need nothing of the package but its errors: skip the imports of its public interface.
package = types.ModuleType("quattuor")
package.__path__ = list(importlib.util.find_spec("quattuor").submodule_search_locations)
sys.modules["quattuor"] = package

from triton.runtime import interpreter  # noqa: E402  (reads the environment)

original = interpreter._patch_lang_tensor


def patch_lang_tensor(tensor, scope):
    """Let a scalar be a loop bound: NumPy 2.4 refuses to convert the one-element arrays that hold scalars."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_lang_tensor
