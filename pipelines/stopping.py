"""Asked to stop, by SIGTERM or Ctrl-C: what is in hand is finished and committed first.

A request is a `KeyboardInterrupt`, the one exception that Ray hands on from its own waiting. Raised at an unlucky
moment, in a callback or a finalizer, it is lost all the same; so a program keeps a note of it as well, and looks
at that between pieces of work. Python's word about the loss, a traceback, is left out: nothing is lost.

One request may come as several signals: `timeout`, systemd, Slurm and terminals signal each process of a group, and
`supervisor.py` hands on what it got itself. What comes within REPEAT_S of a request is part of it.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 2.0
_asked = False
_tell = sys.unraisablehook  # the hook that was there before ours
_asked_at = -math.inf  # when the latest request began, by the monotonic clock


def stop_on_signals() -> None:
    """Have SIGTERM do what Ctrl-C does, and lose neither; for programs, not for libraries."""
    global _tell
    for number in SIGNALS:
        signal.signal(number, _stop)
    if sys.unraisablehook is not _told_unless_noted:
        _tell, sys.unraisablehook = sys.unraisablehook, _told_unless_noted


def _told_unless_noted(unraisable: sys.UnraisableHookArgs) -> None:
    if not (_asked and issubclass(unraisable.exc_type, KeyboardInterrupt)):
        _tell(unraisable)


def _stop(signum: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    if not _repeated():
        raise KeyboardInterrupt


def _repeated() -> bool:
    """Tell whether a signal is part of a request that was heard already; if not, a request begins with it."""
    global _asked_at
    now = time.monotonic()
    if now - _asked_at < REPEAT_S:
        return True
    _asked_at = now
    return False


def stop_if_asked() -> None:
    """Raise a request to stop that was lost on the way.

    Raises:
        KeyboardInterrupt: if this program was asked to stop.
    """
    if _asked:
        raise KeyboardInterrupt


@contextmanager
def patient() -> Iterator[Callable[[], bool]]:
    """Note the first request to stop, and raise it when the block ends; a second one, later, is raised at once.

    Yields a function that tells whether there was one. Handlers other than Python's own and ours are left alone.
    """
    asked = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        again = not _repeated()
        if asked and again:
            raise KeyboardInterrupt
        asked = True

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    replaced = {number: handler for number, handler in before.items() if handler in (signal.default_int_handler, _stop)}
    for number in replaced:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put back the handler of SIGTERM that was there before: `ray.init` sets its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
