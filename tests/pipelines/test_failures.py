import errno
import time

import pyarrow as pa
import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from tarsift.operators.errors import ChangedError, Interrupted, StoreError, TarsiftError
from tarsift.operators.shards import Shard
from tarsift.pipelines.commit import run_pass
from tarsift.pipelines.failures import failures_told
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.reading import shard_items
from tarsift.pipelines.session import map_tables, session


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


def never_ready(table: pa.Table) -> pa.Table:
    time.sleep(12)
    return table


def test_a_stall_is_told_with_its_stage(ray_session, tmp_path):
    shards = [Shard(name="s", url="s.tar", size=0)]
    ledger = Ledger(str(tmp_path), "p", "f")

    def stream(wave):
        return map_tables(shard_items(wave), never_ready, {})

    with pytest.raises(TarsiftError, match=r"no progress for 4 s in .*never_ready") as told, session(stall_timeout_s=4):
        run_pass(ledger, shards, stream, folder="p")
    assert "run the same command again" in str(told.value).lower()
