# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the transform tests."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked(monkeypatch):
    """Switch annotation checks off, so that bad input meets the library's own errors, as it does for users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
