"""Folds: a result over all rows from parts that may come in any order and grouping.

A fold is `init() -> state`, `add(state, table) -> state`, `merge(a, b) -> state`, `finish(state)`;
`merge` is associative and commutative, and a state is bounded however many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tarsift.clip_detect.threshold import Cutoff, TopFraction
from tarsift.operators.identity import content_hashes, drawing_hashes, identities, row_hashes, salted, scorable
from tarsift.operators.schema import append, matrix


class Fold(Protocol):
    """What all folds offer; `columns` are the columns that `add` looks at."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def init(self) -> Any: ...
    def add(self, state: Any, table: pa.Table) -> Any: ...
    def merge(self, a: Any, b: Any) -> Any: ...
    def finish(self, state: Any) -> Any: ...


@dataclass(frozen=True)
class Side:
    """The scored rows at or above a cutoff of a score column, or those below it."""

    score: str
    cutoff: float
    above: bool

    def mask(self, table: pa.Table) -> np.ndarray:
        """Mask (n,) of the scored rows on this side."""
        column = table[self.score].combine_chunks()
        scores = np.asarray(column.fill_null(0.0).to_numpy(zero_copy_only=False), np.float32)
        return np.asarray(column.is_valid()) & ((scores >= np.float32(self.cutoff)) == self.above)


class SmallestHashes:
    """Fold: the `count` smallest distinct drawing hashes of the scorable rows, ascending (uint64).

    Args:
        salt: of the draw; different salts give unrelated samples. Empty for the hashes as they are.
        side: only rows on this side take part.
    """

    def __init__(self, count: int, *, key: bytes, salt: str = "", side: Side | None = None):
        self.count, self.key, self.salt, self.side = count, key, salt, side
        self.columns = ("image_sha256", "error", *((side.score,) if side else ()))

    def init(self) -> np.ndarray:
        return np.zeros(0, np.uint64)

    def add(self, state: np.ndarray, table: pa.Table) -> np.ndarray:
        hashes = content_hashes(table, self.key)
        mask = scorable(table) & (self.side.mask(table) if self.side else True)
        return self.merge(state, salted(hashes[mask], self.salt))

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.unique(np.concatenate([a, b]))[: self.count]

    def finish(self, state: np.ndarray) -> np.ndarray:
        return state


class FetchRows:
    """Fold: the rows whose (salted) drawing hash is at most `largest`, once per distinct image, by ascending hash.

    Finishes to a dict: `hashes` (the unsalted ones) and `ids` (n,) uint64, `embeddings` (n, d) float32 and, for
    each of `extra`, a float32 column (n,); an empty dict if there are none.

    Args:
        also: further embeddings by the name they get here and that of their column, (n, d) float32 each, zeros for a
            missing one; left out if the column is not stored.
    """

    def __init__(
        self,
        largest: int,
        *,
        key: bytes,
        salt: str = "",
        side: Side | None = None,
        extra: tuple[str, ...] = (),
        embedding: str = "image_embedding",
        also: Mapping[str, str] | None = None,
    ):
        self.largest, self.key, self.salt, self.side, self.extra = np.uint64(largest), key, salt, side, extra
        self.embedding, self.also = embedding, dict(also or {})
        names = ("shard", "row", "image_sha256", "error", embedding, *self.also.values())
        names = (*names, *extra, *((side.score,) if side else ()))
        self.columns = tuple(dict.fromkeys(names))

    def init(self) -> dict[str, np.ndarray]:
        return {}

    def add(self, state: dict[str, np.ndarray], table: pa.Table) -> dict[str, np.ndarray]:
        ids = identities(table, self.key)
        hashes = drawing_hashes(ids, self.key)
        mask = scorable(table) & (salted(hashes, self.salt) <= self.largest)
        if self.side:
            mask &= self.side.mask(table)
        if not mask.any():
            return state
        chosen = table.filter(pa.array(mask))
        new = {
            "hashes": hashes[mask],
            "rows": row_hashes(chosen, self.key),
            "ids": ids[mask],
            "embeddings": matrix(chosen[self.embedding])[0].astype(np.float32),
        }
        for name, column in self.also.items():
            if column in table.column_names:
                new[name] = matrix(chosen[column])[0].astype(np.float32)
        for name in self.extra:
            new[name] = np.asarray(chosen[name].combine_chunks(), np.float32)
        return self.merge(state, new)

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not a or not b:
            return a or b
        return self._distinct({name: np.concatenate([a[name], b[name]]) for name in a})

    def finish(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: values for name, values in self._distinct(state).items() if name != "rows"} if state else state

    def _distinct(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Of copies the row of smallest row hash is taken, whichever came first.
        order = np.lexsort((state["rows"], state["hashes"]))
        _, first = np.unique(state["hashes"][order], return_index=True)
        return {name: values[order[first]] for name, values in state.items()}


class DrawnRows:
    """Fold: the rows that `FetchRows` finds, in its order, as a table with any columns; None if there are none.

    `shard`, `row`, `image_sha256` and `error` are always among them.
    """

    def __init__(self, largest: int, *, key: bytes, columns: tuple[str, ...]):
        self.largest, self.key = np.uint64(largest), key
        self.columns = tuple(dict.fromkeys(("shard", "row", "image_sha256", "error", *columns)))

    def init(self) -> pa.Table | None:
        return None

    def add(self, state: pa.Table | None, table: pa.Table) -> pa.Table | None:
        hashes = content_hashes(table, self.key)
        mask = scorable(table) & (hashes <= self.largest)
        if not mask.any():
            return state
        chosen = table.select(list(self.columns)).filter(pa.array(mask))
        ties = pa.array(row_hashes(chosen, self.key))
        return self.merge(state, append(chosen, {"hash": pa.array(hashes[mask]), "tie": ties}))

    def merge(self, a: pa.Table | None, b: pa.Table | None) -> pa.Table | None:
        if a is None or b is None:
            return a if b is None else b
        return self._distinct(pa.concat_tables([a, b]))

    def finish(self, state: pa.Table | None) -> pa.Table | None:
        return None if state is None else self._distinct(state).drop_columns(["hash", "tie"])

    @staticmethod
    def _distinct(rows: pa.Table) -> pa.Table:
        hashes = rows["hash"].to_numpy()
        order = np.lexsort((rows["tie"].to_numpy(), hashes))
        _, first = np.unique(hashes[order], return_index=True)
        return rows.take(pa.array(order[first]))


class SumOfDigests:
    """Fold: the sum of `image_sha256` over all rows, as 32 bytes: the same for the same images in any order.

    Whoever supplies only part of the rows cannot foresee it.
    """

    columns = ("image_sha256",)

    def init(self) -> int:
        return 0

    def add(self, state: int, table: pa.Table) -> int:
        return self.merge(state, sum(int.from_bytes(d, "big") for d in table["image_sha256"].to_pylist() if d))

    def merge(self, a: int, b: int) -> int:
        return (a + b) % (1 << 256)

    def finish(self, state: int) -> bytes:
        return state.to_bytes(32, "big")


class CountDuplicates:
    """Fold: how often each image occurs, for the images of one partition; finishes to those seen twice or more.

    Partition p of P holds the identities with `id % P == p`, so that memory stays bounded: P passes
    over one column of 32 bytes a row. Finishes to (ids (n,) uint64 ascending, counts (n,) int32).
    """

    columns = ("image_sha256",)

    def __init__(self, partition: int, partitions: int, *, key: bytes):
        self.partition, self.partitions, self.key = partition, partitions, key

    def init(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(0, np.uint64), np.zeros(0, np.int32)

    def add(self, state: tuple[np.ndarray, np.ndarray], table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        present = table.filter(table["image_sha256"].is_valid())
        ids = identities(present, self.key)
        ids = ids[ids % np.uint64(self.partitions) == self.partition]
        return self.merge(state, (ids, np.ones(len(ids), np.int32)))

    def merge(
        self, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, where = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
        counts = np.bincount(where, weights=np.concatenate([a[1], b[1]]), minlength=len(ids)).astype(np.int32)
        return ids, counts

    def finish(self, state: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        twice = state[1] > 1
        return state[0][twice], state[1][twice]


class SelectTop:
    """Fold: one round of the exact selection of the highest fraction (see `threshold.TopFraction`).

    Args:
        selection: the state after the rounds before.
        score: column that is selected by.
        judged: from a table to the mask (n,) of the rows that take part.
        hashes: from a table to the (n,) uint64 that break ties.
        columns: what `judged` and `hashes` look at.
    """

    def __init__(
        self,
        selection: TopFraction,
        score: str,
        *,
        judged: Callable[[pa.Table], np.ndarray],
        hashes: Callable[[pa.Table], np.ndarray],
        columns: tuple[str, ...],
    ):
        self.selection, self.score, self.judged, self.hashes = selection, score, judged, hashes
        self.columns = tuple(dict.fromkeys((score, *columns)))

    def init(self) -> TopFraction:
        return self.selection

    def add(self, state: TopFraction, table: pa.Table) -> TopFraction:
        chosen = table.filter(pa.array(self.judged(table)))
        return state.add(np.asarray(chosen[self.score].combine_chunks(), np.float32), self.hashes(chosen))

    def merge(self, a: TopFraction, b: TopFraction) -> TopFraction:
        return a.merge(b)

    def finish(self, state: TopFraction) -> TopFraction:
        return state.next_round()


class Foremost:
    """Fold: the `count` rows of highest value, the highest first; of equal ones those of smallest row hash.

    Args:
        value: from a table to (n,) float64; NaN: not to be chosen.
        columns: what `value` looks at; kept: columns that the result has, beside `value`. Both with shard and row.
    """

    def __init__(
        self,
        count: int,
        *,
        key: bytes,
        value: Callable[[pa.Table], np.ndarray],
        columns: tuple[str, ...],
        kept: tuple[str, ...],
    ):
        self.count, self.key, self.value, self.kept = count, key, value, kept
        self.columns = tuple(dict.fromkeys((*kept, *columns)))

    def init(self) -> pa.Table | None:
        return None

    def add(self, state: pa.Table | None, table: pa.Table) -> pa.Table | None:
        values = self.value(table)
        chosen = np.flatnonzero(~np.isnan(values))
        if len(chosen) > self.count:  # most rows need no hash
            least = np.partition(values[chosen], -self.count)[-self.count] if self.count else np.inf
            chosen = chosen[values[chosen] >= least]
        rows = table.select(list(self.kept)).take(pa.array(chosen))
        rows = rows.append_column("value", pa.array(values[chosen]))
        return self.merge(state, rows.append_column("tie", pa.array(row_hashes(rows, self.key))))

    def merge(self, a: pa.Table | None, b: pa.Table | None) -> pa.Table | None:
        if a is None or b is None:
            both = b if a is None else a
            return both if both is None or len(both) <= self.count else self._first(both)
        return self._first(pa.concat_tables([a, b]))

    def finish(self, state: pa.Table | None) -> pa.Table:
        return (
            pa.table({name: [] for name in (*self.kept, "value")})
            if state is None
            else self._first(state).drop_columns(["tie"])
        )

    def _first(self, rows: pa.Table) -> pa.Table:
        order = np.lexsort((np.asarray(rows["tie"]), -np.asarray(rows["value"])))
        return rows.take(pa.array(order[: self.count]))


class CountNear:
    """Fold: (judged rows within one unit in the last place of a cutoff, rows judged)."""

    def __init__(
        self, cutoff: float, score: str, *, judged: Callable[[pa.Table], np.ndarray], columns: tuple[str, ...]
    ):
        self.cutoff, self.score, self.judged = Cutoff(cutoff, 0, 0, 0), score, judged
        self.columns = tuple(dict.fromkeys((score, *columns)))

    def init(self) -> tuple[int, int]:
        return 0, 0

    def add(self, state: tuple[int, int], table: pa.Table) -> tuple[int, int]:
        scores = np.asarray(table.filter(pa.array(self.judged(table)))[self.score].combine_chunks(), np.float32)
        return state[0] + self.cutoff.near(scores), state[1] + len(scores)

    def merge(self, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        return a[0] + b[0], a[1] + b[1]

    def finish(self, state: tuple[int, int]) -> tuple[int, int]:
        return state


class Highest:
    """Fold: the highest value of a column; None if it is null throughout."""

    def __init__(self, column: str):
        self.column = column
        self.columns = (column,)

    def init(self) -> Any:
        return None

    def add(self, state: Any, table: pa.Table) -> Any:
        return self.merge(state, pc.max(table[self.column]).as_py())  # pyright: ignore[reportAttributeAccessIssue]

    def merge(self, a: Any, b: Any) -> Any:
        return b if a is None else a if b is None else max(a, b)

    def finish(self, state: Any) -> Any:
        return state


class Count:
    """Fold: number of rows by the value of one column."""

    def __init__(self, column: str):
        self.column = column
        self.columns = (column,)

    def init(self) -> dict[Any, int]:
        return {}

    def add(self, state: dict[Any, int], table: pa.Table) -> dict[Any, int]:
        counts = table[self.column].value_counts()
        return self.merge(state, {c["values"].as_py(): c["counts"].as_py() for c in counts})

    def merge(self, a: dict[Any, int], b: dict[Any, int]) -> dict[Any, int]:
        return {name: a.get(name, 0) + b.get(name, 0) for name in {*a, *b}}

    def finish(self, state: dict[Any, int]) -> dict[Any, int]:
        return state
