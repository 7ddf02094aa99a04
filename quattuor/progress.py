# SPDX-License-Identifier: Apache-2.0
"""How long work reports how far it is; silent unless the caller passes something that listens."""

from abc import ABC, abstractmethod

__all__ = ["Progress", "Silent"]


class Progress(ABC):
    """Receives the progress of nested tasks. Implementations must not raise and must not change numbers."""

    @abstractmethod
    def start(self, task: str, total: int | None = None) -> None:
        """Open a task of `total` steps (None: unknown)."""

    @abstractmethod
    def advance(self, task: str, steps: int = 1, note: str = "") -> None:
        """Report `steps` more steps of an open task, with a short remark."""

    @abstractmethod
    def finish(self, task: str) -> None:
        """Close a task."""


class Silent(Progress):
    """The default: hears everything, says nothing."""

    def start(self, task: str, total: int | None = None) -> None:
        """Ignore the task."""

    def advance(self, task: str, steps: int = 1, note: str = "") -> None:
        """Ignore the steps."""

    def finish(self, task: str) -> None:
        """Ignore the end."""
