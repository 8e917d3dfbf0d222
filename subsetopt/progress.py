"""A progress bar on a terminal, plain lines in a log; off means silent."""

import sys
import time
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """Shows how far a run of `total` steps is. Everything goes to standard error."""

    def __init__(self, title: str, total: int, show: bool):
        self.title, self.total, self.show = title, total, show
        self.spoken = time.perf_counter()
        self._first: tuple[int, float] | None = None  # what was done before it, compiling or another run, says nothing
        self._rich: Any = None

    def __enter__(self) -> "Bar":
        if self.show and sys.stderr.isatty():
            # Imported here: rich is for people, a silent fit does without it.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._rich = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._task = self._rich.add_task("", total=self.total, text="")
            self._rich.start()
        return self

    def update(self, done: int, text: str) -> None:
        """`done` of the total steps are finished; `text` says how it stands."""
        if self._first is None:
            self._first = done, time.perf_counter()
            if self._rich is not None:
                self._rich.reset(self._task, completed=done, text=text)
        if self._rich is not None:
            self._rich.update(self._task, completed=done, text=text)
        elif self.show and time.perf_counter() - self.spoken > _SECONDS_BETWEEN_LINES:
            self._say(done, text, *self._first)

    def _say(self, done: int, text: str, first: int, begun: float) -> None:
        self.spoken, pace = time.perf_counter(), ""
        if done > first:
            rate = (done - first) / (self.spoken - begun)
            pace = f" ({rate:.2g} a second, about {(self.total - done) / rate:.0f} s left)"
        print(f"{self.title}: {done}/{self.total} {text}{pace}", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._rich is not None:
            self._rich.stop()
