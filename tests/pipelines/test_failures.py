import errno
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from tarsift.operators.errors import ChangedError, Interrupted, StoreError, TarsiftError
from tarsift.operators.shards import ReadShard, Shard, list_shards
from tarsift.pipelines.commit import run_pass
from tarsift.pipelines.failures import failures_told
from tarsift.pipelines.ledger import Ledger
from tarsift.pipelines.reading import shard_items, shards_of
from tarsift.pipelines.session import map_tables, session
from tests.conftest import make_dump


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


def read(items: pa.Table) -> Iterator[pa.Table]:
    for shard in shards_of(items):
        yield from ReadShard(receipts=True)(shard)


def test_a_shard_that_cannot_be_reached_ends_the_run_and_is_read_by_the_next(ray_session, tmp_path):
    make_dump(tmp_path / "dump", shards=3, samples=5, flaws=False)
    away, elsewhere = tmp_path / "dump" / "00001.tar", tmp_path / "elsewhere.tar"
    shards = list_shards(str(tmp_path / "dump"))
    away.rename(elsewhere)
    away.symlink_to(away)  # an error of the file system, and no word about the bytes
    ledger = Ledger(str(tmp_path), "p", "f")

    def run():
        with session():
            return run_pass(ledger, shards, lambda wave: map_tables(shard_items(wave), read, {}), folder="p")

    with pytest.raises(StoreError, match=r"cannot read the shard .*00001\.tar: .*run the same command again") as told:
        run()
    assert told.value.exit_code == 75
    assert "00001" not in ledger.entries()
    elsewhere.replace(away)
    assert {name: entry["rows"] for name, entry in run().entries.items()} == {"00000": 5, "00001": 5, "00002": 5}
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [f"0000{i}.parquet" for i in range(3)]


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
