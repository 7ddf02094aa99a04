# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel needs is checked in one place."""

import importlib.util

import pytest

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.requirements import reason_against_triton


def problem(device_type: str, compute_capability: tuple[int, int] | None) -> LinearProblem:
    return LinearProblem(
        out_features=64,
        in_features=64,
        weight_bits=4,
        device_type=device_type,
        compute_capability=compute_capability,
    )


@pytest.mark.parametrize(
    ("device_type", "capability", "part"),
    [("cpu", None, "not on cpu"), ("cuda", (7, 5), "not (7, 5)"), ("cuda", None, "not None")],
)
def test_other_devices_are_refused(
    device_type: str, capability: tuple[int, int] | None, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    reason = reason_against_triton(problem(device_type, capability))
    assert reason is not None
    assert part in reason


def test_triton_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = problem("cuda", (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert reason_against_triton(ampere) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install triton" in str(reason_against_triton(ampere))
