"""Sorting more records of 128-bit keys than fit in memory: sorted runs on disk, merged block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

RUN_ROWS = 1 << 20
KEY = [("high", "u8"), ("low", "u8")]  # the first fields of every record

Combine = Callable[[Sequence[np.ndarray]], np.ndarray]


def by_key(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Put records together in the order of their keys."""
    records = np.concatenate(parts)
    return records[np.lexsort((records["low"], records["high"]))]


def starts_of_keys(records: np.ndarray) -> np.ndarray:
    """Return where in sorted records each key begins."""
    same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    return np.flatnonzero(np.concatenate([[True], ~same])) if len(records) else np.empty(0, np.int64)


class SortedRuns:
    """Sorts records on disk.

    Args:
        folder: local, for what does not fit in memory.
        dtype: of the records; begins with KEY.
        combine: puts parts together as `by_key` does; it may make one record of those of one key.
        run_rows: records that are held in memory.
    """

    def __init__(self, folder: str, dtype: np.dtype, *, combine: Combine = by_key, run_rows: int = RUN_ROWS) -> None:
        self._folder, self._dtype, self._combine, self._run_rows = folder, dtype, combine, run_rows
        self._waiting: list[np.ndarray] = []
        self._held = 0
        self._runs: list[np.ndarray] = []

    def add(self, records: np.ndarray) -> None:
        self._waiting.append(records)
        self._held += len(records)
        if self._held >= self._run_rows:
            self._spill()

    def _spill(self) -> None:
        path = os.path.join(self._folder, f"{len(self._runs):06d}.npy")
        np.save(path, self._combine(self._waiting))
        self._waiting, self._held = [], 0
        self._runs.append(np.load(path, mmap_mode="r"))

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all records in the order of their keys; of a key that `combine` makes one of, one."""
        if self._waiting:
            self._spill()
        block = max(1024, self._run_rows // max(1, len(self._runs)))
        at = [0] * len(self._runs)
        carried = np.empty(0, self._dtype)
        while heads := [(i, run[at[i] : at[i] + block]) for i, run in enumerate(self._runs) if at[i] < len(run)]:
            last = min((int(head["high"][-1]), int(head["low"][-1])) for _, head in heads)
            taken = [carried]
            for i, head in heads:
                count = _count_up_to(head, *last)
                taken.append(head[:count])
                at[i] += count
            merged = self._combine(taken)
            yield merged[:-1]
            carried = merged[-1:]  # the runs may go on with its key
        yield carried


def _count_up_to(records: np.ndarray, high: int, low: int) -> int:
    above, same = records["high"] > np.uint64(high), records["high"] == np.uint64(high)
    return len(records) - int((above | (same & (records["low"] > np.uint64(low)))).sum())
