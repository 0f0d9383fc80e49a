"""The list of uids that DataComp's resharder takes, of any number of samples in bounded memory.

The resharder (`resharder.py` of github.com/mlfoundations/datacomp) looks every sample's uid, `divmod(int(uid, 16),
2**64)`, up in a sorted array of the dtype `u8,u8`, and writes a sample as often as its uid is found there. So each uid
is listed once; and one that a sample which is not to be written has as well is not listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from tarsift.operators.errors import UsageError
from tarsift.operators.external_sort import KEY, RUN_ROWS, SortedRuns, by_key, starts_of_keys

SUBSET = np.dtype("u8,u8")  # high and low half

_RECORD = np.dtype([*KEY, ("kept", "u8"), ("others", "u8")])  # the last two count samples
_HEX = re.compile(r"[0-9a-fA-F]{32}")


class SortedUids:
    """Sorts uids on disk.

    Args:
        folder: local, for what does not fit in memory.
        run_rows: uids that are held in memory.
    """

    def __init__(self, folder: str, *, run_rows: int = RUN_ROWS) -> None:
        self._runs = SortedRuns(folder, _RECORD, combine=_counted, run_rows=run_rows)
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
        self._runs.add(records[listed])

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the uids to list, sorted and each once, as arrays (n,) of SUBSET."""
        for records in self._runs.blocks():
            kept, safe = records["kept"] > 0, records["others"] == 0
            self.shared += int(records["kept"][~safe].sum())
            listed = records[kept & safe]
            self.repeated += int((listed["kept"] - 1).sum())
            out = np.empty(len(listed), SUBSET)
            out["f0"], out["f1"] = listed["high"], listed["low"]
            yield out


def _counted(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Put records together in order, and make one of those of one uid."""
    records = by_key(parts)
    starts = starts_of_keys(records)
    out = records[starts]
    for name in ("kept", "others") if len(records) else ():
        out[name] = np.add.reduceat(records[name], starts)
    return out


def _number(uid: str) -> int:
    """Return what the resharder makes of a uid; -1 where it makes nothing of it."""
    try:
        number = int(uid, 16)
    except ValueError:
        return -1
    return number if 0 <= number < 2**128 else -1
