import errno

import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from tarsift.operators.errors import ChangedError, Interrupted, StoreError, TarsiftError
from tarsift.pipelines.failures import failures_told


def by_task(cause: Exception) -> RayError:
    return RayTaskError("f", "a traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("raised", "kind", "code", "says"),
    [
        (by_task(ChangedError("it has changed")), ChangedError, 2, "^it has changed$"),
        (by_task(StoreError("no\nFailed to apply UDF transform after 1/1 attempts")), StoreError, 75, "^no$"),
        (by_task(by_task(StoreError("no"))), StoreError, 75, "^no$"),
        (by_task(OSError(errno.ENOSPC, "full", "/out/x")), TarsiftError, 1, "the disk is full .*/out/x.*; make room"),
        (OSError(errno.ENOSPC, "full"), TarsiftError, 1, "the disk is full; make room"),
        (OutOfMemoryError("oom"), TarsiftError, 1, "fewer --workers"),
        (WorkerCrashedError(), TarsiftError, 1, "a worker died each time"),
        (NodeDiedError("gone"), Interrupted, 75, "run the same command again"),
    ],
)
def test_a_sentence_and_an_exit_code(raised, kind, code, says):
    with pytest.raises(TarsiftError, match=says) as told, failures_told():
        raise raised
    assert type(told.value) is kind
    assert told.value.exit_code == code


def test_other_errors_are_left_alone():
    for error in (by_task(KeyError("x")), OSError(errno.EIO, "broken"), ValueError("x")):
        with pytest.raises(type(error)), failures_told():
            raise error
