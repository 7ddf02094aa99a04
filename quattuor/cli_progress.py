# SPDX-License-Identifier: Apache-2.0
"""Progress bars on standard error."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

from quattuor.progress import Progress

__all__ = ["Bars"]


class Bars(Progress):
    """Shows one bar per open task, with its last note. Use it as a context manager."""

    def __init__(self) -> None:
        """Prepare; nothing is drawn before the context is entered."""
        self._bars = RichBars(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; the bars stay visible as they are."""
        self._bars.stop()

    def start(self, task: str, total: int | None = None) -> None:
        """Add a bar; a task that was shown before starts a new one."""
        self._tasks[task] = self._bars.add_task(task, total=total, note="")

    def advance(self, task: str, steps: int = 1, note: str = "") -> None:
        """Move a bar; a step without a note keeps the last one."""
        if task in self._tasks:
            self._bars.advance(self._tasks[task], steps)
            if note:
                self._bars.update(self._tasks[task], note=note)

    def finish(self, task: str) -> None:
        """Stop the clock of a bar."""
        if task in self._tasks:
            self._bars.stop_task(self._tasks.pop(task))
