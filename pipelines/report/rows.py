"""Read a run's tables back for the report: folds over all shards, and single rows by identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32

from tarsift.clip_detect.neighbors import unit_norm
from tarsift.operators import storage
from tarsift.operators.errors import UsageError
from tarsift.operators.schema import SIFTED_FOLDER, matrix, places_of
from tarsift.operators.stored import ReadStored, Stored
from tarsift.pipelines.report.folds import Overview, Tally, numbers, pc, strings

BATCH_ROWS = 1024
FOLDING_THREADS = 2  # of each a hundred megabytes, and they wait for Python more than for a store
WAVE = 2  # shards per thread whose results may wait to be merged


@dataclass(frozen=True)
class Rows:
    """Some rows of a run, in the order asked for, with their unit-norm embeddings where those are stored."""

    table: pa.Table
    identities: list[tuple[str, int]]
    scores: Float32[np.ndarray, " n"]
    flagged: Bool[np.ndarray, " n"]
    captions: list[str | None]
    digests: list[bytes | None]
    images: Float32[np.ndarray, "n d"] | None
    texts: tuple[Float32[np.ndarray, "n e"], Bool[np.ndarray, " n"]] | None

    def __len__(self) -> int:
        return len(self.identities)

    def value(self, name: str, i: int) -> Any:
        """Return the value of a column of row i; None where the column is absent."""
        return self.table[name][i].as_py() if name in self.table.column_names else None


def rows_of(table: pa.Table, score: str) -> Rows:
    """Take a table of rows apart; `score` is the column they are ranked by."""
    images = texts = None
    if len(table) and "image_embedding" in table.column_names:
        values, valid = matrix(table["image_embedding"])
        images = unit_norm(values.astype(np.float32)) if valid.all() else None
    if len(table) and "text_embedding" in table.column_names:
        values, valid = matrix(table["text_embedding"])
        texts = unit_norm(values.astype(np.float32)), valid
    return Rows(
        table=table,
        identities=places_of(table),
        scores=numbers(table, score),
        flagged=np.array([home == "removed" for home in strings(table, "home")], bool),
        captions=list(strings(table, "caption")),
        digests=list(strings(table, "image_sha256")),
        images=images,
        texts=texts,
    )


@dataclass(frozen=True)
class Available:
    """The columns of each pass's tables, by folder, and the metadata of the embeddings that are shown."""

    columns: dict[str, list[str]]
    encoder: dict[str, str]
    embeddings: str

    @property
    def scores(self) -> list[str]:
        """Columns of the score files and of those of the sifted samples."""
        return [*self.columns["scores"], *self.columns[SIFTED_FOLDER]]


def what_there_is(out: str, shards: Sequence[str], role: str) -> Available:
    """Look at the first table of each pass that has samples; of embeddings at those of one role.

    Raises:
        UsageError: if there is no table of scores or flags at all.
    """
    embeddings = f"embeddings/{role}"
    columns: dict[str, list[str]] = {folder: [] for folder in ("scores", SIFTED_FOLDER, "flags", embeddings)}
    encoder: dict[str, str] = {}
    for folder in columns:
        for shard in shards:
            try:
                with storage.open_read(storage.join(out, folder, f"{shard}.parquet")) as file:
                    schema = pq.read_schema(file)
            except (OSError, pa.ArrowException):
                continue
            columns[folder] = schema.names
            if folder == embeddings:
                metadata = schema.metadata or {}
                encoder = {
                    k.decode().removeprefix("tarsift."): v.decode("utf-8", "replace") for k, v in metadata.items()
                }
            if len(schema.names) > 2:  # a shard without samples has `shard` and `row` alone
                break
    for folder, remedy in (("scores", "score"), ("flags", "flag")):
        if not columns[folder]:
            raise UsageError(
                f"{out} holds no {folder}/ of its {len(shards)} shards: run `tarsift {remedy} {out}` first."
            )
    return Available(columns, encoder, embeddings)


class RunReader:
    """Reads the tables of a run side by side, several shards at once.

    Args:
        out: result folder.
        available: what its tables have.
        threads: shards read at once, of which no more than `FOLDING_THREADS`.
        tick: told after each shard of each fold.
    """

    def __init__(self, out: str, available: Available, *, threads: int, tick: Callable[[], None]):
        self.out, self.available, self.threads, self.tick = out, available, threads, tick
        self.unread: dict[str, str] = {}  # shards that could not be read, and why

    def fold(self, fold: Overview | Tally, shards: Sequence[str]) -> Any:
        """Run a fold over all rows of `shards`."""

        def one(shard: str) -> Any:
            state = fold.init()
            for table in self._tables(shard, fold.columns):
                state = fold.add(state, table) if len(table) else state
            return state

        state = fold.init()
        for part in self._each(one, shards):
            state = fold.merge(state, part)
            self.tick()
        return fold.finish(state)

    def rows(self, wanted: Sequence[tuple[str, int]], score: str) -> Rows:
        """Fetch rows by (shard, row), with all columns, in the order asked for."""
        by_shard: dict[str, list[int]] = {}
        for shard, row in wanted:
            by_shard.setdefault(shard, []).append(row)
        columns = list(dict.fromkeys(name for names in self.available.columns.values() for name in names))

        def one(shard: str) -> list[pa.Table]:
            chosen = pa.array(by_shard[shard], pa.int32())
            found = [t.filter(pc.is_in(t["row"], chosen)) for t in self._tables(shard, columns) if len(t)]
            return [t for t in found if len(t)]

        tables = [t for part in self._each(one, sorted(by_shard)) for t in part]
        if not tables:
            return rows_of(pa.table({"shard": pa.array([], pa.string()), "row": pa.array([], pa.int32())}), score)
        table = pa.concat_tables(tables, promote_options="default")
        at = {name: i for i, name in enumerate(places_of(table))}
        return rows_of(table.take(pa.array([at[name] for name in wanted if name in at], pa.int64())), score)

    def _tables(self, shard: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        sources, taken = [], set()
        for folder, there in self.available.columns.items():
            mine = [name for name in columns if name in there and name not in taken]
            taken.update(mine)
            if mine:
                sources.append(Stored(storage.join(self.out, folder), tuple(mine)))
        return ReadStored(sources, batch_rows=BATCH_ROWS)(shard)

    def _each(self, work: Callable[[str], Any], shards: Sequence[str]) -> Iterator[Any]:
        """Yield the result of each shard in order; one that cannot be read is noted and left out from then on."""

        def guarded(shard: str) -> Any:
            try:
                return work(shard)
            except (OSError, ValueError, pa.ArrowException) as error:
                return error

        shards = [shard for shard in shards if shard not in self.unread]
        threads = min(self.threads, FOLDING_THREADS)
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(shards), WAVE * threads):
                wave = shards[start : start + WAVE * threads]
                for shard, result in zip(wave, pool.map(guarded, wave), strict=True):
                    if isinstance(result, Exception):
                        self.unread[shard] = _why(result)
                    else:
                        yield result


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "a pass has no table for it"
    return f"its tables cannot be read side by side ({type(error).__name__})"
