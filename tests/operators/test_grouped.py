"""Grouped files: all rows come back, and only what is asked for is read."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tarsift.operators.grouped import read_groups, write_grouped
from tarsift.operators.schema import fixed_size_list


def table_of(classes):
    count = len(classes)
    values = np.arange(count * 4, dtype=np.float16).reshape(count, 4)
    return pa.table(
        {
            "row": pa.array(range(count), pa.int32()),
            "class": pa.array(classes, pa.int32()),
            "features": fixed_size_list(values),
        }
    )


def test_rows_come_back_by_group_and_in_order(tmp_path):
    table = table_of([2, 0, 2, 7, 0, 2])
    write_grouped(f"{tmp_path}/x.parquet", table, "class")
    everything = read_groups(f"{tmp_path}/x.parquet")
    assert everything["row"].to_pylist() == [1, 4, 0, 2, 5, 3]
    assert everything.schema.equals(table.schema)
    some = read_groups(f"{tmp_path}/x.parquet", (7, 0, 99))
    assert some["row"].to_pylist() == [1, 4, 3]
    assert some["features"].to_pylist() == table["features"].take(pa.array([1, 4, 3])).to_pylist()


def test_each_group_is_a_row_group_however_large(tmp_path):
    write_grouped(f"{tmp_path}/x.parquet", table_of([1] * 3 + [0] * 5), "class")
    file = pq.ParquetFile(f"{tmp_path}/x.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [5, 3]


@pytest.mark.parametrize("values", [None, (), (3,)])
def test_a_table_without_rows_keeps_its_columns(tmp_path, values):
    table = table_of([0, 1]).slice(0, 0)
    write_grouped(f"{tmp_path}/x.parquet", table, "class")
    assert read_groups(f"{tmp_path}/x.parquet", values).schema.equals(table.schema)


def test_groups_may_be_named(tmp_path):
    table = pa.table({"shard": ["b/1", "a", "b/1"], "row": [0, 1, 2]})
    write_grouped(f"{tmp_path}/x.parquet", table, "shard")
    assert read_groups(f"{tmp_path}/x.parquet", ["b/1"])["row"].to_pylist() == [0, 2]
