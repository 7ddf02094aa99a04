# SPDX-License-Identifier: Apache-2.0
"""The plugin that lets vLLM serve packed checkpoints: native ones, and those of the original QQQ code.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""

__all__ = ["register"]


def register() -> None:
    """Make vLLM know the quantization methods "quattuor" and "qqq"; a second call changes nothing."""
    from quattuor.serving.vllm import methods  # vLLM is imported only in its own processes

    methods.register_configs()
