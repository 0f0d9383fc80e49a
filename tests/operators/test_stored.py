"""ReadStored: columns of several passes side by side, rows in order, an end row."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators.errors import END_OF_SHARD, TarsiftError
from tarsift.operators.stored import ReadStored, Stored


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a" / "part").mkdir(parents=True)
    (tmp_path / "b" / "part").mkdir(parents=True)
    base = pa.table({"shard": ["x"] * 10, "row": pa.array(range(10), pa.int32()), "error": pa.nulls(10, pa.string())})
    pq.write_table(
        base.append_column("u", pa.array(range(10))), tmp_path / "a" / "part" / "x.parquet", row_group_size=4
    )
    pq.write_table(
        base.append_column("v", pa.array(range(100, 110))), tmp_path / "b" / "part" / "x.parquet", row_group_size=7
    )
    return tmp_path


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_zips_passes_by_row_whatever_their_row_groups(folder, batch_rows):
    read = ReadStored([Stored(f"{folder}/a"), Stored(f"{folder}/b", ("row", "v"))], batch_rows=batch_rows)
    table = pa.concat_tables(read("part/x"))
    assert table.column_names == ["shard", "row", "error", "u", "v"]
    assert table["v"].to_pylist() == [100 + u for u in table["u"].to_pylist()]
    assert table["row"].to_pylist() == list(range(10))


def test_a_prefix_tells_columns_of_one_name_apart(folder):
    sources = [Stored(f"{folder}/a", ("shard", "row", "u")), Stored(f"{folder}/a", ("shard", "row", "u"), "b_")]
    table = pa.concat_tables(ReadStored(sources)("part/x"))
    assert table.column_names == ["shard", "row", "u", "b_u"]
    assert table["u"].equals(table["b_u"])


def test_the_last_row_says_how_many_there_are(folder):
    *tables, end = ReadStored([Stored(f"{folder}/a", ("shard", "row", "u"))], receipts=True)("part/x")
    assert sum(map(len, tables)) == 10
    assert end["row"].to_pylist() == [-1]
    assert end["error"].to_pylist() == [END_OF_SHARD]
    assert json.loads(end["key"][0].as_py()) == {"rows": 10, "repeated": 0}
    assert end["u"].to_pylist() == [None]


def test_a_shard_without_rows_has_only_an_end(tmp_path):
    pq.write_table(
        pa.table({"shard": pa.array([], pa.string()), "row": pa.array([], pa.int32())}), tmp_path / "x.parquet"
    )
    (end,) = ReadStored([Stored(str(tmp_path))], receipts=True)("x")
    assert json.loads(end["key"][0].as_py()) == {"rows": 0, "repeated": 0}


def test_passes_of_different_length_are_refused(folder):
    short = pa.table({"shard": ["x"], "row": pa.array([0], pa.int32())})
    pq.write_table(short, folder / "b" / "part" / "x.parquet")
    with pytest.raises(ValueError, match="shorter"):
        list(ReadStored([Stored(f"{folder}/a"), Stored(f"{folder}/b")], batch_rows=4)("part/x"))


def test_rows_out_of_order_are_refused(folder):
    path = folder / "a" / "part" / "x.parquet"
    pq.write_table(pq.read_table(path).take([1, 0, *range(2, 10)]), path)
    with pytest.raises(TarsiftError, match=r"a/part/x\.parquet: rows are not in order"):
        list(ReadStored([Stored(f"{folder}/a")])("part/x"))
