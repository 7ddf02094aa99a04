# SPDX-License-Identifier: Apache-2.0
"""Which engine serves a checkpoint on this machine, what it is told, and what to change when none can."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import torch

from quattuor.checkpoints.layouts import QUANT_METHOD, read_layouts
from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.serving.storage import NativeStorage

__all__ = ["Engine", "Machine", "Options", "choose_engine", "this_machine", "vllm_command"]

Engine = Literal["auto", "vllm", "transformers"]

_MIN_CAPABILITY = (8, 0)
_HEADROOM = 1.2  # weights, plus the least cache and workspace that is of use


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What serving needs to know of a machine.

    Args:
        num_gpus: CUDA devices.
        capability: Of the first one, or None.
        gpu_bytes: Memory of each.
        has_vllm: Whether vLLM is installed.
        has_plugin: Whether vLLM would find this package's plugin.
    """

    num_gpus: int
    capability: tuple[int, int] | None
    gpu_bytes: int
    has_vllm: bool
    has_plugin: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user asked for; None leaves the choice to the engine."""

    engine: Engine = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    devices: int = 1
    max_model_len: int | None = None


def this_machine() -> Machine:
    """Look at this machine."""
    has_gpu = torch.cuda.is_available()
    return Machine(
        num_gpus=torch.cuda.device_count() if has_gpu else 0,
        capability=torch.cuda.get_device_capability() if has_gpu else None,
        gpu_bytes=torch.cuda.get_device_properties(0).total_memory if has_gpu else 0,
        has_vllm=importlib.util.find_spec("vllm") is not None,
        has_plugin=any(item.name == "quattuor" for item in entry_points(group="vllm.general_plugins")),
    )


def choose_engine(folder: Path, options: Options, machine: Machine) -> Literal["vllm", "transformers"]:
    """Return which engine serves a folder: vLLM with a GPU, transformers' own server without one.

    Raises:
        InputError: The folder is no checkpoint.
        UnsupportedError: The chosen engine cannot serve it here; the message says what to change.
    """
    _check_folder(folder)
    if options.engine == "transformers" or (options.engine == "auto" and machine.num_gpus == 0):
        if options.devices > 1:
            raise _error("--devices", options.devices, "needs vLLM and as many GPUs", "leave it 1")
        return "transformers"
    _check_machine(folder, options, machine)
    _check_layouts(folder)
    return "vllm"


def vllm_command(folder: Path, options: Options) -> list[str]:
    """Return the command that starts vLLM's OpenAI-compatible server."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--host", options.host, "--port", str(options.port)]
    command += ["--served-model-name", options.name or folder.resolve().name]
    if options.devices > 1:
        command += ["--tensor-parallel-size", str(options.devices)]
    if options.max_model_len is not None:
        command += ["--max-model-len", str(options.max_model_len)]
    return command


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(
            compose(
                subject="DIR",
                value=str(folder),
                constraint="holds no config.json",
                place="quattuor serve",
                remedy="pass the folder that `quattuor quantize -o DIR` wrote",
            )
        )


def _check_machine(folder: Path, options: Options, machine: Machine) -> None:
    without = "or add --engine transformers"
    if machine.num_gpus == 0:
        raise _error("GPU", "none", "is there, and vLLM's kernels need one", "serve with --engine transformers")
    if machine.capability is not None and machine.capability < _MIN_CAPABILITY:
        found, wanted = (".".join(map(str, item)) for item in (machine.capability, _MIN_CAPABILITY))
        raise _error(
            "compute capability", found, f"is below the {wanted} of the kernels", f"use an A100 {without}"
        )
    if not machine.has_vllm:
        raise _error("vLLM", "missing", "is not installed", f"pip install 'vllm>=0.22', {without}")
    if not machine.has_plugin:
        remedy = f"reinstall with `pip install quattuor`, {without}"
        raise _error("plugin", "missing", "is not among the entry points that vLLM reads", remedy)
    if options.devices > machine.num_gpus:
        raise _error("--devices", options.devices, f"exceeds the {machine.num_gpus} GPUs", "lower it")
    needed = int(_HEADROOM * sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    if needed > options.devices * machine.gpu_bytes:
        found = f"{options.devices * machine.gpu_bytes / 2**30:.1f} GiB"
        remedy = "raise --devices, or quantize to fewer bits"
        raise _error("GPU memory", found, f"is less than the {needed / 2**30:.1f} GiB this model needs", remedy)


def _check_layouts(folder: Path) -> None:
    """Refuse a native checkpoint with linears that the plugin cannot run. Raises UnsupportedError."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if settings.get("quant_method") != QUANT_METHOD:
        return  # vLLM's own methods, and QQQ, whose layout is one
    seen: set[object] = set()
    for name, layout in read_layouts(settings).items():
        if layout not in seen:
            NativeStorage(layout, name)
            seen.add(layout)


def _error(subject: str, value: object, constraint: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        compose(subject=subject, value=value, constraint=constraint, place="quattuor serve", remedy=remedy)
    )
