# SPDX-License-Identifier: Apache-2.0
"""Run Triton kernels without a GPU: import this before any kernel module, in a process of its own.

Triton decides when a kernel is decorated whether it is compiled or interpreted, so tests start a subprocess
that imports this module first.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

original = interpreter._patch_lang_tensor


def patch_lang_tensor(tensor, scope):
    """Let a scalar be a loop bound: NumPy 2.4 refuses to convert the one-element arrays that hold scalars."""
    original(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_lang_tensor
