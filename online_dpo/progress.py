"""What a person sees while a campaign runs: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from online_dpo.display.visible import visible


class Bar(Protocol):
    """One stage's count of items."""

    done: int

    def set(self, done: int, *, total: int | None = None) -> None:
        """`done` items are finished; `total` where it becomes known only now."""


class Progress(Protocol):
    """Where the loop says what it does. Safe to use from several threads."""

    def note(self, text: str) -> None:
        """A line of its own."""

    def stage(self, name: str, *, total: int, unit: str) -> Any:
        """A context manager that yields the stage's Bar."""

    def round(self, number: int, of: int) -> None:
        """Round `number` of `of` begins."""

    def close(self) -> None: ...


def make_progress(*, quiet: bool = False) -> Progress:
    """Live on a terminal, plain lines otherwise, nothing when quiet."""
    if quiet:
        return SilentProgress()
    console = Console(stderr=True)
    return LiveProgress(console) if console.is_terminal else PlainProgress()


class _Count:
    def __init__(self) -> None:
        self.done = 0

    def set(self, done: int, *, total: int | None = None) -> None:
        self.done = done


class SilentProgress:
    """For scripts and tests."""

    def note(self, text: str) -> None:
        """Nobody reads it."""

    @contextmanager
    def stage(self, name: str, *, total: int, unit: str) -> Iterator[Bar]:
        yield _Count()

    def round(self, number: int, of: int) -> None:
        """Nobody reads it."""

    def close(self) -> None:
        """Nothing is open."""


class PlainProgress:
    """One line as each stage ends, and one every `every_s` seconds of a long one."""

    def __init__(self, *, every_s: float = 15.0) -> None:
        self._every_s = every_s
        self._round = ""

    def note(self, text: str) -> None:
        print(visible(text), file=sys.stderr, flush=True)

    def round(self, number: int, of: int) -> None:
        self._round = f"round {number:03d}/{of:03d}  "

    @contextmanager
    def stage(self, name: str, *, total: int, unit: str) -> Iterator[Bar]:
        start = time.monotonic()
        bar = _PlainBar(self, f"{self._round}{name:<9}", total, unit, self._every_s)
        yield bar
        seconds = time.monotonic() - start
        self.note(f"{self._round}{name:<9} {bar.done} {unit} in {seconds:.1f} s")

    def close(self) -> None:
        """Nothing is open."""


class _PlainBar(_Count):
    def __init__(
        self, progress: PlainProgress, label: str, total: int, unit: str, every_s: float
    ) -> None:
        super().__init__()
        self._progress = progress
        self._label = label
        self._total = total
        self._unit = unit
        self._every_s = every_s
        self._start = self._next = time.monotonic()
        self._next += every_s

    def set(self, done: int, *, total: int | None = None) -> None:
        super().set(done)
        self._total = total or self._total
        now = time.monotonic()
        if now < self._next or not done:
            return
        self._next = now + self._every_s
        rate = done / (now - self._start)
        left = (self._total - done) / rate
        self._progress.note(
            f"{self._label} {done}/{self._total} {self._unit}, {rate:.1f}/s, {left:.0f} s left"
        )


class LiveProgress:
    """Bars with rates and time left; the rounds' bar on top."""

    def __init__(self, console: Console) -> None:
        self._lock = threading.Lock()
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._rich.start()
        self._rounds: Any = None

    def note(self, text: str) -> None:
        self._rich.console.print(visible(text), highlight=False, markup=False)

    def round(self, number: int, of: int) -> None:
        if self._rounds is None:
            self._rounds = self._rich.add_task("[bold]rounds", total=of, unit="", rate="")
        self._rich.update(self._rounds, completed=max(0, number - 1))

    @contextmanager
    def stage(self, name: str, *, total: int, unit: str) -> Iterator[Bar]:
        task = self._rich.add_task(f"  {name}", total=total, unit=unit, rate="")
        try:
            yield _LiveBar(self._rich, task)
        finally:
            self._rich.remove_task(task)

    def close(self) -> None:
        self._rich.stop()


class _LiveBar(_Count):
    def __init__(self, rich: RichProgress, task: Any) -> None:
        super().__init__()
        self._rich = rich
        self._task = task
        self._start = time.monotonic()

    def set(self, done: int, *, total: int | None = None) -> None:
        super().set(done)
        if total is not None:
            self._rich.update(self._task, total=total)
        seconds = time.monotonic() - self._start
        rate = f"{done / seconds:.1f}/s" if seconds > 0 and done else ""
        self._rich.update(self._task, completed=done, rate=rate)
