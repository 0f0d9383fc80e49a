"""What has failed, for whoever started the run: what Ray raises becomes one sentence and an exit code.

What a later run of the same command can mend (a node lost, Ray gone) is `Interrupted`; what it would only meet
again (a worker that dies each time, a full disk) is not.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import (
    ActorDiedError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from tarsift.operators.errors import AGAIN, Interrupted, TarsiftError

RAYS_NOTE = "\nFailed to apply UDF transform"  # put by Ray Data behind the message of what a function raised
LOST = (NodeDiedError, ObjectLostError, LocalRayletDiedError, RaySystemError)
DIED = (WorkerCrashedError, ActorDiedError)


@contextmanager
def failures_told() -> Iterator[None]:
    """Raise what Ray or the disk raises in the block as the TarsiftError it comes from, or that says what to do.

    Raises:
        Interrupted: if Ray or a node was lost.
        TarsiftError: if workers died of something that a retry meets again, memory or disk ran out, or a
            task failed with an error of tarsift's, which is raised as it was.
    """
    try:
        yield
    except RayError as error:
        told = _told(error)
        if told is None:
            raise
        raise told from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _disk_full(error) from error


def stalled(seconds: float, where: str, *, smaller: str) -> TarsiftError:
    """Return the error of a run in which nothing has been finished for so long.

    Args:
        where: functions that run, and on what.
        smaller: what makes less of what is done at once, as "smaller shards".
    """
    return TarsiftError(
        f"no progress for {seconds:g} s in {where}. Run the same command again; where one may take as long, with "
        f"{smaller} or, if the command takes settings, a higher --set resources.stall_timeout_s=S."
    )


def _told(error: RayError) -> TarsiftError | None:
    cause = _cause(error)
    if isinstance(cause, TarsiftError):
        return type(cause)(str(cause).partition(RAYS_NOTE)[0])
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return _disk_full(cause)
    if isinstance(cause, OutOfDiskError):
        return TarsiftError(f"the disk on which Ray keeps objects is full; make room; {AGAIN}")
    if isinstance(cause, OutOfMemoryError):
        return TarsiftError(
            f"memory ran out again and again; try fewer --workers, a smaller --batch-size, or more memory; {AGAIN}"
        )
    if isinstance(cause, LOST):
        return Interrupted(f"Ray lost a node or what lay on it ({type(cause).__name__}); {AGAIN}")
    if isinstance(cause, DIED):
        return TarsiftError(
            f"a worker died each time it was tried ({type(cause).__name__}); if its machine ran out of memory, try "
            f"fewer --workers or a smaller --batch-size; {AGAIN}"
        )
    return None


def _cause(error: BaseException) -> BaseException:
    """Return what a task raised, through as many tasks as handed it on."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
        error = error.cause
    return error


def _disk_full(error: OSError) -> TarsiftError:
    where = f" ({error.filename})" if error.filename else ""
    return TarsiftError(f"the disk is full{where}; make room; {AGAIN}")
