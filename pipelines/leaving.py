"""Training without some samples of a dump: what was flagged or traced is left out, and no shard is written anew."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.shards import Shard

COLUMNS = ("shard", "key")


@dataclass(frozen=True)
class LeftOut:
    """Samples by (shard, key), and the digest of the list they come from."""

    samples: frozenset[tuple[str, str]]
    digest: str


def read_left_out(url: str, shards: Sequence[Shard]) -> LeftOut:
    """Read a list of samples to leave out.

    Args:
        url: Parquet file with `shard` and `key`; if it has `flagged` or `traced`, only rows where that is so.
        shards: those that are trained on.

    Raises:
        UsageError: there is no such list, or it names shards that are not among those.
    """
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise UsageError(f"there is no list {url} of samples to leave out.") from None
    try:
        names = set(pq.read_schema(pa.BufferReader(data)).names)
        marks = [name for name in ("flagged", "traced") if name in names]
        table = pq.read_table(pa.BufferReader(data), columns=[*COLUMNS, *marks])
    except (pa.ArrowException, KeyError):
        raise UsageError(f"{url} is no Parquet file with the columns {' and '.join(COLUMNS)}.") from None
    for mark in marks:
        table = table.filter(table[mark])
    rows = list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
    strange = sorted({shard for shard, _ in rows} - {shard.name for shard in shards})
    if strange:
        raise UsageError(f"{url} names {strange[0]}, which is none of the shards that are trained on.")
    digest = hashlib.sha256("\0".join(f"{shard}\1{key}" for shard, key in sorted(rows)).encode()).hexdigest()[:16]
    return LeftOut(frozenset(rows), digest)
