"""The one policy by which requests to a store are tried again, and how often that was needed.

Waits grow from a fifth of a second to ten, but not beyond a tenth of the patience, so that a store which
fails often is asked often enough; each is drawn at random so that many workers do not come back at once.
What will not get better by waiting (a file that is not there, no permission, no credentials) is raised at
once. The drivers' own repetitions are switched off where they can be (`storage.filesystem`).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tarsift.operators.access import of_a_client, refusal, refused
from tarsift.operators.errors import StoreError, TarsiftError

PATIENCE_S = 180.0  # an outage of a minute passes, and a few that follow each other
FIRST_CONTACT_S = 10.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0

LASTING = (
    TarsiftError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ValueError,
    TypeError,
)
# Errors of drivers that are not installed everywhere, by name: what is asked, not what the store answers.
LASTING_NAMES = ("ParamValidation", "InvalidRegion")

Answer = TypeVar("Answer")
_patience_s = PATIENCE_S
_repeated = _unreported = 0
_guard = threading.Lock()


def retried(request: Callable[[], Answer], doing: str) -> Answer:
    """Return what a request to a store returns; try it again for `PATIENCE_S` while it fails as stores do.

    Args:
        doing: `read s3://bucket/a.tar`, for the error.

    Raises:
        StoreError: if it still fails then, or the credentials have expired.
        AccessError: if the store refuses, or there are no credentials to ask it with.
        Exception: what waiting does not mend, as it came.
    """
    global _repeated, _unreported
    deadline = time.monotonic() + _patience_s
    longest = min(FIRST_WAIT_S, _patience_s / 10)
    while True:
        try:
            return request()
        except Exception as error:  # drivers raise OSError, but also errors of their HTTP client that are none
            code = refusal(error)
            if code is not None:
                raise refused(doing, error, code) from error
            if lasting(error):
                raise
            wait = random.uniform(longest / 2, longest)
            if time.monotonic() + wait > deadline:
                raise StoreError(
                    f"cannot {doing}: {type(error).__name__}: {error}; tried for {_patience_s:g} s. "
                    "Run the same command again when the store answers."
                ) from error
        with _guard:
            _repeated += 1
            _unreported += 1
        time.sleep(wait)
        longest = min(2 * longest, LONGEST_WAIT_S, _patience_s / 10)


def lasting(error: BaseException) -> bool:
    """Tell whether an error that is no refusal stays the same however often one asks."""
    name = type(error).__name__
    return (isinstance(error, LASTING) and not of_a_client(error)) or any(part in name for part in LASTING_NAMES)


@contextmanager
def first_contact() -> Iterator[None]:
    """Have less patience in the block: who has just typed a command wants to hear at once that nobody answers."""
    global _patience_s
    before, _patience_s = _patience_s, FIRST_CONTACT_S
    try:
        yield
    finally:
        _patience_s = before


def take_repeated() -> int:
    """Return how many requests of this process were tried again since the last call."""
    global _repeated
    with _guard:
        taken, _repeated = _repeated, 0
    return taken


def take_unreported() -> int:
    """Return the same, since the last call of this function: for metrics, which do not wait for the end of a pass."""
    global _unreported
    with _guard:
        taken, _unreported = _unreported, 0
    return taken


def add_repeated(count: int) -> None:
    """Add what another process counted to what this one will tell."""
    global _repeated, _unreported
    with _guard:
        _repeated += count
        _unreported += count


os.register_at_fork(after_in_child=take_repeated)
