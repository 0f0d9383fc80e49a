"""Parquet files with one row group per value of a column: who wants some of the values reads no more than these.

It is how rows change hands without a shuffle: each shard's rows lie grouped by class, so that a job that sifts ten
classes reads theirs from every shard; its verdicts lie grouped by shard, so that each shard gets its own back.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tarsift.operators import storage
from tarsift.operators.stored import parquet_options

GROUPS = b"tarsift.groups"


def write_grouped(url: str, table: pa.Table, column: str) -> None:
    """Write a table with its rows sorted by a column without nulls (rows of one value stay in order)."""
    values = np.array(table[column].to_pylist())
    order = np.argsort(values, kind="stable")
    table = table.take(pa.array(order))
    groups, sizes = np.unique(values, return_counts=True)
    schema = table.schema.with_metadata({GROUPS: json.dumps(groups.tolist())})
    start = 0
    with storage.open_write(url) as raw, pq.ParquetWriter(raw, schema, **parquet_options(schema)) as writer:
        for size in sizes.tolist():
            writer.write_table(table.slice(start, size).cast(schema), row_group_size=size)
            start += size


def read_groups(url: str, values: Collection[Any] | None = None) -> pa.Table:
    """Return the rows of some values of the column that a file is grouped by, in the file's order; None: all rows."""
    with storage.open_read(url) as raw:
        file = pq.ParquetFile(raw)
        groups = json.loads(file.schema_arrow.metadata[GROUPS])
        chosen = [i for i, value in enumerate(groups) if values is None or value in values]
        return file.read_row_groups(chosen).replace_schema_metadata()
