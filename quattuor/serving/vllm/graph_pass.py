# SPDX-License-Identifier: Apache-2.0
"""Hooks the fusions into the compiler of an engine that serves packed linears.

Releases of vLLM without norms as operators of their own, or without the hook, are left alone: there the inputs are
quantized by plain PyTorch, and the compiler fuses what it can.
"""

import importlib
import importlib.util
import inspect
import os
from types import ModuleType
from typing import Any

import torch

from quattuor.serving import fusion
from quattuor.serving.packed_linear import FUSE_VARIABLE

__all__ = ["install"]

_MODULES = ("vllm.compilation.passes.inductor_pass", "vllm.compilation.inductor_pass")
_NORM, _ADDING_NORM = "rms_norm", "fused_add_rms_norm"


def install(config: Any) -> bool:
    """Let the graphs of an engine pass through the fusions; a second call changes nothing.

    Args:
        config: The engine's configuration, before its model is compiled.

    Returns:
        Whether they do: false where `FUSE_VARIABLE` says otherwise, the release has no hook, or it is taken.
    """
    if os.environ.get(FUSE_VARIABLE, "operators") != "operators":
        return False
    module = _pass_module()
    if module is None or not _has_norms():
        return False
    from vllm.platforms import current_platform

    passes = config.compilation_config.inductor_compile_config
    known = passes.get(current_platform.pass_key)
    if known is None:
        passes[current_platform.pass_key] = _make_pass(module)
    return known is None or getattr(known, "is_quattuor", False)


def _pass_module() -> ModuleType | None:
    """Return the module of vLLM that defines graph passes, or None."""
    for name in _MODULES:
        if importlib.util.find_spec(name.rpartition(".")[0]) and importlib.util.find_spec(name):
            return importlib.import_module(name)
    return None


def _has_norms() -> bool:
    namespace = torch.ops.vllm_ir
    return hasattr(namespace, _NORM) and hasattr(namespace, _ADDING_NORM)


def _make_pass(module: ModuleType) -> Any:
    class QuantizationFusion(module.InductorPass):  # type: ignore[misc, name-defined]
        """Runs the fusions on one graph."""

        is_quattuor = True

        def __call__(self, graph: torch.fx.Graph) -> None:
            namespace = torch.ops.vllm_ir
            fusion.fuse_norms(
                graph, {getattr(namespace, _NORM).default}, {getattr(namespace, _ADDING_NORM).default}
            )
            fusion.fuse_gates(graph)
            fusion.fuse_gated_products(graph)

        def uuid(self) -> str:
            """Return what identifies compiled graphs that went through this pass."""
            return str(module.InductorPass.hash_source(inspect.getsource(fusion)))

    return QuantizationFusion()
