"""Folds: a result over all rows from parts that may come in any order and grouping.

A fold is `init() -> state`, `add(state, table) -> state`, `merge(a, b) -> state`, `finish(state)`;
`merge` is associative and commutative, and a state is bounded however many rows there are.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from tarsift.clip_detect.reference import keyed_hash
from tarsift.clip_detect.threshold import TopFraction
from tarsift.operators.flag import FlagConfig, judged, unscorable
from tarsift.operators.schema import matrix


class Fold(Protocol):
    """What all folds offer; `columns` are the columns that `add` looks at."""

    columns: tuple[str, ...]

    def init(self) -> Any: ...
    def add(self, state: Any, table: pa.Table) -> Any: ...
    def merge(self, a: Any, b: Any) -> Any: ...
    def finish(self, state: Any) -> Any: ...


def content_hashes(table: pa.Table, key: bytes, salt: str) -> np.ndarray:
    """Keyed hash (n,) uint64 of `image_sha256`; 0 where there is none."""
    digests = table["image_sha256"].to_pylist()
    out = np.zeros(len(digests), np.uint64)
    present = [i for i, digest in enumerate(digests) if digest is not None]
    if present:
        out[present] = keyed_hash([digests[i] for i in present], key, salt)
    return out


def row_hashes(table: pa.Table, key: bytes) -> np.ndarray:
    """Keyed hash (n,) uint64 of the identity (shard, row): breaks ties between equal scores."""
    names = [
        f"{shard}\0{row}".encode()
        for shard, row in zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
    ]
    return keyed_hash(names, key, "row") if names else np.zeros(0, np.uint64)


def scorable(table: pa.Table) -> np.ndarray:
    """Mask (n,) of the rows that have an image embedding."""
    return np.array([not unscorable(error) for error in table["error"].to_pylist()], bool)


class SmallestHashes:
    """Fold: the `count` smallest distinct content hashes of the scorable rows, ascending (uint64).

    With `where`, only rows whose column lies on one side of a cutoff take part.
    """

    def __init__(self, count: int, *, key: bytes, salt: str, where: tuple[str, float, bool] | None = None):
        self.count, self.key, self.salt, self.where = count, key, salt, where
        self.columns = ("image_sha256", "error") + ((where[0],) if where else ())

    def init(self) -> np.ndarray:
        return np.zeros(0, np.uint64)

    def add(self, state: np.ndarray, table: pa.Table) -> np.ndarray:
        mask = scorable(table) & side(table, self.where)
        return self.merge(state, content_hashes(table.filter(pa.array(mask)), self.key, self.salt))

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.unique(np.concatenate([a, b]))[: self.count]

    def finish(self, state: np.ndarray) -> np.ndarray:
        return state


def side(table: pa.Table, where: tuple[str, float, bool] | None) -> np.ndarray:
    """Mask (n,) of the rows whose column is at or above (True) or below (False) a cutoff."""
    if where is None:
        return np.ones(len(table), bool)
    name, cutoff, above = where
    values = np.asarray(table[name].combine_chunks().fill_null(np.nan).to_numpy(zero_copy_only=False))
    return values >= cutoff if above else values < cutoff


class FetchRows:
    """Fold: the rows whose content hash is at most `cutoff`, once per distinct image, by ascending hash.

    Finishes to a dict: `hashes` (n,), `ids` (n,) uint64, `embeddings` (n, d) float32 and, for each
    of `extra`, a float32 column (n,).
    """

    def __init__(
        self,
        cutoff: int,
        *,
        key: bytes,
        salt: str,
        where: tuple[str, float, bool] | None = None,
        extra: tuple[str, ...] = (),
        embedding: str = "image_embedding",
    ):
        self.cutoff, self.key, self.salt, self.where, self.extra = np.uint64(cutoff), key, salt, where, extra
        self.embedding = embedding
        self.columns = ("image_sha256", "error", embedding, *extra, *((where[0],) if where else ()))

    def init(self) -> dict[str, np.ndarray]:
        return {}

    def add(self, state: dict[str, np.ndarray], table: pa.Table) -> dict[str, np.ndarray]:
        hashes = content_hashes(table, self.key, self.salt)
        mask = scorable(table) & side(table, self.where) & (hashes <= self.cutoff)
        if not mask.any():
            return state
        chosen = table.filter(pa.array(mask))
        new = {
            "hashes": hashes[mask],
            "ids": content_hashes(chosen, self.key, "identity"),
            "embeddings": matrix(chosen[self.embedding])[0].astype(np.float32),
        }
        for name in self.extra:
            new[name] = np.asarray(chosen[name].combine_chunks(), np.float32)
        return self.merge(state, new)

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not a or not b:
            return a or b
        hashes, first = np.unique(np.concatenate([a["hashes"], b["hashes"]]), return_index=True)
        return {"hashes": hashes} | {n: np.concatenate([a[n], b[n]])[first] for n in a if n != "hashes"}

    def finish(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not state:
            return state
        _, first = np.unique(state["hashes"], return_index=True)
        return {name: values[first] for name, values in state.items()}


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
        ids = content_hashes(present, self.key, "identity")
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

    Looks only at the rows that the policy judges; ties are broken by a keyed hash of (shard, row).
    """

    def __init__(
        self, selection: TopFraction, config: FlagConfig, *, key: bytes, quarantined: frozenset[str] = frozenset()
    ):
        self.selection, self.config, self.key, self.quarantined = selection, config, key, quarantined
        self.columns = ("shard", "row", "error", config.score)

    def init(self) -> Any:
        return self.selection.init()

    def add(self, state: Any, table: pa.Table) -> Any:
        mask = judged(table, self.config, self.quarantined)
        chosen = table.filter(pa.array(mask))
        scores = np.asarray(chosen[self.config.score].combine_chunks(), np.float32)
        return self.selection.add(state, scores, row_hashes(chosen, self.key))

    def merge(self, a: Any, b: Any) -> Any:
        return self.selection.merge(a, b)

    def finish(self, state: Any) -> Any:
        return self.selection.next_round(state)


class CountNear:
    """Fold: (rows within one unit in the last place of a cutoff, rows judged)."""

    def __init__(self, config: FlagConfig, cutoff: float, quarantined: frozenset[str]):
        self.config, self.quarantined = config, quarantined
        self.low = np.nextafter(np.float32(cutoff), np.float32(-np.inf))
        self.high = np.nextafter(np.float32(cutoff), np.float32(np.inf))
        self.columns = ("shard", "row", "error", config.score)

    def init(self) -> tuple[int, int]:
        return 0, 0

    def add(self, state: tuple[int, int], table: pa.Table) -> tuple[int, int]:
        chosen = table.filter(pa.array(judged(table, self.config, self.quarantined)))
        scores = np.asarray(chosen[self.config.score].combine_chunks(), np.float32)
        return state[0] + int(((scores >= self.low) & (scores <= self.high)).sum()), state[1] + len(scores)

    def merge(self, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        return a[0] + b[0], a[1] + b[1]

    def finish(self, state: tuple[int, int]) -> tuple[int, int]:
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
