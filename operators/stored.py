"""How rows are stored, and read back as a pass has committed them: in batches, in row order, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tarsift.operators import storage
from tarsift.operators.errors import END_OF_SHARD, TarsiftError
from tarsift.operators.retry import take_repeated


@dataclass(frozen=True)
class Stored:
    """Columns of one pass's files: `<folder>/<shard>.parquet`; None = all columns.

    prefix: put before the names of all but `shard` and `row`, where two encoders have columns of the same names.
    drawn: whether the rows are a sample of many shards, each known by its own `shard` and `row`.
    """

    folder: str
    columns: tuple[str, ...] | None = None
    prefix: str = ""
    drawn: bool = False

    def named(self, table: pa.Table) -> pa.Table:
        """Return the table with the prefix put before the names."""
        if not self.prefix:
            return table
        return table.rename_columns([n if n in ("shard", "row") else self.prefix + n for n in table.column_names])


class ReadStored:
    """Source: a shard's name -> tables of its stored rows, the columns of several passes side by side.

    All passes keep the rows of a shard in the same order, so their files are zipped, not joined.

    Args:
        sources: what to read; a column that an earlier source has is taken from there.
        batch_rows: rows of a table.
        receipts: end with the row (row = -1) that says how many rows the shard has.

    Raises:
        TarsiftError: when called, if a file's rows are not in order.
    """

    def __init__(self, sources: Sequence[Stored], *, batch_rows: int = 1024, receipts: bool = False):
        self.sources = tuple(sources)
        self.batch_rows = batch_rows
        self.receipts = receipts

    def __call__(self, shard: str) -> Iterator[pa.Table]:
        rows = 0
        empty: pa.Table | None = None
        for batches in zip(*(self._batches(source, shard) for source in self.sources), strict=True):
            table = batches[0]
            for other in batches[1:]:
                for name in other.column_names:
                    if name not in table.column_names:
                        table = table.append_column(other.schema.field(name), other[name])
            rows += len(table)
            empty = table.slice(0, 0) if empty is None else empty
            if len(table):
                yield table
        if self.receipts:
            schema = empty.schema if empty is not None else pa.schema([("shard", pa.string()), ("row", pa.int32())])
            yield end_row(schema, shard, rows)

    def _batches(self, source: Stored, shard: str) -> Iterator[pa.Table]:
        url = storage.join(source.folder, f"{shard}.parquet")
        rows = 0
        with storage.open_read(url) as raw:
            file = pq.ParquetFile(raw)
            names = set(file.schema_arrow.names)
            columns = None if source.columns is None else [name for name in source.columns if name in names]
            for batch in file.iter_batches(batch_size=self.batch_rows, columns=columns):
                table = pa.table(batch)
                if not len(table):
                    continue
                in_order = source.drawn or "row" not in table.column_names
                if not in_order and not np.array_equal(table["row"], np.arange(rows, rows + len(table))):
                    raise TarsiftError(f"{url}: rows are not in order; it was changed after tarsift wrote it.")
                rows += len(table)
                yield source.named(table)
            if not rows:  # nothing but its columns
                empty = file.schema_arrow.remove_metadata().empty_table()
                yield source.named(empty.select(columns or file.schema_arrow.names))


def end_row(schema: pa.Schema, shard: str, rows: int) -> pa.Table:
    """Make the row (row = -1) by which a source tells that a shard is finished and how many rows it has."""
    for name, kind in (("shard", pa.string()), ("row", pa.int32()), ("key", pa.string()), ("error", pa.string())):
        if name not in schema.names:
            schema = schema.append(pa.field(name, kind))
    end = json.dumps({"rows": rows, "repeated": take_repeated()})
    values = {"shard": shard, "row": -1, "key": end, "error": END_OF_SHARD}
    return pa.table([pa.array([values.get(f.name)], f.type) for f in schema], schema)


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How columns are encoded: embeddings as they are (they do not compress), the rest with zstd."""
    embeddings = {f.name for f in schema if pa.types.is_fixed_size_list(f.type)}
    plain = [f.name for f in schema if f.name not in embeddings]
    compression = {f"{name}.list.element": "none" for name in embeddings} | dict.fromkeys(plain, "zstd")
    strings = [f.name for f in schema if pa.types.is_string(f.type) and f.name in ("shard", "error", "home")]
    return {"compression": compression, "use_dictionary": strings, "write_statistics": False}


def put_table(url: str, table: pa.Table) -> None:
    """Write a small table as one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.put_bytes(url, sink.getvalue())
