"""Progress of long work: a bar in a terminal, lines in a job log, plain ones or JSON, nothing in a library call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from tarsift.operators.storage import without_secrets
from tarsift.pipelines import json_log
from tarsift.pipelines.json_log import write_line


@dataclass(frozen=True)
class Event:
    """Something done: `done` of `total` units of a pass, with the samples handled so far.

    The first event of a pass tells what was done before it began; all numbers of later ones go on from there.

    Attributes:
        errors: samples that carry an error, by reason.
        repeated: requests to the store that workers had to repeat.
    """

    name: str
    done: int
    total: int
    samples: int = 0
    unit: str = "shards"
    finished: bool = False
    note: str = ""
    errors: Mapping[str, int] = field(default_factory=dict)
    repeated: int = 0


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing: the default of every library call."""


class Paces:
    """How fast the passes are that run."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, event: Event) -> tuple[float, float | None]:
        """Return the seconds since the first event of the pass and the samples per second; None while not known."""
        now = time.monotonic()
        start, before = self._began.setdefault(event.name, (now, event.samples))
        if event.finished:
            del self._began[event.name]
        elapsed, samples = now - start, event.samples - before
        return elapsed, samples / elapsed if samples and elapsed > 0.05 else None


class PlainLines:
    """Write one line per pass and at most one every `every_s` seconds in between, for job logs."""

    def __init__(self, every_s: float = 10.0, stream=None):
        self.every_s = every_s
        self.stream = stream or sys.stderr
        self._last = 0.0
        self._pace = Paces()

    def __call__(self, event: Event) -> None:
        elapsed, pace = self._pace(event)
        now = time.monotonic()
        if not event.finished and now - self._last < self.every_s:
            return
        self._last = now
        rate = f", {pace:,.0f} samples/s" if pace else ""
        samples = f", {event.samples:,} samples" if event.samples else ""
        state = "done" if event.finished else "..."
        note = f"  {event.note}" if event.note else ""
        line = f"{event.name}: {event.done}/{event.total} {event.unit}{samples}{rate}, {elapsed:.0f} s {state}{note}"
        print(without_secrets(line), file=self.stream, flush=True)


class JsonLines:
    """Write a line of JSON where a pass begins and ends, and at most one every `every_s` seconds in between."""

    def __init__(self, every_s: float = 10.0, stream=None):
        self.every_s = every_s
        self.stream = stream or sys.stderr
        self._last: dict[str, float] = {}  # of the passes that run
        self._pace = Paces()

    def __call__(self, event: Event) -> None:
        elapsed, pace = self._pace(event)
        now = time.monotonic()
        begins = event.name not in self._last
        if not (begins or event.finished) and now - self._last[event.name] < self.every_s:
            return
        self._last[event.name] = now
        what = "pass_finished" if event.finished else "pass_started" if begins else "progress"
        fields: dict[str, Any] = {"pass": event.name, "done": event.done, "total": event.total, "unit": event.unit}
        fields |= {"samples": event.samples, "samples_per_s": pace and round(pace, 1), "elapsed_s": round(elapsed, 3)}
        fields |= {"errors": dict(event.errors), "repeated_requests": event.repeated, "note": event.note}
        write_line(what, stream=self.stream, **fields)
        if event.finished:
            del self._last[event.name]


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
        self._tasks: dict[str, TaskID] = {}
        self._pace = Paces()

    def __enter__(self) -> RichBars:
        self._bars.start()
        return self

    def __exit__(self, *exc) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        if event.name not in self._tasks:
            self._tasks[event.name] = self._bars.add_task(event.name, total=event.total, unit=event.unit, detail="")
        task = self._tasks[event.name]
        _, pace = self._pace(event)
        rate = f"{pace:,.0f} samples/s" if pace else ""
        self._bars.update(task, completed=event.done, total=event.total, detail=without_secrets(event.note) or rate)
        if event.finished:
            self._bars.stop_task(task)
            self._tasks.pop(event.name)


def listener_for(console: Console, *, quiet: bool) -> Listener:
    """Choose how to show progress on this console: nothing, bars, or lines, which are JSON where that is asked for."""
    if quiet:
        return silent
    if json_log.asked_for():
        return JsonLines(stream=console.file)
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
