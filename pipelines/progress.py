"""Progress of long work: a bar in a terminal, plain lines in a job log, nothing in a library call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tarsift.operators.storage import without_secrets


@dataclass(frozen=True)
class Event:
    """Something done: `done` of `total` units of a pass, with the samples handled so far."""

    name: str
    done: int
    total: int
    samples: int = 0
    unit: str = "shards"
    finished: bool = False
    note: str = ""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing: the default of every library call."""


class PlainLines:
    """Write one line per pass and at most one every `every_s` seconds in between, for job logs."""

    def __init__(self, every_s: float = 10.0, stream=None):
        self.every_s = every_s
        self.stream = stream or sys.stderr
        self._last = 0.0
        self._started: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        start = self._started.setdefault(event.name, now)
        if not event.finished and now - self._last < self.every_s:
            return
        self._last = now
        elapsed = now - start
        rate = f", {event.samples / elapsed:,.0f} samples/s" if event.samples and elapsed > 0.05 else ""
        samples = f", {event.samples:,} samples" if event.samples else ""
        state = "done" if event.finished else "..."
        note = f"  {event.note}" if event.note else ""
        line = f"{event.name}: {event.done}/{event.total} {event.unit}{samples}{rate}, {elapsed:.0f} s {state}{note}"
        print(without_secrets(line), file=self.stream, flush=True)
        if event.finished:
            self._started.pop(event.name, None)


class RichBars:
    """One bar per pass in a terminal; use as a context manager."""

    def __init__(self, console: Console | None = None):
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("[dim]{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )
        self._tasks: dict[str, tuple] = {}

    def __enter__(self) -> RichBars:
        self._bars.start()
        return self

    def __exit__(self, *exc) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        if event.name not in self._tasks:
            task = self._bars.add_task(event.name, total=event.total, unit=event.unit, detail="")
            self._tasks[event.name] = (task, time.monotonic())
        task, start = self._tasks[event.name]
        elapsed = time.monotonic() - start
        rate = f"{event.samples / elapsed:,.0f} samples/s" if event.samples and elapsed > 0.05 else ""
        self._bars.update(task, completed=event.done, total=event.total, detail=without_secrets(event.note) or rate)
        if event.finished:
            self._bars.stop_task(task)
            self._tasks.pop(event.name)


def listener_for(console: Console, *, quiet: bool) -> Listener:
    """Choose how to show progress on this console: nothing, bars or plain lines."""
    if quiet:
        return silent
    return RichBars(console) if console.is_terminal else PlainLines(stream=console.file)


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Listener]:
    """Show progress in the way that fits the standard error; for commands, whose answers follow the block.

    What is printed in the block, as Ray does when a worker dies, goes to the standard error: the standard output is
    for answers.
    """
    listener = listener_for(Console(stderr=True), quiet=quiet)
    with redirect_stdout(sys.stderr), listener if isinstance(listener, RichBars) else nullcontext():
        yield listener
