"""The list of uids that DataComp's resharder takes, of any number of samples in bounded memory.

The resharder (`resharder.py` of github.com/mlfoundations/datacomp) looks every sample's uid, `divmod(int(uid, 16),
2**64)`, up in a sorted array of the dtype `u8,u8`, and writes a sample as often as its uid is found there. So each uid
is listed once; and one that a sample which is not to be written has as well is not listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from tarsift.operators.errors import UsageError

SUBSET = np.dtype("u8,u8")  # high and low half
RUN_ROWS = 1 << 20

_RECORD = np.dtype([("high", "u8"), ("low", "u8"), ("kept", "u8"), ("others", "u8")])  # the last two count samples
_HEX = re.compile(r"[0-9a-fA-F]{32}")


class SortedUids:
    """Sorts uids on disk: an external merge sort.

    Args:
        folder: local, for what does not fit in memory.
        run_rows: uids that are held in memory.
    """

    def __init__(self, folder: str, *, run_rows: int = RUN_ROWS) -> None:
        self._folder, self._run_rows = folder, run_rows
        self._waiting: list[np.ndarray] = []
        self._held = 0
        self._runs: list[np.ndarray] = []
        self.repeated = 0  # kept samples whose uid another one has, which is listed
        self.shared = 0  # kept samples whose uid a sample has that is not kept

    def add(self, uids: Sequence[str], kept: Sequence[bool], where: str) -> None:
        """Take in uids of samples, and whether each is kept.

        Args:
            where: the samples are from, for errors.

        Raises:
            UsageError: if the uid of a sample that is kept is no number of 128 bits in hexadecimal digits.
        """
        records = np.zeros(len(uids), _RECORD)
        listed = np.ones(len(uids), bool)
        for i, (uid, keep) in enumerate(zip(uids, kept, strict=True)):
            if _HEX.fullmatch(uid):
                number = int(uid, 16)
            elif keep:
                raise UsageError(
                    f"the uid {uid[:80]!r} of a sample of {where} has not 32 hexadecimal digits: it is none of "
                    "DataComp's, and its resharder cannot look it up. Use clean/, or keep.parquet."
                )
            else:  # the resharder takes whatever Python's `int` takes
                number = _number(uid)
                listed[i] = number >= 0
            if listed[i]:
                records[i] = (number >> 64, number & (2**64 - 1), keep, not keep)
        self._waiting.append(records[listed])
        self._held += int(listed.sum())
        if self._held >= self._run_rows:
            self._spill()

    def _spill(self) -> None:
        path = os.path.join(self._folder, f"{len(self._runs):06d}.npy")
        np.save(path, _merged(self._waiting))
        self._waiting, self._held = [], 0
        self._runs.append(np.load(path, mmap_mode="r"))

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the uids to list, sorted and each once, as arrays (n,) of SUBSET."""
        if self._waiting:
            self._spill()
        block = max(1024, self._run_rows // max(1, len(self._runs)))
        for records in merge_runs(self._runs, block):
            kept, safe = records["kept"] > 0, records["others"] == 0
            self.shared += int(records["kept"][~safe].sum())
            listed = records[kept & safe]
            self.repeated += int((listed["kept"] - 1).sum())
            out = np.empty(len(listed), SUBSET)
            out["f0"], out["f1"] = listed["high"], listed["low"]
            yield out


def merge_runs(runs: Sequence[np.ndarray], block: int) -> Iterator[np.ndarray]:
    """Merge sorted arrays into blocks of records with a uid each; about `block` records of each are in memory."""
    at = [0] * len(runs)
    carried = np.empty(0, _RECORD)
    while heads := [(i, run[at[i] : at[i] + block]) for i, run in enumerate(runs) if at[i] < len(run)]:
        last = min((int(head["high"][-1]), int(head["low"][-1])) for _, head in heads)
        taken = [carried]
        for i, head in heads:
            count = _count_up_to(head, *last)
            taken.append(head[:count])
            at[i] += count
        merged = _merged(taken)
        yield merged[:-1]
        carried = merged[-1:]  # the runs may go on with its uid
    yield carried


def _count_up_to(records: np.ndarray, high: int, low: int) -> int:
    above, same = records["high"] > np.uint64(high), records["high"] == np.uint64(high)
    return len(records) - int((above | (same & (records["low"] > np.uint64(low)))).sum())


def _merged(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Sort records by uid, and make one of those of one uid."""
    records = np.concatenate(parts)
    records = records[np.lexsort((records["low"], records["high"]))]
    if not len(records):
        return records
    new = (records["high"][1:] != records["high"][:-1]) | (records["low"][1:] != records["low"][:-1])
    starts = np.flatnonzero(np.concatenate([[True], new]))
    out = records[starts]
    for name in ("kept", "others"):
        out[name] = np.add.reduceat(records[name], starts)
    return out


def _number(uid: str) -> int:
    """Return what the resharder makes of a uid; -1 where it makes nothing of it."""
    try:
        number = int(uid, 16)
    except ValueError:
        return -1
    return number if 0 <= number < 2**128 else -1
