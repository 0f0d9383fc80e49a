"""Coverage and merge: every row of a shard once, in order, whatever arrives in which order."""

import hashlib
import json
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import TaskCancelledError, WorkerCrashedError

from tarsift.operators import storage
from tarsift.operators.errors import TarsiftError
from tarsift.operators.schema import fixed_size_list, matrix
from tarsift.operators.shards import Shard
from tarsift.operators.stored import ReadStored, Stored, end_row
from tarsift.pipelines import commit, tasks
from tarsift.pipelines.commit import ROW_GROUP_ROWS, Coverage, merge_parts, run_pass, runs, write_parts
from tarsift.pipelines.ledger import Ledger


def rows(shard: str, first: int, last: int) -> pa.Table:
    n = last - first + 1
    at = np.arange(first, last + 1)
    return pa.table(
        {
            "shard": pa.array([shard] * n),
            "row": pa.array(at, pa.int32()),
            "error": pa.array(["undecodable_image" if i % 7 == 0 else None for i in at], pa.string()),
            "image_embedding": fixed_size_list((at[:, None] * np.ones(4)).astype(np.float16)),
        }
    )


def cuts(n: int, pieces: int, seed: int) -> list[tuple[int, int]]:
    inner = sorted(random.Random(seed).sample(range(1, n), pieces - 1))
    return [(a, b - 1) for a, b in zip([0, *inner], [*inner, n], strict=True)]


def test_runs_split_by_shard_gap_and_end_row():
    table = pa.concat_tables([rows("a", 3, 5), rows("a", 9, 9), rows("b", 0, 1)])
    assert [(s, a, b, len(t)) for s, a, b, t in runs(table)] == [("a", 3, 5, 3), ("a", 9, 9, 1), ("b", 0, 1, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_coverage_completes_only_with_all_rows_and_the_end(seed):
    receipts = [(a, b, f"p{a}", "") for a, b in cuts(100, 8, seed)] + [(-1, -1, "", json.dumps({"rows": 100}))]
    random.Random(seed).shuffle(receipts)
    coverage = Coverage()
    for receipt in receipts[:-1]:
        coverage.add(*receipt)
        assert coverage.complete() is None
    coverage.add(*receipts[-1])
    assert coverage.complete() == [f"p{a}" for a, _ in cuts(100, 8, seed)]


def test_coverage_leaves_out_what_a_retried_task_repeats():
    coverage = Coverage(end={"rows": 10})
    for first, last in ((0, 5), (2, 4), (6, 9)):
        coverage.add(first, last, f"p{first}", "")
    assert coverage.complete() == ["p0", "p6"]


def test_a_shard_without_samples_is_complete_at_its_end():
    coverage = Coverage()
    assert coverage.complete() is None
    coverage.add(-1, -1, "", json.dumps({"rows": 0}))
    assert coverage.complete() == []


def parts_of(folder, table: pa.Table) -> list[str]:
    return [receipt["part"] for receipt in write_parts(table, folder=str(folder)).to_pylist()]


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_merge_gives_the_same_bytes_however_the_stream_was_cut(tmp_path, pieces):
    n = ROW_GROUP_ROWS * 2 + 17
    parts = [p for first, last in cuts(n, pieces, 1) for p in parts_of(tmp_path, rows("s", first, last))]
    entry = merge_parts(parts, str(tmp_path / "out.parquet"), n, {"shard": "s"})
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["row"].to_pylist() == list(range(n))
    assert entry["errors"] == {"undecodable_image": len(range(0, n, 7))}
    data = (tmp_path / "out.parquet").read_bytes()
    assert entry["output_sha256"] == hashlib.sha256(data).hexdigest()
    assert entry["output_bytes"] == len(data)
    whole = parts_of(tmp_path, rows("s", 0, n - 1))
    merge_parts(whole, str(tmp_path / "whole.parquet"), n, {"shard": "s"})
    assert (tmp_path / "whole.parquet").read_bytes() == data


def test_merge_drops_rows_that_two_parts_share(tmp_path):
    parts = parts_of(tmp_path, rows("s", 0, 9)) + parts_of(tmp_path, rows("s", 5, 14))
    merge_parts(parts, str(tmp_path / "out.parquet"), 15, {})
    values, _ = matrix(pq.read_table(tmp_path / "out.parquet")["image_embedding"])
    assert values[:, 0].tolist() == list(range(15))


@pytest.mark.parametrize("missing", [[(0, 4), (6, 9)], [(1, 9)], [(0, 8)]])
def test_merge_refuses_missing_rows(tmp_path, missing):
    parts = [p for first, last in missing for p in parts_of(tmp_path, rows("s", first, last))]
    with pytest.raises(TarsiftError, match="run the same command again"):
        merge_parts(parts, str(tmp_path / "out.parquet"), 10, {})


def test_sink_reports_the_end_row_and_drops_images(tmp_path):
    table = rows("s", 0, 2).append_column("image", pa.array([b"x"] * 3, pa.large_binary()))
    receipts = write_parts(table, folder=str(tmp_path)).to_pylist()
    assert [(r["first"], r["last"]) for r in receipts] == [(0, 2)]
    assert "image" not in pa.ipc.open_stream(storage.read_bytes(receipts[0]["part"])).read_all().column_names
    ended = write_parts(end_row(table.schema, "s", 3), folder=str(tmp_path)).to_pylist()
    assert [(r["first"], json.loads(r["end"])) for r in ended] == [(-1, {"rows": 3, "repeated": 0})]


def test_parquet_opens_without_ray_in_polars_and_duckdb(tmp_path):
    import duckdb
    import polars

    merge_parts(parts_of(tmp_path, rows("s", 0, 9)), str(tmp_path / "o.parquet"), 10, {"encoder": "x"})
    frame = polars.read_parquet(tmp_path / "o.parquet")
    assert frame["image_embedding"].dtype == polars.Array(polars.Float16, 4)
    assert duckdb.sql(f"select sum(row) from '{tmp_path}/o.parquet'").fetchall() == [(45,)]
    assert pq.read_schema(tmp_path / "o.parquet").metadata[b"tarsift.encoder"] == b"x"


def test_a_shard_without_samples_keeps_its_columns(tmp_path):
    end = json.dumps({"rows": 0})
    schema = pa.schema(
        [("shard", pa.string()), ("row", pa.int32()), ("key", pa.string()), ("error", pa.string()), ("x", pa.float32())]
    )
    table = pa.table(
        [["s"], pa.array([-1], pa.int32()), [end], ["end_of_shard"], pa.array([None], pa.float32())], schema
    )
    coverage = Coverage()
    for receipt in (r for _ in range(2) for r in write_parts(table, folder=str(tmp_path)).to_pylist()):  # a retry
        coverage.add(receipt["first"], receipt["last"], receipt["part"], receipt["end"])
    parts = coverage.complete()
    assert parts is not None
    assert len(parts) == 1
    target = str(tmp_path / "s.parquet")
    assert merge_parts(parts, target, 0, {})["rows"] == 0
    assert pq.read_schema(target).names == schema.names
    (row,) = ReadStored([Stored(str(tmp_path)), Stored(str(tmp_path), ("x",))], receipts=True)("s")
    assert row.column_names == schema.names
    assert json.loads(row["key"][0].as_py()) == {"rows": 0, "repeated": 0}


def stuck_merge(*arguments) -> None:
    time.sleep(600)


def test_a_merge_that_never_ends_is_told_and_cancelled(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "_merge_and_tidy", stuck_merge)
    monkeypatch.setattr(tasks, "stall_timeout_s", lambda: 1.0)
    monkeypatch.setattr(tasks, "SOON_S", 0.2)
    cancel, cancelled = ray_session.cancel, []
    monkeypatch.setattr(ray_session, "cancel", lambda call, force: cancelled.append(call) or cancel(call, force=force))
    table = rows("s", 0, 2).append_column("key", pa.array(["0", "1", "2"]))
    table = pa.concat_tables([table, end_row(table.schema, "s", 3)])
    ledger = Ledger(str(tmp_path), "p", "f")
    with pytest.raises(TarsiftError, match=r"no progress for 1 s in stuck_merge \(s\)"):
        run_pass(ledger, [Shard(name="s", url="", size=0)], lambda wave: ray_session.data.from_arrow(table), folder="p")
    assert len(cancelled) == 1
    with pytest.raises((TaskCancelledError, WorkerCrashedError)):
        ray_session.get(cancelled[0], timeout=60)
