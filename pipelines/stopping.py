"""Asked to stop, by SIGTERM or Ctrl-C: what is in hand is finished and committed first.

A request is a `KeyboardInterrupt`, the one exception that Ray hands on from its own waiting.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stop_on_sigterm() -> None:
    """Have SIGTERM do what Ctrl-C does; for programs, not for libraries."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def patient() -> Iterator[Callable[[], bool]]:
    """Note the first request to stop, and raise it when the block ends; a second one is raised at once.

    Yields a function that tells whether there was one. Handlers other than Python's own are left alone.
    """
    asked = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    replaced = []
    if threading.current_thread() is threading.main_thread():
        replaced = [number for number in SIGNALS if signal.getsignal(number) is signal.default_int_handler]
    for number in replaced:
        signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number in replaced:
            signal.signal(number, signal.default_int_handler)
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
